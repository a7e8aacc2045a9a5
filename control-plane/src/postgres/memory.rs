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
    let group = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    limits(&group).fold(host, u64::min)
}

/// Of this group and all above it (cgroups, version 2). One without a limit says `max`.
fn limits(group: &str) -> impl Iterator<Item = u64> {
    let own = group.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let files = Path::new("/sys/fs/cgroup").join(own);
    let files: Vec<_> =
        files.ancestors().take_while(|path| path.starts_with("/sys/fs/cgroup")).map(Path::to_owned).collect();
    files.into_iter().filter_map(|path| fs::read_to_string(path.join("memory.max")).ok()?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eighth_within_bounds() {
        let durable = |mib: u64| buffers_mib(Durability::Durable, mib * MIB);
        assert_eq!([512, 2048, 24_576, 262_144].map(durable), [128, 256, 3072, 4096]);
        assert_eq!(buffers_mib(Durability::Scratch, 262_144 * MIB), 128);
    }

    #[test]
    fn a_host_has_some_and_a_group_that_is_not_there_no_limit() {
        assert!(available() > 64 * MIB);
        assert_eq!(limits("0::/no/such/group\n").filter(|limit| *limit < 64 * MIB).count(), 0);
    }
}
