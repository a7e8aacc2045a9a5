//! One machine: its own network, mounts, processes and host name, held by a small `init` process.
//!
//! `/run` (WireGuard sockets, PID files), `/etc` (resolv.conf, /etc/wireguard), `/dev/shm` and `/sys` are private, `/tmp` is
//! shared with the computer. Nothing of the caller's environment gets in. When `init`'s standard input closes, it exits and the kernel kills whatever still runs in the machine.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use super::process::Process;
use super::{expose, interrupt};

/// All the environment that programs of a machine have, besides what they are started with.
const ENVIRONMENT: [(&str, &str); 3] = [
    ("PATH", "/run/lab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("LANG", "C.UTF-8"),
    ("HOME", "/root"),
];

/// What chooses how tunnels run: taken over from the tests' own environment, so that one test serves every choice.
const TAKEN_OVER: [&str; 2] = ["CVAULT_TUNNEL_WORKERS", "CVAULT_TUNNEL_WITHOUT"];

/// A machine is on from `boot` until it is dropped.
pub struct Machine {
    name: String,
    dir: PathBuf,
    init: Child,
}

impl Machine {
    /// Boots an unconnected machine. Its logs go to `<dir>/<name>/`.
    pub fn boot(name: &str, dir: &Path) -> Result<Self> {
        let dir = dir.join(name);
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let log = File::options().create(true).append(true).open(dir.join("init.log"))?;
        let mut init = Command::new("unshare")
            .args([
                "--net",
                "--mount",
                "--pid",
                "--uts",
                "--ipc",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-euc",
                SETUP,
                "sh",
            ])
            .arg(name)
            .arg(super::binary("cvault-lab")?)
            .env_clear()
            .envs(ENVIRONMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("run unshare")?;
        interrupt::remember(&init);
        let mut ready = String::new();
        let read = BufReader::new(init.stdout.take().expect("stdout is piped")).read_line(&mut ready);
        if read.is_err() || ready.trim() != "ready" {
            drop(init.stdin.take());
            let _ = init.wait();
            interrupt::forget(&init);
            let why = std::fs::read_to_string(dir.join("init.log")).unwrap_or_default();
            bail!("machine {name} did not boot: {}", why.trim());
        }
        Ok(Self { name: name.to_owned(), dir, init })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The machine's folder, with the same path inside and outside.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The process whose namespaces the machine's are, as `ip link … netns` wants it.
    pub fn holder(&self) -> String {
        self.init.id().to_string()
    }

    /// A path of the machine's own file system, seen from outside.
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.init.id()))
    }

    /// The machine's network namespace, to enter with a thread.
    pub fn network(&self) -> Result<File> {
        let path = format!("/proc/{}/ns/net", self.init.id());
        File::open(&path).with_context(|| format!("open {path}"))
    }

    /// A command that will run inside the machine, as root, in `/`.
    pub fn command(&self, program: &str) -> Command {
        let namespaces = format!("/proc/{}/ns", self.init.id());
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={namespaces}/net"))
            .arg(format!("--mount={namespaces}/mnt"))
            .arg(format!("--uts={namespaces}/uts"))
            .arg(format!("--ipc={namespaces}/ipc"))
            .arg(format!("--pid={namespaces}/pid_for_children"))
            .args(["--", program])
            .stdin(Stdio::null())
            .process_group(0)
            .env_clear()
            .envs(ENVIRONMENT)
            .envs(TAKEN_OVER.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        command
    }

    /// Runs a program to its end; its standard output, or an error with what it said.
    pub fn run<'a>(&self, program: &str, arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
        let mut command = self.command(program);
        command.args(arguments);
        self.finish(program, command)
    }

    /// Runs a shell script that stops at its first error.
    pub fn sh(&self, script: &str) -> Result<String> {
        let mut command = self.command("sh");
        command.args(["-euc", script]);
        self.finish(script.trim(), command)
    }

    /// Runs a prepared command of this machine to its end.
    pub fn finish(&self, what: &str, mut command: Command) -> Result<String> {
        let output = command.output().with_context(|| format!("on {}: run {what}", self.name))?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("on {}: {what}: {}: {} {}", self.name, output.status, stdout.trim(), stderr.trim());
        }
        Ok(stdout)
    }

    /// Starts a program that stays, with its output in `<name>.log` of the machine's folder.
    pub fn spawn<'a>(
        &self,
        name: &str,
        program: &str,
        arguments: impl IntoIterator<Item = &'a str>,
        environment: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Process> {
        Process::start(self, name, program, arguments, environment)
    }

    /// Sends a signal to processes given by the machine's own process ids.
    pub fn kill(&self, signal: super::Signal, pid: &str) -> Result<()> {
        self.run("kill", [signal.flag(), pid]).map(drop)
    }

    /// The process id found in a file, as the machine counts.
    pub fn pid_from(&self, file: &Path) -> Result<String> {
        let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        let first = text.split_whitespace().next().unwrap_or_default();
        if first.parse::<u32>().is_err() {
            bail!("{} holds no process id: {text:?}", file.display());
        }
        Ok(first.to_owned())
    }

    /// Lets programs outside the lab reach a port of this machine: the address to use.
    pub fn expose(&self, inside: SocketAddr) -> Result<SocketAddr> {
        expose::start(self.network()?, inside)
    }

    fn power_off(&mut self) {
        drop(self.init.stdin.take());
        let _ = self.init.wait();
        interrupt::forget(&self.init);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.power_off();
    }
}

/// Makes the machine private, then becomes its `init`. Arguments: host name, path of cvault-lab.
///
/// `resolvconf` is a stand-in with the two calls that wg-quick makes, so that no resolver package has to be installed on the
/// computer, where it would take over the real /etc/resolv.conf. `ip` refuses links of type wireguard and the kernel's list of
/// modules is hidden, so that wg-quick takes a program and not the kernel's WireGuard where the computer has it. wg-quick
/// searches its own folder first, whatever PATH says: it is copied to where these two are. The boot id is the machine's own: a machine that boots
/// again is a rebooted one.
const SETUP: &str = r#"
echo "$1" > /proc/sys/kernel/hostname
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=555 tmpfs /sys/module
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/wireguard /run/etc/upper /run/etc/work /run/lab/bin
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work overlay /etc
rm -f /etc/resolv.conf
echo 'nameserver 198.51.100.53' > /etc/resolv.conf
echo "127.0.0.1 localhost $1" > /etc/hosts
real_ip=$(command -v ip)
cat > /run/lab/bin/resolvconf <<'END'
#!/bin/sh
[ -e /run/lab/resolv.conf ] || cp /etc/resolv.conf /run/lab/resolv.conf
case "$1" in
  -a) cat > /etc/resolv.conf ;;
  -d) cp /run/lab/resolv.conf /etc/resolv.conf ;;
esac
END
cat > /run/lab/bin/ip <<END
#!/bin/sh
case " \$* " in
  *" type wireguard "*) echo 'Error: Unknown device type.' >&2; exit 2 ;;
esac
exec $real_ip "\$@"
END
cp "$(command -v wg-quick)" /run/lab/bin/wg-quick
chmod 755 /run/lab/bin/*
cat /proc/sys/kernel/random/uuid > /run/lab/boot_id
mount --bind /run/lab/boot_id /proc/sys/kernel/random/boot_id
ip link set lo up
sysctl -qw net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.disable_ipv6=0 net.ipv6.conf.lo.disable_ipv6=0
sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.all.accept_ra=0 net.ipv6.conf.default.accept_ra=0
exec "$2" init
"#;
