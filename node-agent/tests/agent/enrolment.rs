//! `enroll`: one token, one identity, and what happens when something goes wrong.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use cvault_node_protocol::tls::Identity;
use cvault_node_protocol::token::EnrolToken;

use crate::agent;
use crate::gateway::{Gateway, Serving};

/// A directory that can be a state directory, whatever the umask.
fn private_directory() -> tempfile::TempDir {
    tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().unwrap()
}

async fn serving() -> Serving {
    let identity = Identity::generate().unwrap();
    Gateway::new(identity.pin()).serve(&identity, "127.0.0.1:0").await
}

/// Success, or the one sentence of the failure.
async fn enrol(dir: &Path, control_plane: &str, token: &str, more: &[&str]) -> Result<(), String> {
    let mut command = agent();
    command.args(["enroll", "--control-plane", control_plane, "--token", token, "--state-dir"]).arg(dir).args(more);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!said.contains(token) || token.len() < 20, "the token was printed: {said}");
    if output.status.success() { Ok(()) } else { Err(said) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_enrols_once_and_its_keys_are_private() {
    let serving = serving().await;
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("state");
    let (address, token) = (serving.address.to_string(), serving.gateway.state().token.expose().to_string());
    enrol(&dir, &address, &token, &[]).await.unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&dir), mode(&dir.join("identity.json"))), (0o700, 0o600));
    let (_, request) = serving.gateway.state().enrolled.clone().unwrap();
    assert_eq!(request.wireguard_public_key.len(), 32);
    let again = enrol(&dir, &address, &token, &[]).await.unwrap_err();
    assert!(again.contains("--force") && again.lines().count() == 1, "{again}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_is_asked_for_again_with_the_same_keys() {
    let serving = serving().await;
    let root = private_directory();
    let (address, token) = (serving.address.to_string(), serving.gateway.state().token.expose().to_string());
    serving.gateway.state().lose_answer = true;
    let lost = enrol(root.path(), &address, &token, &[]).await.unwrap_err();
    assert!(lost.contains("run this again"), "{lost}");
    assert!(!root.path().join("identity.json").exists());
    enrol(root.path(), &address, &token, &[]).await.unwrap();
    let other = private_directory();
    let used = enrol(other.path(), &address, &token, &[]).await.unwrap_err();
    assert!(used.contains("make a new one"), "{used}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_forced_enrolment_keeps_the_old_identity() {
    let serving = serving().await;
    let root = private_directory();
    let (address, token) = (serving.address.to_string(), serving.gateway.state().token.expose().to_string());
    enrol(root.path(), &address, &token, &[]).await.unwrap();
    let before = std::fs::read(root.path().join("identity.json")).unwrap();
    let pin = serving.gateway.state().token.control_plane_pin;
    let wrong = EnrolToken::new(uuid::Uuid::from_u128(8), [2; 32], pin).expose().to_string();
    enrol(root.path(), &address, &wrong, &["--force"]).await.unwrap_err();
    assert_eq!(std::fs::read(root.path().join("identity.json")).unwrap(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_enrolment_as_another_server_sets_the_old_state_aside() {
    let serving = serving().await;
    let root = private_directory();
    let (address, token) = (serving.address.to_string(), serving.gateway.state().token.expose().to_string());
    enrol(root.path(), &address, &token, &[]).await.unwrap();
    let names = ["state.bin", "usage.spool", "closed.journal", "counters.bin"];
    let left = |root: &Path| names.iter().filter(|name| root.join(name).exists()).count();
    for name in names {
        std::fs::write(root.path().join(name), b"old").unwrap();
    }
    serving.gateway.state().enrolled = None;
    enrol(root.path(), &address, &token, &["--force"]).await.unwrap();
    assert_eq!(left(root.path()), 4, "the same server keeps its state");
    serving.gateway.state().enrolled = None;
    serving.gateway.state().server_id = [0x5f; 16];
    enrol(root.path(), &address, &token, &["--force"]).await.unwrap();
    assert_eq!(left(root.path()), 0);
    let aside = std::fs::read_dir(root.path())
        .unwrap()
        .filter(|file| file.as_ref().unwrap().file_name().to_string_lossy().contains(".replaced-"));
    assert_eq!(aside.count(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_work_is_said_in_one_sentence() {
    let serving = serving().await;
    let root = private_directory();
    let (address, token) = (serving.address.to_string(), serving.gateway.state().token.expose().to_string());
    let impostor = Identity::generate().unwrap();
    let foreign = EnrolToken::new(uuid::Uuid::from_u128(7), [1; 32], impostor.pin()).expose().to_string();
    let file = root.path().join("file");
    std::fs::write(&file, "").unwrap();
    let cases = [
        (root.path(), address.as_str(), "hello", "begins with `cvj1.`"),
        (root.path(), "127.0.0.1:1", token.as_str(), "cannot be reached"),
        (root.path(), "nowhere", token.as_str(), "HOST:PORT"),
        (root.path(), address.as_str(), foreign.as_str(), "is not the one that made this token"),
        (file.as_path(), address.as_str(), token.as_str(), "--state-dir"),
    ];
    for (dir, control_plane, token, expected) in cases {
        let said = enrol(dir, control_plane, token, &[]).await.unwrap_err();
        assert!(said.contains(expected) && said.lines().count() == 1, "wanted {expected:?}, got: {said}");
    }
    assert!(serving.gateway.state().enrolled.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_enrolled_does_not_run() {
    let root = private_directory();
    let mut command = agent();
    command.args(["run", "--metrics-listen", "off", "--state-dir"]).arg(root.path());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(said.contains("enroll") || said.contains("run it as root"), "{said}");
}
