//! Checks in processes of their own: children of this program, one for each thread of the pool, which waits for its answers.
//!
//! The lowest priority makes a thread give way to the others of its process only, where the kernel divides the processors among
//! sessions first (`sched_autogroup_enabled`, as distributions have it). There, threads that compute all the time weigh as much as
//! a PostgreSQL session does that they keep waiting (ADR 13). A child is a session by itself, of little weight.

use std::cell::RefCell;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use cvault_types::Secret;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

use super::scheme::{self, HashError, Scheme};

/// The subcommand that a child is.
pub const COMMAND: &str = "password-checks";

/// A ninth of what another session weighs: others hardly notice it, and beside processes that compute all the time a sign-up is
/// still answered, which at the least weight there is (a seventieth) it was not within the 45 s that a request may take.
const NICE: i32 = 10;

/// Longer than any caller waits. A child that takes as long is stopped, or its machine is busy with what is more urgent.
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

/// A child that ends is replaced, and what it was asked is asked again.
const ATTEMPTS: usize = 2;

/// Lets this thread's child compute; the thread itself, where there can be none.
pub(super) fn ask(program: &Path, question: &Question) -> Result<Answer, HashError> {
    CHECKER.with_borrow_mut(|checker| {
        for _ in 0..ATTEMPTS {
            let started = checker.take().map_or_else(|| Checker::start(program), Ok);
            let asked = started.and_then(|mut running| Ok((running.ask(question)?, running)));
            match asked {
                Ok((answer, running)) => {
                    *checker = Some(running);
                    return answer.map_err(HashError::Child);
                }
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(HashError::Silent),
                Err(error) => tracing::warn!(%error, "a process that checks passwords is missing"),
            }
        }
        // others may have to wait for it; without it nobody could log in
        question.answer()
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
            // `program` may be the name of whatever this process is
            .arg0("cvault-control-plane")
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
        self.exchange(question).map_err(|error| match error.kind() == io::ErrorKind::TimedOut {
            true => error,
            false => io::Error::new(error.kind(), format!("{error}; {}", self.end())),
        })
    }

    /// A line each way. Both fit into a pipe, so they come and go as a whole.
    fn exchange(&mut self, question: &Question) -> io::Result<Result<Answer, String>> {
        self.questions.write_all(&line(question)?)?;
        let patience = Timespec::try_from(PATIENCE).map_err(io::Error::other)?;
        let mut answer = [PollFd::new(self.answers.get_ref(), PollFlags::IN)];
        if rustix::io::retry_on_intr(|| poll(&mut answer, Some(&patience)))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut text = String::new();
        match self.answers.read_line(&mut text)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(serde_json::from_str(&text)?),
        }
    }

    /// Ends it, and tells how it has ended if it did so by itself.
    fn end(&mut self) -> String {
        let _ = self.child.kill();
        self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string())
    }
}

impl Drop for Checker {
    fn drop(&mut self) {
        self.end();
    }
}

/// What a child does: answers what its standard input asks until that ends, as it does with the parent.
///
/// # Errors
/// When it cannot be spoken with.
pub async fn answer_all() -> io::Result<()> {
    // the parent decides when it ends: a service manager tells all processes, and logins under way are still to be answered
    let _ignored = signal(SignalKind::terminate())?;
    let mut is_apart = give_way();
    let (mut questions, mut answers) = (io::stdin().lock(), io::stdout().lock());
    let mut text = String::new();
    while questions.read_line(&mut text)? > 0 {
        is_apart = is_apart || last_in_turn();
        let question: Question = serde_json::from_str(&text)?;
        let answer = question.answer().map_err(|error| crate::http::problem::chain(&error));
        match answers.write_all(&line(&answer)?).and_then(|()| answers.flush()) {
            // nobody waits for it any more
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written?,
        }
        text.clear();
    }
    Ok(())
}

/// Where a step is refused, or there are no such groups, it does without. Says whether the last one is done with.
fn give_way() -> bool {
    let _ = rustix::process::setsid();
    let _ = rustix::process::setpriority_process(None, NICE);
    last_in_turn()
}

/// Of those without privileges the kernel hears one in 100 ms: a refusal for that is no answer.
fn last_in_turn() -> bool {
    let outcome = std::fs::write("/proc/self/autogroup", NICE.to_string());
    outcome.err().is_none_or(|error| error.kind() != io::ErrorKind::WouldBlock)
}

fn line(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut text = serde_json::to_vec(message)?;
    text.push(b'\n');
    Ok(text)
}
