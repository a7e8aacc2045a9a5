//! The binary as an operator runs it: what it refuses to start with, and what it survives.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cvault_control_plane::postgres::scratch::ScratchDatabase;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use sqlx::{ConnectOptions, Connection};

use crate::platform::Platform;
use crate::transport::Serving;

pub(crate) const KEK: &str = "0707070707070707070707070707070707070707070707070707070707070707";
const OTHER_KEK: &str = "0808080808080808080808080808080808080808080808080808080808080808";
const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cvault-control-plane"));
    command.env_clear().env("PATH", "/usr/bin:/bin").stdin(Stdio::null()).current_dir("/");
    if let Some(bin) = std::env::var_os("CVAULT_PG_BIN") {
        command.env("CVAULT_PG_BIN", bin);
    }
    command
}

pub(crate) fn serve(database: &ScratchDatabase, kek: &str) -> Command {
    let mut command = program();
    command.arg("serve").env("CVAULT_LISTEN", "127.0.0.1:0").env("CVAULT_NODE_LISTEN", "127.0.0.1:0");
    command.env("DATABASE_URL", database.url("cvault_app")).env("CVAULT_DATABASE_SYS_URL", database.url("cvault_sys"));
    command.env("API_ENCRYPTION_KEY", kek);
    command
}

/// Runs to the end; a program that starts to serve instead is killed and the test fails.
fn refused(mut command: Command) -> Vec<String> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    eventually("the program refuses to start", || child.try_wait().unwrap().is_some());
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    let text = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(stdout.is_empty());
    text.lines().filter_map(|line| line.strip_prefix("error: ")).map(str::to_owned).collect()
}

pub(crate) fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !check() {
        assert!(Instant::now() < deadline, "{what} did not happen within {DEADLINE:?}");
        std::thread::yield_now();
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

#[test]
fn an_empty_environment_is_refused_with_every_missing_variable_named() {
    let mut command = program();
    command.arg("serve");
    let faults = refused(command);
    assert_eq!(faults.len(), 3, "{faults:?}");
    for (fault, name) in faults.iter().zip(["DATABASE_URL", "CVAULT_DATABASE_SYS_URL", "key-encryption key"]) {
        assert!(fault.contains(name), "{fault}");
    }
}

#[tokio::test]
async fn a_port_that_is_taken_is_named_before_the_database_is_touched() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut command = program();
    let data = tempfile::tempdir().unwrap();
    let dir = data.path().join("dev");
    command.args(["dev", "--listen", &address, "--node-listen", "127.0.0.1:0", "--data-dir"]).arg(&dir);
    let faults = refused(command);
    assert!(faults[0].contains("CVAULT_LISTEN") && faults[0].contains(&address), "{faults:?}");
    assert!(!dir.exists(), "nothing half-done");
}

#[tokio::test]
async fn a_database_that_is_away_or_empty_or_reached_as_the_wrong_role_is_refused() {
    let database = ScratchDatabase::create().await.unwrap();
    let mut away = serve(&database, KEK);
    away.env("CVAULT_DATABASE_SYS_URL", "postgres://cvault_sys:hunter2@127.0.0.1:1/cvault");
    let faults = refused(away);
    assert!(faults[0].contains("CVAULT_DATABASE_SYS_URL") && !faults[0].contains("hunter2"), "{faults:?}");

    for role in ["cvault_owner", "postgres", "cvault_sys"] {
        let mut wrong = serve(&database, KEK);
        wrong.env("DATABASE_URL", database.url(role));
        let faults = refused(wrong);
        assert!(faults[0].contains("DATABASE_URL") && faults[0].contains(role), "{faults:?}");
    }

    let mut connection = database.superuser().connect().await.unwrap();
    sqlx::raw_sql("drop table _sqlx_migrations").execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    let faults = refused(serve(&database, KEK));
    assert!(faults[0].contains("cvault-control-plane migrate"), "{faults:?}");
}

#[tokio::test]
async fn a_tenant_table_that_is_open_is_named_and_nobody_is_served_until_it_is_closed_again() {
    let (database, directory) = (ScratchDatabase::create().await.unwrap(), tempfile::tempdir().unwrap());
    let mut serving = Serving::start(serve(&database, KEK), directory.path());
    let address = serving.address();
    assert!(answered(&address), "it serves");
    signal(i32::try_from(serving.child.id()).unwrap(), Signal::TERM);
    assert!(serving.child.wait().unwrap().success());

    let mut superuser = database.superuser().connect().await.unwrap();
    sqlx::raw_sql("alter table cvault.devices disable row level security").execute(&mut superuser).await.unwrap();
    let mut command = serve(&database, KEK);
    command.env("CVAULT_LISTEN", &address);
    let ended = Arc::new(AtomicBool::new(false));
    let client = std::thread::spawn({
        let (address, ended) = (address.clone(), Arc::clone(&ended));
        // its port is taken before the database is asked, and let go without a word
        move || {
            std::iter::repeat_with(|| answered(&address)).take_while(|_| !ended.load(Ordering::Relaxed)).any(|it| it)
        }
    });
    let faults = refused(command);
    ended.store(true, Ordering::Relaxed);
    assert!(!client.join().unwrap(), "somebody was answered");
    assert!(faults.concat().contains("table cvault.devices has no row-level security"), "{faults:?}");
    assert!(TcpStream::connect(&address).is_err(), "nobody listens");

    sqlx::raw_sql("alter table cvault.devices enable row level security").execute(&mut superuser).await.unwrap();
    let serving = Serving::start(serve(&database, KEK), directory.path());
    assert!(answered(&serving.address()));
}

/// Whether a request gets as much as a byte.
fn answered(address: &str) -> bool {
    std::thread::park_timeout(Duration::from_millis(5));
    let Ok(mut stream) = TcpStream::connect(address) else { return false };
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let sent = stream.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    sent.is_ok() && stream.read(&mut [0]).is_ok_and(|read| read > 0)
}

#[tokio::test]
async fn another_key_encryption_key_than_the_databases_own_is_refused() {
    let platform = Platform::start().await;
    let faults = refused(serve(&platform.database, OTHER_KEK));
    assert!(faults[0].contains("key-encryption key does not open"), "{faults:?}");
    assert!(!faults[0].contains(OTHER_KEK));
}

#[tokio::test]
async fn a_key_file_that_others_may_read_is_refused() {
    let database = ScratchDatabase::create().await.unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "{KEK}").unwrap();
    for mode in [0o644, 0o640] {
        fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
        let mut command = serve(&database, KEK);
        command.env_remove("API_ENCRYPTION_KEY").env("CVAULT_KEK_FILE", file.path());
        let faults = refused(command);
        assert!(faults[0].contains("chmod 600"), "{faults:?}");
    }
}

#[test]
fn a_postgresql_that_is_not_there_is_named_with_its_remedy() {
    let data = tempfile::tempdir().unwrap();
    let mut command = program();
    command.args(["dev", "--listen", "127.0.0.1:0", "--node-listen", "127.0.0.1:0", "--data-dir"]).arg(data.path());
    command.env("CVAULT_PG_BIN", "/nonexistent");
    let faults = refused(command);
    assert!(faults[0].contains("CVAULT_PG_BIN"), "{faults:?}");
}

#[test]
fn the_committed_openapi_text_is_printed_without_any_configuration() {
    let output = program().arg("openapi").output().unwrap();
    assert!(output.status.success());
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(output.stdout, program().arg("openapi").output().unwrap().stdout);
    let paths = document["paths"].as_object().unwrap();
    let operations = paths.values().flat_map(|methods| methods.as_object().unwrap().values());
    let mut ids: Vec<&str> = operations.map(|operation| operation["operationId"].as_str().unwrap()).collect();
    let all = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), all, "operations have names of their own");
}

#[test]
fn the_page_about_configuration_is_what_the_program_prints() {
    let output = program().arg("config").output().unwrap();
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations/configuration.md");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), fs::read_to_string(page).unwrap(), "print it again");
}

/// A `dev` in a folder of its own; killed with its PostgreSQL when dropped.
struct Dev {
    child: Child,
    dir: std::path::PathBuf,
}

impl Dev {
    fn start(dir: &Path) -> Self {
        let log = |name: &str| fs::OpenOptions::new().create(true).append(true).open(dir.join(name)).unwrap();
        let child = program()
            .args(["dev", "--listen", "127.0.0.1:0", "--node-listen", "127.0.0.1:0", "--data-dir"])
            .arg(dir)
            .env("CVAULT_LOG", "trace")
            .stdout(log("stdout"))
            .stderr(log("stderr"))
            .spawn()
            .unwrap();
        let before = served(dir);
        let mut dev = Self { child, dir: dir.to_owned() };
        eventually("dev serves", || {
            assert!(dev.child.try_wait().unwrap().is_none(), "{}", read(dir, "stderr"));
            served(dir) > before
        });
        dev
    }

    fn postgres(&self) -> i32 {
        let text = fs::read_to_string(self.dir.join("pg/postmaster.pid")).unwrap_or_default();
        text.lines().next().and_then(|line| line.parse().ok()).unwrap_or_default()
    }

    fn admin(&self, args: &[&str]) -> serde_json::Value {
        let output = program().args(["admin", "--json", "--data-dir"]).arg(&self.dir).args(args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        signal(self.postgres(), Signal::QUIT);
        let pid = self.postgres();
        eventually("PostgreSQL ends", || !alive(pid));
    }
}

fn served(dir: &Path) -> usize {
    read(dir, "stderr").matches("\"message\":\"serving\"").count()
}

fn read(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join(name)).unwrap_or_default()
}

pub(crate) fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, signal);
    }
}

fn alive(pid: i32) -> bool {
    Pid::from_raw(pid).is_some_and(|pid| test_kill_process(pid).is_ok())
}

fn credential(dir: &Path, name: &str) -> String {
    let text = read(dir, "stdout");
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}=")));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).to_owned()
}

#[test]
fn dev_survives_kills_of_itself_and_of_postgresql_and_stops_cleanly() {
    let data = tempfile::Builder::new().prefix("cvault-dev").tempdir_in("/tmp").unwrap();
    let dir = data.path();
    let mut dev = Dev::start(dir);
    let postgres = dev.postgres();
    let tenants = |dev: &Dev| dev.admin(&["tenant", "list"])["tenants"].as_array().unwrap().len();
    assert_eq!(tenants(&dev), 1, "the demo tenant");

    let server = ["server", "create", "--name", "s1", "--region", "lab-1", "--public-ip", "203.0.113.1"];
    let server = dev.admin(&server);
    let another = dev.admin(&["server", "token", server["server_id"].as_str().unwrap()]);
    let (token, second) = (server["token"].as_str().unwrap(), another["token"].as_str().unwrap());
    assert!(second.starts_with("cvj1.") && second != token, "a second token for the same server");
    assert_eq!(another["server_id"], server["server_id"]);
    let command = another["command"].as_str().unwrap();
    assert!(command.ends_with("--token -") && !command.contains("cvj1."), "{command}");

    dev.child.kill().unwrap();
    dev.child.wait().unwrap();
    assert!(alive(postgres), "PostgreSQL outlives its parent");
    std::mem::forget(dev);
    let mut dev = Dev::start(dir);
    assert_eq!(dev.postgres(), postgres, "and is adopted");
    assert_eq!(tenants(&dev), 1, "no second demo tenant");
    assert_eq!(read(dir, "stdout").matches("api_secret=").count(), 1, "credentials are printed once");

    signal(postgres, Signal::KILL);
    eventually("PostgreSQL is started again", || dev.postgres() != postgres && alive(dev.postgres()));
    eventually("and answers", || {
        let output =
            program().args(["admin", "--json", "--data-dir"]).arg(dir).args(["tenant", "list"]).output().unwrap();
        output.status.success()
    });

    let mut second = program();
    second.args(["dev", "--listen", "127.0.0.1:0", "--node-listen", "127.0.0.1:0", "--data-dir"]).arg(dir);
    assert!(refused(second)[0].contains("another process of CVault"));

    let postgres = dev.postgres();
    signal(i32::try_from(dev.child.id()).unwrap(), Signal::TERM);
    let status = dev.child.wait().unwrap();
    assert!(status.success() && !alive(postgres), "a clean shutdown takes PostgreSQL along");

    for secret in ["api_key", "api_secret", "admin_token"] {
        let secret = credential(dir, secret);
        assert!(!read(dir, "stderr").contains(&secret) && !read(dir, "postgres.log").contains(&secret));
    }
    let kek = read(dir, "kek");
    assert!(!read(dir, "stderr").contains(kek.trim()));
    assert_eq!(fs::metadata(dir.join("kek")).unwrap().permissions().mode() & 0o777, 0o600);
}
