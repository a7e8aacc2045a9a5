//! Password checks in processes of their own, as `serve` and `dev` have them.

use std::fs;

use cvault_control_plane::auth::passwords::{COMMAND, HashError, Party, PasswordError, Passwords, Scheme};
use cvault_types::Secret;
use futures::future::join_all;
use rustix::process::{Pid, Signal, getpriority_process, getsid, kill_process};

use crate::binary::{eventually, program};

const PASSWORD: &str = "correct\nhorse \0\u{1f40e}";

fn secret(text: &str) -> Secret {
    Secret::new(text)
}

/// Those of this process that check passwords.
fn children() -> Vec<Pid> {
    let own = std::process::id().to_string();
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    let is_ours = |pid: &String| {
        // pid (name) state parent; who has ended is not there any more
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1));
        parent == Some(own.as_str()) && command.contains(COMMAND)
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

    let first = children();
    assert_eq!(first.len(), 2, "one for each thread");
    for child in &first {
        assert_eq!((getsid(Some(*child)), getpriority_process(Some(*child))), (Ok(*child), Ok(19)));
        if let Ok(group) = fs::read_to_string(format!("/proc/{}/autogroup", child.as_raw_nonzero())) {
            assert!(group.trim_end().ends_with("nice 19"), "{group}");
        }
        kill_process(*child, Signal::TERM).unwrap();
    }
    assert!(many(8).await.into_iter().all(|outcome| outcome.unwrap()));
    assert_eq!(children(), first, "they end with their parent");

    let killed = async {
        tokio::task::yield_now().await;
        first.iter().for_each(|child| kill_process(*child, Signal::KILL).unwrap());
    };
    let (outcomes, ()) = tokio::join!(many(20), killed);
    assert!(outcomes.into_iter().all(|outcome| outcome.unwrap()), "by others in their place");
    assert!(children().iter().all(|child| !first.contains(child)));

    drop(passwords);
    eventually("they are gone with the pool", || children().is_empty());
}

#[tokio::test]
async fn a_program_that_is_not_there_is_an_error_and_not_a_wrong_password() {
    let passwords = Passwords::with_bounds(Scheme::Bcrypt { cost: 10 }, 1, 1);
    passwords.compute_apart("/nonexistent/cvault-control-plane".into());
    let outcome = passwords.hash(Party::Portal, secret(PASSWORD)).await;
    assert!(matches!(outcome, Err(PasswordError::Hash(HashError::NoChild(_)))), "{outcome:?}");
}

#[test]
fn a_process_that_checks_passwords_ends_when_nobody_is_left_to_ask() {
    let output = program().arg(COMMAND).output().unwrap();
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
}
