//! The computer: running programs, the Debian packages that are needed, privileges.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A file whose absence means that a package is not installed.
struct Package {
    name: &'static str,
    file: &'static str,
}

const DATABASE: Package = Package { name: "postgresql-15", file: "/usr/lib/postgresql/15/bin/postgres" };

const LAB: [Package; 7] = [
    Package { name: "wireguard-tools", file: "/usr/bin/wg-quick" },
    Package { name: "wireguard-go", file: "/usr/bin/wireguard-go" },
    Package { name: "iproute2", file: "/sbin/ip" },
    Package { name: "nftables", file: "/usr/sbin/nft" },
    Package { name: "iputils-ping", file: "/bin/ping" },
    Package { name: "procps", file: "/sbin/sysctl" },
    Package { name: "curl", file: "/usr/bin/curl" },
];

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
    let mut missing = Vec::new();
    if !is_root() {
        missing.push("root, for network namespaces and TUN devices: run it with sudo or as root");
    } else if !Path::new("/dev/net/tun").exists() {
        missing.push("/dev/net/tun: load the module (modprobe tun) or give the container the device");
    } else if !succeeds(Command::new("unshare").args(["--net", "--mount", "--pid", "--fork", "--mount-proc", "true"])) {
        missing.push("the right to create namespaces: run it outside a restricted container (or with --privileged)");
    }
    if !missing.is_empty() {
        bail!("the lab cannot be built here; missing is {}", missing.join("; "));
    }
    let mut wanted: Vec<&Package> = LAB.iter().collect();
    wanted.push(&DATABASE);
    install(&wanted)
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
    println!("xtask: installing {}", absent.join(", "));
    run(Command::new("apt-get").args(["-qq", "update"]))?;
    run(Command::new("apt-get")
        .args(["-qq", "install", "--yes", "--no-install-recommends"])
        .args(&absent)
        .env("DEBIAN_FRONTEND", "noninteractive"))
}

/// Runs a command with its output shown; fails with its words when it does.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {}", words(command)))?;
    if !status.success() {
        bail!("{} failed ({status})", words(command));
    }
    Ok(())
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

/// Where cargo puts the programs it builds.
pub(crate) fn built(program: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join("debug").join(program)
}

fn words(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|argument| argument.to_string_lossy().into_owned()));
    words.join(" ")
}
