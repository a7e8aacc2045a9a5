//! `cargo xtask bench [<suite>] [<option>…]`: figures of a release build. What a suite measures is the suite's own affair.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::host::{self, Profile};

/// Engines that are compared with ours and come from their crates: crate and program.
const PEERS: [(&str, &str); 2] = [("boringtun-cli", "boringtun-cli"), ("gotatun-cli", "gotatun")];

#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    /// Every suite, with options that each of them has.
    All(Vec<String>),
    Spine(Vec<String>),
    Api(Vec<String>),
    Dataplane {
        install_peers: bool,
        options: Vec<String>,
    },
}

pub(crate) fn run(words: &[&str]) -> Result<()> {
    match Wanted::read(words)? {
        Wanted::All(options) => {
            host::prepare_bench()?;
            host::build(Profile::Release, &["--workspace"])?;
            println_unless_json(&options, "xtask: suite spine");
            host::run(&mut spine(&options))?;
            println_unless_json(&options, "xtask: suite api");
            host::run(&mut suite("api", &options))?;
            println_unless_json(&options, "xtask: suite dataplane");
            host::become_program(&mut suite("dataplane", &options))
        }
        Wanted::Api(options) => {
            host::install_database()?;
            host::build(Profile::Release, &["--package", "cvault-control-plane", "--package", "cvault-tests"])?;
            host::become_program(&mut suite("api", &options))
        }
        Wanted::Spine(options) => {
            host::prepare_lab()?;
            host::build(Profile::Release, &["--workspace"])?;
            host::become_program(&mut spine(&options))
        }
        Wanted::Dataplane { install_peers, options } => {
            host::prepare_bench()?;
            if install_peers {
                build_peers();
            }
            host::build(Profile::Release, &["--package", "cvault-node-agent", "--package", "cvault-tests"])?;
            host::become_program(&mut suite("dataplane", &options))
        }
    }
}

impl Wanted {
    fn read(words: &[&str]) -> Result<Self> {
        let owned = |words: &[&str]| -> Vec<String> { words.iter().map(|word| (*word).to_owned()).collect() };
        let common = |words: &[&str]| match words.iter().find(|word| !["--json", "--quick"].contains(word)) {
            Some(word) => bail!(
                "{word}: not known here; the suites are `spine`, `api` and `dataplane`, the options that all have --json and --quick"
            ),
            None => Ok(owned(words)),
        };
        Ok(match words {
            ["spine", options @ ..] => Self::Spine(common(options)?),
            ["api", options @ ..] => Self::Api(owned(options)),
            ["dataplane", options @ ..] => {
                let (install, options): (Vec<&str>, Vec<&str>) =
                    options.iter().partition(|word| **word == "--install-peers");
                Self::Dataplane { install_peers: !install.is_empty(), options: owned(&options) }
            }
            options => Self::All(common(options)?),
        })
    }
}

fn spine(options: &[String]) -> Command {
    let has = |name: &str| options.iter().any(|option| option == name);
    let mut command = host::demonstration(Profile::Release, &["--figures", if has("--quick") { "20" } else { "200" }]);
    if has("--json") {
        command.arg("--json");
    }
    command
}

fn suite(name: &str, options: &[String]) -> Command {
    let mut command = Command::new(host::built(Profile::Release, "cvault-bench"));
    command
        .arg(name)
        .args(options)
        .env("CVAULT_BENCH_ROOT", host::root())
        .env("CVAULT_BIN_DIR", host::built(Profile::Release, ""));
    command
}

/// Builds what is not there yet. One that cannot be built is said to be, and the bench goes on without it.
fn build_peers() {
    let folder = folder();
    for (package, program) in PEERS {
        if folder.join("bin").join(program).exists() {
            continue;
        }
        eprintln!("xtask: building {package} from its crate (this takes some minutes)");
        let mut install = host::cargo(&["install", "--quiet", "--locked", "--root"]);
        if let Err(error) = host::run(install.arg(&folder).arg(package)) {
            eprintln!("xtask: {error:#}: going on without it");
        }
    }
}

/// Where the bench looks for them.
fn folder() -> PathBuf {
    host::root().join("target/peers")
}

fn println_unless_json(options: &[String], text: &str) {
    if !options.iter().any(|option| option == "--json") {
        println!("{text}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn a_suite_can_be_named_and_without_one_all_run() {
        assert_eq!(Wanted::read(&[]).unwrap(), Wanted::All(Vec::new()));
        assert_eq!(Wanted::read(&["--json"]).unwrap(), Wanted::All(owned(&["--json"])));
        assert_eq!(Wanted::read(&["spine", "--quick"]).unwrap(), Wanted::Spine(owned(&["--quick"])));
        assert_eq!(
            Wanted::read(&["dataplane", "--only", "peers_set", "--install-peers", "--json"]).unwrap(),
            Wanted::Dataplane { install_peers: true, options: owned(&["--only", "peers_set", "--json"]) }
        );
    }

    #[test]
    fn an_unknown_suite_is_refused_with_those_that_are() {
        for words in [["speed"], ["--record"]] {
            let error = Wanted::read(&words).unwrap_err().to_string();
            assert!(error.contains("spine") && error.contains("dataplane"), "{error}");
        }
        assert!(Wanted::read(&["spine", "--record"]).is_err());
    }
}
