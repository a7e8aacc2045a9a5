//! The computer: running programs, the Debian packages that are needed, privileges.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// How a program is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    Debug,
    Release,
}

/// A file whose absence means that a package is not installed.
struct Package {
    name: &'static str,
    file: &'static str,
}

const DATABASE: Package = Package { name: "postgresql-15", file: "/usr/lib/postgresql/15/bin/postgres" };

const LAB: [Package; 9] = [
    Package { name: "wireguard-tools", file: "/usr/bin/wg-quick" },
    Package { name: "wireguard-go", file: "/usr/bin/wireguard-go" },
    Package { name: "iproute2", file: "/sbin/ip" },
    Package { name: "nftables", file: "/usr/sbin/nft" },
    Package { name: "iputils-ping", file: "/bin/ping" },
    Package { name: "fping", file: "/usr/bin/fping" },
    Package { name: "procps", file: "/sbin/sysctl" },
    Package { name: "curl", file: "/usr/bin/curl" },
    Package { name: "strace", file: "/usr/bin/strace" },
];

const PYTHON: Package = Package { name: "python3-venv", file: "/usr/share/doc/python3-venv" };

const BENCH: Package = Package { name: "iperf3", file: "/usr/bin/iperf3" };

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("xtask lies two folders below the root")
        .to_path_buf()
}

/// Installs what tests against PostgreSQL need.
pub(crate) fn install_database() -> Result<()> {
    install(&[&DATABASE])
}

/// Installs what the Lab needs, and refuses where it cannot be built.
pub(crate) fn prepare_lab() -> Result<()> {
    prepare_lab_and(&[])
}

/// The Lab and what the bench measures with.
pub(crate) fn prepare_bench() -> Result<()> {
    prepare_lab_and(&[&BENCH])
}

fn prepare_lab_and(others: &[&Package]) -> Result<()> {
    let mut missing = Vec::new();
    if !is_root() {
        missing.push("root, for network namespaces and TUN devices: run it with sudo or as root");
    } else if !Path::new("/dev/net/tun").exists() {
        missing.push("/dev/net/tun: load the module (modprobe tun) or give the container the device");
    } else if !succeeds(Command::new("unshare").args(["--net", "--mount", "--pid", "--fork", "--mount-proc", "true"])) {
        missing.push("the right to create namespaces: run it outside a restricted container (or with --privileged)");
    }
    if !Path::new("/proc/sys/net/ipv6").exists() {
        missing.push("IPv6: this kernel was started with it turned off (ipv6.disable=1)");
    }
    if !missing.is_empty() {
        bail!("the lab cannot be built here; missing is {}", missing.join("; "));
    }
    let mut wanted: Vec<&Package> = LAB.iter().collect();
    wanted.push(&DATABASE);
    wanted.extend(others);
    install(&wanted)
}

/// What makes virtual environments.
pub(crate) fn install_python() -> Result<()> {
    install(&[&PYTHON])
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn install(wanted: &[&Package]) -> Result<()> {
    let absent: Vec<&str> =
        wanted.iter().filter(|package| !Path::new(package.file).exists()).map(|package| package.name).collect();
    if absent.is_empty() {
        return Ok(());
    }
    let command = format!("apt-get install --yes --no-install-recommends {}", absent.join(" "));
    if !is_root() {
        bail!("these Debian packages are missing and installing them takes root: {command}");
    }
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("missing: {} (this is no Debian, so install them your way)", absent.join(", "));
    }
    eprintln!("xtask: installing {}", absent.join(", "));
    run(&mut apt_get(&["update"]))?;
    if absent.contains(&DATABASE.name) {
        no_system_cluster()?;
    }
    let mut install = apt_get(&INSTALL);
    run(install.args(&absent))
}

const INSTALL: [&str; 3] = ["install", "--yes", "--no-install-recommends"];

/// Debian's package would create and start a cluster of the whole computer, which nobody here needs.
fn no_system_cluster() -> Result<()> {
    const SETTINGS: &str = "/etc/postgresql-common/createcluster.conf";
    const SETTING: &str = "create_main_cluster = false";
    run(apt_get(&INSTALL).arg("postgresql-common"))?;
    let found = std::fs::read_to_string(SETTINGS).with_context(|| format!("read {SETTINGS}"))?;
    if found.lines().any(|line| line.trim_start().starts_with("create_main_cluster")) {
        return Ok(());
    }
    std::fs::write(SETTINGS, format!("{found}\n# Written by CVault's `cargo xtask`\n{SETTING}\n"))
        .with_context(|| format!("write {SETTINGS}"))?;
    eprintln!("xtask: wrote `{SETTING}` to {SETTINGS}, so that {} starts no database of its own", DATABASE.name);
    Ok(())
}

/// Another apt at work is waited for. What it says is no result of ours.
fn apt_get(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.stdout(std::io::stderr());
    command.args(["-qq", "-o", "DPkg::Lock::Timeout=300"]).args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// Runs a command with its output shown; fails with its words when it does.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {}", words(command)))?;
    if !status.success() {
        bail!("{} failed ({status})", words(command));
    }
    Ok(())
}

/// Becomes the command: signals from the terminal are its own affair. Returns only when it cannot be started.
pub(crate) fn become_program(command: &mut Command) -> Result<()> {
    let error = command.exec();
    Err(error).with_context(|| format!("start {}", words(command)))
}

/// Runs a command and returns its standard output.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("start {}", words(command)))?;
    if !output.status.success() {
        bail!("{} failed ({}): {}", words(command), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// The cargo that runs us, in the workspace's root.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(arguments);
    command
}

/// Builds the programs of these packages.
pub(crate) fn build(profile: Profile, packages: &[&str]) -> Result<()> {
    eprintln!("xtask: building the programs (the first time takes some minutes)");
    let mut build = cargo(&["build", "--quiet", "--bins"]);
    build.args(packages);
    if profile == Profile::Release {
        build.arg("--release");
    }
    run(&mut build)
}

/// The demonstration with the programs of its own profile.
pub(crate) fn demonstration(profile: Profile, arguments: &[&str]) -> Command {
    let mut command = Command::new(built(profile, "cvault-demo"));
    command.args(arguments).env("CVAULT_BIN_DIR", built(profile, ""));
    command
}

/// Where cargo puts the programs it builds.
pub(crate) fn built(profile: Profile, program: &str) -> PathBuf {
    let folder = match profile {
        Profile::Debug => "debug",
        Profile::Release => "release",
    };
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join(folder).join(program)
}

fn words(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|argument| argument.to_string_lossy().into_owned()));
    words.join(" ")
}
