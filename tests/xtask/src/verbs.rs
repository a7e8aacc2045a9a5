//! What each verb does.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::database::Database;
use crate::host;

const CONTROL_PLANE: &str = "cvault-control-plane";

pub(crate) fn demo(arguments: &[&str]) -> Result<()> {
    host::prepare_lab()?;
    println!("xtask: building the programs (the first time takes some minutes)");
    build()?;
    host::run(Command::new(host::built("cvault-demo")).args(arguments))
}

/// All tests; cargo's own summary ends the output.
pub(crate) fn test() -> Result<()> {
    host::prepare_lab()?;
    build()?;
    let tests = ["test", "--workspace", "--features", "cvault-tests/lab", "--no-fail-fast"];
    host::run(host::cargo(&tests).env("CVAULT_BIN_DIR", host::built("").as_os_str()))
}

pub(crate) fn test_fast() -> Result<()> {
    host::install_database()?;
    host::run(&mut host::cargo(&["test", "--workspace", "--no-fail-fast"]))
}

pub(crate) fn check() -> Result<()> {
    lint()?;
    compare("docs/openapi/v1.json", &rendered_openapi()?, "openapi")?;
    compare("migrations/schema.sql", &Database::migrated()?.schema()?, "schema")
}

pub(crate) fn lint() -> Result<()> {
    host::run(&mut host::cargo(&["fmt", "--all", "--check"]))?;
    let clippy =
        ["clippy", "--quiet", "--workspace", "--all-targets", "--features", "cvault-tests/lab", "--", "-D", "warnings"];
    host::run(&mut host::cargo(&clippy))
}

pub(crate) fn openapi() -> Result<()> {
    write("docs/openapi/v1.json", &rendered_openapi()?)
}

pub(crate) fn schema() -> Result<()> {
    write("migrations/schema.sql", &Database::migrated()?.schema()?)
}

/// The macros write the data of every query they check when they are told a folder and a database.
pub(crate) fn sqlx_prepare() -> Result<()> {
    let database = Database::migrated()?;
    let folder = host::root().join(".sqlx");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir(&folder)?;
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
            .env("SQLX_OFFLINE_DIR", &folder)
            .env("SQLX_OFFLINE", "false"),
    )?;
    println!("xtask: {} queries in .sqlx/", std::fs::read_dir(&folder)?.count());
    Ok(())
}

fn build() -> Result<()> {
    host::run(&mut host::cargo(&["build", "--quiet", "--workspace", "--bins"]))
}

fn rendered_openapi() -> Result<String> {
    host::run(&mut host::cargo(&["build", "--quiet", "--package", CONTROL_PLANE, "--bins"]))?;
    host::read(Command::new(host::built(CONTROL_PLANE)).arg("openapi"))
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
