//! What each verb does.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::database::Database;
use crate::host::{self, Profile};
use crate::schemathesis;

const CONTROL_PLANE: &str = "cvault-control-plane";
/// The checked queries' data.
const QUERIES: &str = ".sqlx";
/// Other ways a tunnel can run, and the suites that must not see the difference.
const OTHER_TUNNELS: [(&str, &str); 2] =
    [("CVAULT_TUNNEL_WORKERS", "2"), ("CVAULT_TUNNEL_WITHOUT", "tun,tun-merge,udp-gso,udp-gro")];
const DATA_PATH: [&str; 4] = ["engine", "tenants", "policy", "faults"];
/// One for each processor of a small machine, and one that waits for two minutes.
const DATA_PATH_THREADS: &str = "3";
const FUZZ: &str = "node-agent/dataplane/fuzz/Cargo.toml";
/// Tests that build network namespaces.
const NEED_ROOT: &str = "cvault-tests/lab,cvault-node-agent/lab";

pub(crate) fn demo(arguments: &[&str]) -> Result<()> {
    host::prepare_lab()?;
    host::build(Profile::Debug, &["--workspace"])?;
    host::become_program(&mut host::demonstration(Profile::Debug, arguments))
}

/// All tests; cargo's own summary ends the output.
pub(crate) fn test() -> Result<()> {
    host::prepare_lab()?;
    host::build(Profile::Debug, &["--workspace"])?;
    let binaries = host::built(Profile::Debug, "");
    let tests = ["test", "--workspace", "--features", NEED_ROOT, "--no-fail-fast"];
    host::run(host::cargo(&tests).env("CVAULT_BIN_DIR", &binaries))?;
    schemathesis::run()?;
    for (variable, value) in OTHER_TUNNELS {
        println!("xtask: the data path once more with {variable}={value}");
        let tests = ["test", "--package", "cvault-tests", "--features", "lab", "--no-fail-fast"];
        let data_path = DATA_PATH.iter().flat_map(|suite| ["--test", suite]);
        let environment = [(variable, value), ("RUST_TEST_THREADS", DATA_PATH_THREADS)];
        host::run(host::cargo(&tests).args(data_path).envs(environment).env("CVAULT_BIN_DIR", &binaries))?;
    }
    Ok(())
}

pub(crate) fn schemathesis() -> Result<()> {
    host::install_database()?;
    host::build(Profile::Debug, &["--package", CONTROL_PLANE])?;
    schemathesis::run()
}

pub(crate) fn test_fast() -> Result<()> {
    host::install_database()?;
    host::run(&mut host::cargo(&["test", "--workspace", "--no-fail-fast"]))
}

pub(crate) fn check() -> Result<()> {
    lint()?;
    compare("docs/openapi/v1.json", &rendered_openapi()?, "openapi")?;
    let database = Database::migrated()?;
    compare("migrations/schema.sql", &database.schema()?, "schema")?;
    compare_queries(&database)
}

pub(crate) fn lint() -> Result<()> {
    host::run(&mut host::cargo(&["fmt", "--all", "--check"]))?;
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--features", NEED_ROOT, "--", "-D", "warnings"];
    host::run(&mut host::cargo(&clippy))?;
    // A workspace of its own: nothing else notices when its lock file is out of date.
    host::run(&mut host::cargo(&["fetch", "--quiet", "--locked", "--manifest-path", FUZZ]))
}

pub(crate) fn openapi() -> Result<()> {
    write("docs/openapi/v1.json", &rendered_openapi()?)
}

pub(crate) fn schema() -> Result<()> {
    write("migrations/schema.sql", &Database::migrated()?.schema()?)
}

pub(crate) fn sqlx_prepare() -> Result<()> {
    let folder = host::root().join(QUERIES);
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    write_queries(&Database::migrated()?, &folder)?;
    println!("xtask: {} queries in {QUERIES}/", queries(&folder)?.len());
    Ok(())
}

/// The committed data must be what the macros would write now.
fn compare_queries(database: &Database) -> Result<()> {
    let fresh = database.folder("queries");
    write_queries(database, &fresh)?;
    if queries(&fresh)? != queries(&host::root().join(QUERIES))? {
        bail!("{QUERIES}/ is out of date: run `cargo xtask sqlx-prepare` and commit what it writes");
    }
    println!("xtask: {QUERIES}/ is up to date");
    Ok(())
}

/// The text of every query's file by its name.
fn queries(folder: &Path) -> Result<BTreeMap<OsString, String>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let entry = entry?;
        found.insert(entry.file_name(), std::fs::read_to_string(entry.path())?);
    }
    Ok(found)
}

/// The macros write the data of every query they check when they are told a folder and a database.
fn write_queries(database: &Database, folder: &Path) -> Result<()> {
    std::fs::create_dir(folder)?;
    // Touching the crate's roots makes cargo run its macros again.
    for file in ["control-plane/src/lib.rs", "control-plane/src/main.rs"] {
        std::fs::File::options()
            .append(true)
            .open(host::root().join(file))?
            .set_modified(std::time::SystemTime::now())?;
    }
    host::run(
        host::cargo(&["check", "--quiet", "--package", CONTROL_PLANE, "--all-targets"])
            .env("DATABASE_URL", database.url("postgres"))
            .env("SQLX_OFFLINE_DIR", folder)
            .env("SQLX_OFFLINE", "false"),
    )
}

fn rendered_openapi() -> Result<String> {
    host::run(&mut host::cargo(&["build", "--quiet", "--package", CONTROL_PLANE, "--bins"]))?;
    host::read(Command::new(host::built(Profile::Debug, CONTROL_PLANE)).arg("openapi"))
}

fn write(file: &str, text: &str) -> Result<()> {
    std::fs::write(host::root().join(file), text).with_context(|| format!("write {file}"))?;
    println!("xtask: wrote {file}");
    Ok(())
}

fn compare(file: &str, wanted: &str, verb: &str) -> Result<()> {
    let found = std::fs::read_to_string(host::root().join(Path::new(file))).unwrap_or_default();
    if found != wanted {
        bail!("{file} is out of date: run `cargo xtask {verb}` and commit what it writes");
    }
    println!("xtask: {file} is up to date");
    Ok(())
}
