//! How much memory there is for the cluster's own cache.

use std::fs;
use std::path::Path;

use super::Durability;

const MIB: u64 = 1 << 20;
/// PostgreSQL's default.
const LEAST_MIB: u64 = 128;
const MOST_MIB: u64 = 4096;
/// PostgreSQL's manual (20.4.1) begins with a quarter for a server of its own; this one has the control plane beside it.
const SHARE: u64 = 8;

/// `shared_buffers`, in MiB, of a process that may use `memory` bytes. What is made for a test has the least.
pub(super) fn buffers_mib(durability: Durability, memory: u64) -> u64 {
    match durability {
        Durability::Durable => (memory / SHARE / MIB).clamp(LEAST_MIB, MOST_MIB),
        Durability::Scratch => LEAST_MIB,
    }
}

/// Bytes that this process may use: what the host has, or less if it is in a control group with a limit.
pub(super) fn available() -> u64 {
    let info = rustix::system::sysinfo();
    let host = info.totalram.saturating_mul(u64::from(info.mem_unit));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    limits(Path::new("/sys/fs/cgroup"), &groups).fold(host, u64::min)
}

/// Of these control groups (as /proc/self/cgroup has them, of both versions) and of all above them. Of a version 2 group without a
/// limit the file says `max`, of version 1 a number that no host has.
fn limits(root: &Path, groups: &str) -> impl Iterator<Item = u64> {
    let files = groups.lines().flat_map(|line| {
        let (top, path, file) = match line.splitn(3, ':').collect::<Vec<_>>()[..] {
            ["0", "", path] => (root.to_owned(), path, "memory.max"),
            [_, "memory", path] => (root.join("memory"), path, "memory.limit_in_bytes"),
            _ => return Vec::new(),
        };
        let own = top.join(path.trim_start_matches('/'));
        own.ancestors().take_while(|group| group.starts_with(&top)).map(|group| group.join(file)).collect()
    });
    let files: Vec<_> = files.collect();
    files.into_iter().filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eighth_within_bounds() {
        let durable = |mib: u64| buffers_mib(Durability::Durable, mib * MIB);
        assert_eq!([512, 2048, 24_576, 262_144].map(durable), [128, 256, 3072, 4096]);
        assert_eq!(buffers_mib(Durability::Scratch, 262_144 * MIB), 128);
        assert!(available() > 64 * MIB);
    }

    #[test]
    fn limits_of_control_groups_of_both_versions_are_found_up_to_the_top() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("memory.max", "7000\n");
        put("a/memory.max", "max\n");
        put("a/b/memory.max", "5000\n");
        put("memory/memory.limit_in_bytes", "9223372036854771712\n");
        put("memory/c/memory.limit_in_bytes", "3000\n");
        let found = |groups: &str| limits(root.path(), groups).collect::<Vec<_>>();
        assert_eq!(found("0::/a/b\n"), [5000, 7000]);
        assert_eq!(found("4:memory:/c/not/seen/from/here\n1:cpu:/a\n0::/\n"), [3000, 9_223_372_036_854_771_712, 7000]);
        assert_eq!(found("no such thing\n"), [0; 0]);
    }
}
