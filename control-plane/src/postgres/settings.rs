//! The cluster's configuration files, written before each start.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::path::Path;

use super::binaries::Account;
use super::{Durability, memory};

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
    let buffers = memory::buffers_mib(durability, memory::available());
    put(&data.join("postgresql.conf"), &settings(sockets, durability, buffers), them)
}

fn settings(sockets: &Path, durability: Durability, buffers_mib: u64) -> String {
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
         shared_buffers = {buffers_mib}MB\n\
         update_process_title = off\n\
         timezone = 'UTC'\nlog_timezone = 'UTC'\n\
         # a log that never holds a value: statements carry signed tenant contexts\n\
         log_statement = none\nlog_min_duration_statement = -1\n\
         log_min_error_statement = panic\nlog_parameter_max_length = 0\nlog_parameter_max_length_on_error = 0\n\
         log_error_verbosity = terse\n\
         {durable}"
    )
}

/// The folder is another user's, who may have put links there: written as a new file, given away by its descriptor, and
/// renamed into its place.
fn put(path: &Path, text: &str, owner: &Account) -> io::Result<()> {
    let beside = path.with_extension("conf.new");
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    // O_EXCL follows no link
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    file.write_all(text.as_bytes())?;
    fchown(&file, Some(owner.uid), Some(owner.gid))?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::super::binaries;
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    #[test]
    fn a_link_in_the_data_folder_is_replaced_and_what_it_names_is_left_alone() {
        let (data, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let victim = elsewhere.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        let before = fs::metadata(&victim).unwrap();
        for name in ["pg_hba.conf", "pg_hba.conf.new"] {
            symlink(&victim, data.path().join(name)).unwrap();
        }
        let us = binaries::current().unwrap();
        let them = binaries::unprivileged(&us).unwrap();
        write(data.path(), Path::new("/run"), &us, &them, Durability::Durable).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        let buffers = memory::buffers_mib(Durability::Durable, memory::available());
        let conf = fs::read_to_string(data.path().join("postgresql.conf")).unwrap();
        assert!(conf.contains(&format!("\nshared_buffers = {buffers}MB\n")), "{conf}");
        let after = fs::metadata(&victim).unwrap();
        assert_eq!((after.uid(), after.mode()), (before.uid(), before.mode()));
        let written = fs::symlink_metadata(data.path().join("pg_hba.conf")).unwrap();
        assert!(written.is_file() && written.uid() == them.uid && written.mode() & 0o777 == 0o600);
    }
}
