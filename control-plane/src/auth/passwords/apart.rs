//! Checks in processes of their own: children of this program, one for each thread of the pool, which waits for its answers.
//!
//! The lowest priority makes a thread give way to the others of its process only, where the kernel divides the processors among
//! sessions first (`sched_autogroup_enabled`, as distributions have it). There, threads that compute all the time weigh as much as
//! a PostgreSQL session does that they keep waiting (ADR 13). A child is a session by itself, and the session has the lowest weight.

use std::cell::RefCell;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use cvault_types::Secret;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use zeroize::Zeroizing;

use super::pool::NICE;
use super::scheme::{self, HashError, Scheme};

/// The subcommand that a child is.
pub const COMMAND: &str = "password-checks";

/// Many times what the costliest scheme takes on a busy machine; the caller has gone by then.
const PATIENCE: Duration = Duration::from_secs(60);

/// A line of JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Question {
    Hash { scheme: Scheme, password: Secret },
    Verify { password: Secret, hash: String },
}

/// A line of JSON; from a child, what has failed is text.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Hash(String),
    Right(bool),
}

impl Question {
    /// Computes, here.
    pub(super) fn answer(&self) -> Result<Answer, HashError> {
        match self {
            Self::Hash { scheme, password } => scheme.hash(password).map(Answer::Hash),
            Self::Verify { password, hash } => scheme::verify(password, hash).map(Answer::Right),
        }
    }
}

thread_local! {
    /// Of a thread of the pool. It ends with the thread.
    static CHECKER: RefCell<Option<Checker>> = const { RefCell::new(None) };
}

/// Lets this thread's child compute. One that has ended is started anew.
pub(super) fn ask(program: &Path, question: &Question) -> Result<Answer, HashError> {
    CHECKER.with_borrow_mut(|checker| {
        if let Some(mut running) = checker.take() {
            match running.ask(question) {
                Ok(answer) => {
                    *checker = Some(running);
                    return answer.map_err(HashError::Child);
                }
                Err(error) => tracing::warn!(%error, "a process that checks passwords has ended; it is started anew"),
            }
        }
        let mut fresh = Checker::start(program).map_err(HashError::NoChild)?;
        let answer = fresh.ask(question).map_err(HashError::NoChild)?;
        *checker = Some(fresh);
        answer.map_err(HashError::Child)
    })
}

#[derive(Debug)]
struct Checker {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Checker {
    fn start(program: &Path) -> io::Result<Self> {
        let mut child = Command::new(program)
            .arg(COMMAND)
            // what it need not know
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let questions = child.stdin.take().expect("it is piped");
        let answers = BufReader::new(child.stdout.take().expect("it is piped"));
        Ok(Self { child, questions, answers })
    }

    fn ask(&mut self, question: &Question) -> io::Result<Result<Answer, String>> {
        self.questions.write_all(&line(question)?)?;
        let mut answer = [PollFd::new(self.answers.get_ref(), PollFlags::IN)];
        if poll(&mut answer, Some(&Timespec::try_from(PATIENCE).map_err(io::Error::other)?))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // a line this short comes as a whole
        let mut text = String::new();
        match self.answers.read_line(&mut text)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(serde_json::from_str(&text)?),
        }
    }
}

impl Drop for Checker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a child does: answers what its standard input asks until that ends, as it does with the parent.
///
/// # Errors
/// When its parent cannot be spoken with.
pub async fn answer_all() -> io::Result<()> {
    give_way();
    // the parent decides when it ends: a service manager tells all processes, and logins under way are still to be answered
    let _ignored = signal(SignalKind::terminate())?;
    let (mut questions, mut answers) = (io::stdin().lock(), io::stdout().lock());
    loop {
        let mut text = Zeroizing::new(String::new());
        if questions.read_line(&mut text)? == 0 {
            return Ok(());
        }
        let question: Question = serde_json::from_str(&text)?;
        let answer = question.answer().map_err(|error| crate::http::problem::chain(&error));
        answers.write_all(&line(&answer)?)?;
        answers.flush()?;
    }
}

/// Where a step is refused, or there are no such groups, it does without.
fn give_way() {
    let _ = rustix::process::setsid();
    let _ = rustix::process::setpriority_process(None, NICE);
    let _ = std::fs::write("/proc/self/autogroup", NICE.to_string());
}

fn line(message: &impl Serialize) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut text = Zeroizing::new(serde_json::to_vec(message)?);
    text.push(b'\n');
    Ok(text)
}
