//! The programs that are measured: ours, and every other userspace WireGuard that is found.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use cvault_tests::lab::binary;

/// How to run one program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Engine {
    /// With its version, as in `wireguard-go 0.0.20250522`.
    pub(crate) name: String,
    pub(crate) program: Program,
    pub(crate) path: String,
    /// Further arguments.
    pub(crate) extra: &'static [&'static str],
}

/// Whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    CVault,
    WireguardGo,
    Boringtun,
    Gotatun,
}

struct Peer {
    program: Program,
    name: &'static str,
    /// Where it is looked for: Debian's package, or what `--install-peers` built.
    place: Place,
    /// Names another build, which is measured beside the usual one.
    variable: &'static str,
}

enum Place {
    Debian(&'static str),
    Crate(&'static str),
}

const PEERS: [Peer; 3] = [
    Peer {
        program: Program::WireguardGo,
        name: "wireguard-go",
        place: Place::Debian("/usr/bin/wireguard-go"),
        variable: "CVAULT_BENCH_WIREGUARD_GO",
    },
    Peer {
        program: Program::Boringtun,
        name: "boringtun-cli",
        place: Place::Crate("boringtun-cli"),
        variable: "CVAULT_BENCH_BORINGTUN_CLI",
    },
    Peer {
        program: Program::Gotatun,
        name: "gotatun-cli",
        place: Place::Crate("gotatun"),
        variable: "CVAULT_BENCH_GOTATUN_CLI",
    },
];

/// The engines of this run, ours first, and what to say of those that are not there.
pub(crate) struct Engines {
    pub(crate) all: Vec<Engine>,
    pub(crate) remarks: Vec<String>,
}

impl Engines {
    /// `crates` is the folder that `cargo install --root` was given.
    pub(crate) fn find(crates: &Path) -> Result<Self> {
        let ours = Engine {
            name: "cvault".to_owned(),
            program: Program::CVault,
            path: binary("cvault-node-agent")?,
            extra: &[],
        };
        let mut found = Self { all: vec![ours], remarks: Vec::new() };
        for peer in &PEERS {
            let usual = match peer.place {
                Place::Debian(path) => PathBuf::from(path),
                Place::Crate(program) => crates.join("bin").join(program),
            };
            if usual.is_file() {
                found.add(peer, &usual)?;
            } else if std::env::var_os(peer.variable).is_none() {
                let way = match peer.place {
                    Place::Debian(_) => "install its package".to_owned(),
                    Place::Crate(_) => "build it from its crate with --install-peers".to_owned(),
                };
                found.remarks.push(format!("{} is not there: {way}, or name a build in {}", peer.name, peer.variable));
            }
            if let Some(given) = std::env::var_os(peer.variable) {
                let given = PathBuf::from(given);
                if !given.is_file() {
                    bail!("{} names {}, which is no file", peer.variable, given.display());
                }
                found.add(peer, &given)?;
            }
        }
        if std::env::var_os(PEERS[0].variable).is_none() {
            found.remarks.push(format!(
                "wireguard-go is Debian's alone, older than its offloads of 2023: name a newer build in {}",
                PEERS[0].variable
            ));
        }
        Ok(found)
    }

    fn add(&mut self, peer: &Peer, path: &Path) -> Result<()> {
        let output = Command::new(path)
            .arg("--version")
            .output()
            .with_context(|| format!("ask {} for its version", path.display()))?;
        let name = match version(&String::from_utf8_lossy(&output.stdout)) {
            Some(version) => format!("{} {version}", peer.name),
            None => peer.name.to_owned(),
        };
        if self.all.iter().any(|engine| engine.name == name) {
            self.remarks.push(format!("{} is {name} once more and is left out", path.display()));
            return Ok(());
        }
        self.all.push(Engine { name, program: peer.program, path: path.display().to_string(), extra: &[] });
        Ok(())
    }
}

impl Engine {
    /// Its arguments, for the interface `interface`, in the foreground.
    pub(crate) fn arguments<'a>(&self, interface: &'a str, state_dir: &'a str) -> Vec<&'a str> {
        let mut arguments = match self.program {
            Program::CVault => vec!["tunnel", "--foreground", "--state-dir", state_dir, interface],
            Program::WireguardGo => vec!["-f", interface],
            Program::Boringtun => vec!["-f", "--disable-drop-privileges", "-t", "2", interface],
            Program::Gotatun => vec!["-f", "-v", "error", "--disable-drop-privileges", interface],
        };
        arguments.extend(self.extra);
        arguments
    }

    /// Ours, with its peers shared by two workers.
    pub(crate) fn with_two_workers(&self) -> Self {
        Self { extra: &["--workers", "2"], ..self.clone() }
    }

    pub(crate) fn is_ours(&self) -> bool {
        self.program == Program::CVault
    }
}

/// The first word that begins as a version does, without its `v`.
fn version(text: &str) -> Option<&str> {
    text.split_whitespace()
        .map(|word| word.trim_start_matches('v'))
        .find(|word| word.starts_with(|first: char| first.is_ascii_digit()) && word.contains('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_is_asked_to_has_two_workers() {
        let ours = Engine { name: "cvault".into(), program: Program::CVault, path: String::new(), extra: &[] };
        assert!(!ours.arguments("cv0", "/state").contains(&"--workers"));
        assert!(ours.with_two_workers().arguments("cv0", "/state").ends_with(&["cv0", "--workers", "2"]));
    }

    #[test]
    fn a_version_is_read_from_what_each_program_says() {
        let go = "wireguard-go v0.0.20220316\n\nUserspace WireGuard daemon for linux-amd64.\n";
        assert_eq!(version(go), Some("0.0.20220316"));
        assert_eq!(version("boringtun 0.7.1\n"), Some("0.7.1"));
        assert_eq!(version("gotatun-cli 0.10.2\n"), Some("0.10.2"));
        assert_eq!(version(""), None);
    }
}
