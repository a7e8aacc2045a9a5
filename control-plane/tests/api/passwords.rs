//! Password checks in processes of their own, as `serve` and `dev` have them.

use std::fs;

use cvault_control_plane::auth::passwords::{COMMAND, HashError, Party, PasswordError, Passwords, Scheme};
use cvault_types::Secret;
use futures::future::join_all;
use rustix::process::{Pid, Signal, getpriority_process, getsid, kill_process, test_kill_process};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::binary::{KEK, eventually, program, serve, signal};
use crate::platform::Platform;
use crate::transport::Serving;

const PASSWORD: &str = "correct\nhorse \0\u{1f40e}";

fn secret(text: &str) -> Secret {
    Secret::new(text)
}

/// Those of a process that check passwords.
fn children(of: u32) -> Vec<Pid> {
    let of = of.to_string();
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    let is_ours = |pid: &String| {
        // pid (name) state parent; who has ended is not there any more
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1));
        parent == Some(of.as_str()) && command.contains(COMMAND)
    };
    processes.filter(is_ours).filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn checks_give_way_to_other_sessions_too_and_a_process_of_theirs_may_die_at_any_time() {
    let passwords = Passwords::with_bounds(Scheme::Bcrypt { cost: 10 }, 2, 20);
    passwords.compute_apart(env!("CARGO_BIN_EXE_cvault-control-plane").into());
    let hash = passwords.hash(Party::Portal, secret(PASSWORD)).await.unwrap();
    let verify = |text| passwords.verify(Party::Portal, secret(text), Some(hash.clone()));
    let many = async |count: usize| join_all((0..count).map(|_| verify(PASSWORD))).await;
    assert!(many(8).await.into_iter().all(|outcome| outcome.unwrap()));
    assert!(!verify("wrong horse").await.unwrap());
    let damaged = passwords.verify(Party::Portal, secret(PASSWORD), Some("$2b$12$short".to_owned())).await;
    assert!(matches!(damaged, Err(PasswordError::Hash(HashError::Child(_)))), "{damaged:?}");

    let first = children(std::process::id());
    assert_eq!(first.len(), 2, "one for each thread");
    for child in &first {
        assert_eq!((getsid(Some(*child)), getpriority_process(Some(*child))), (Ok(*child), Ok(10)));
        if let Ok(group) = fs::read_to_string(format!("/proc/{}/autogroup", child.as_raw_nonzero())) {
            assert!(group.trim_end().ends_with("nice 10"), "{group}");
        }
        kill_process(*child, Signal::TERM).unwrap();
    }
    assert!(many(8).await.into_iter().all(|outcome| outcome.unwrap()));
    assert_eq!(children(std::process::id()), first, "they end with their parent");

    let killed = async {
        tokio::task::yield_now().await;
        first.iter().for_each(|child| kill_process(*child, Signal::KILL).unwrap());
    };
    let (outcomes, ()) = tokio::join!(many(20), killed);
    assert!(outcomes.into_iter().all(|outcome| outcome.unwrap()), "by others in their place");
    assert!(children(std::process::id()).iter().all(|child| !first.contains(child)));

    drop(passwords);
    eventually("they are gone with the pool", || children(std::process::id()).is_empty());
}

#[tokio::test]
async fn without_such_a_process_the_thread_computes_itself() {
    for program in ["/nonexistent/cvault-control-plane", "/bin/false", "/bin/yes"] {
        let passwords = Passwords::with_bounds(Scheme::Bcrypt { cost: 10 }, 1, 1);
        passwords.compute_apart(program.into());
        let hash = passwords.hash(Party::Portal, secret(PASSWORD)).await.unwrap();
        assert!(passwords.verify(Party::Portal, secret(PASSWORD), Some(hash)).await.unwrap(), "{program}");
    }
}

/// The status of a sign-up; nothing when it is not answered.
async fn sign_up(address: &str, email: &str) -> String {
    let body = json!({"business_name": "Apart", "email": email, "password": "correct horse"}).to_string();
    let head = "POST /api/v1/tenant/auth/signup HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json";
    let request = format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.split(' ').nth(1).unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_when_all_processes_are_told_to_end_is_answered() {
    let (platform, directory) = (Platform::start().await, tempfile::tempdir().unwrap());
    let mut serving = Serving::start(serve(&platform.database, KEK), directory.path());
    let (address, parent) = (serving.address(), serving.child.id());
    assert!(children(parent).is_empty(), "the first check starts them");
    assert_eq!(sign_up(&address, "one@example.com").await, "201");
    let [child] = children(parent)[..] else { panic!("one thread was asked") };
    assert_eq!(getsid(Some(child)), Ok(child));

    let under_way = tokio::spawn(async move { sign_up(&address, "two@example.com").await });
    let computes = |child: &Pid| {
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.as_raw_nonzero())).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('R'))
    };
    eventually("it is checked", || children(parent).iter().any(computes));
    for child in children(parent) {
        kill_process(child, Signal::TERM).unwrap();
    }
    signal(i32::try_from(parent).unwrap(), Signal::TERM);
    assert_eq!(under_way.await.unwrap(), "201");
    assert!(serving.child.wait().unwrap().success());
    eventually("they are gone with their parent", || test_kill_process(child).is_err());
}

#[test]
fn a_process_that_checks_passwords_ends_when_nobody_is_left_to_ask() {
    let output = program().arg(COMMAND).output().unwrap();
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
}
