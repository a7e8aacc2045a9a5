//! The cluster's configuration files, written before each start.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use super::Durability;
use super::binaries::Account;

/// The superuser of the cluster; only for creating the roles and the database.
pub(super) const SUPERUSER: &str = "postgres";
/// The roles that may be connected as; `cvault_fn` may not.
const ROLES: [&str; 4] = [SUPERUSER, "cvault_owner", "cvault_app", "cvault_sys"];

/// Peer authentication for `us` alone, and no address to connect to.
pub(super) fn write(
    data: &Path,
    sockets: &Path,
    us: &Account,
    them: &Account,
    durability: Durability,
) -> io::Result<()> {
    let ident: String = ROLES.iter().map(|role| format!("cvault \"{}\" {role}\n", us.name)).collect();
    put(&data.join("pg_ident.conf"), &ident, them)?;
    put(&data.join("pg_hba.conf"), "local all all peer map=cvault\n", them)?;
    put(&data.join("postgresql.auto.conf"), "", them)?;
    put(&data.join("postgresql.conf"), &settings(sockets, durability), them)
}

fn settings(sockets: &Path, durability: Durability) -> String {
    let sockets = sockets.display().to_string().replace('\'', "''");
    let durable = match durability {
        Durability::Durable => "fsync = on\nsynchronous_commit = on\nfull_page_writes = on\n",
        Durability::Scratch => "fsync = off\nsynchronous_commit = off\nfull_page_writes = off\nautovacuum = off\n",
    };
    format!(
        "listen_addresses = ''\n\
         unix_socket_directories = '{sockets}'\n\
         unix_socket_permissions = 0777\n\
         max_connections = 200\n\
         shared_buffers = 128MB\n\
         timezone = 'UTC'\nlog_timezone = 'UTC'\n\
         # a log that never holds a value: statements carry signed tenant contexts\n\
         log_statement = none\nlog_min_duration_statement = -1\n\
         log_min_error_statement = panic\nlog_parameter_max_length = 0\nlog_parameter_max_length_on_error = 0\n\
         log_error_verbosity = terse\n\
         {durable}"
    )
}

fn put(path: &Path, text: &str, owner: &Account) -> io::Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    chown(path, Some(owner.uid), Some(owner.gid))
}
