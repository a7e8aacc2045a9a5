//! TLS of the public API: one certificate from two files, read again when they change or on SIGHUP.
//!
//! TLS 1.3 and 1.2 with the suites of rustls, HTTP/2 or 1.1 by ALPN. A file that cannot be used changes nothing: the last
//! good certificate stays. Deliberately absent: client certificates (the gateway of the servers has its own listener) and
//! ACME (whoever renews the certificate writes the files).

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256};
use tokio::signal::unix::{SignalKind, signal};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

/// How often the files are looked at; a renewed certificate is there weeks before the old one ends.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Where certificate (with its chain) and key lie, PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{} cannot be read ({source})", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("others than its owner may open {}; run `chmod 600` on it", path.display())]
    Exposed { path: PathBuf },
    #[error("{} holds no certificate in PEM", path.display())]
    NoCertificate { path: PathBuf },
    #[error("{} holds no private key in PEM", path.display())]
    NoKey { path: PathBuf },
    #[error("certificate and key cannot be used together ({0})")]
    Unusable(#[from] rustls::Error),
}

/// What new connections are served with. Cheap to clone.
#[derive(Clone)]
pub struct Tls(Arc<RwLock<Loaded>>);

/// A certificate that can be used, and what its files held.
pub struct Loaded {
    config: Arc<ServerConfig>,
    digest: [u8; 32],
}

/// Reads both files.
///
/// # Errors
/// Which file is at fault, and how.
pub fn load(files: &Files) -> Result<Loaded, TlsError> {
    let (certificate, key) = read(files)?;
    let digest = digest(&certificate, &key);
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&certificate)
        .collect::<Result<_, _>>()
        .ok()
        .filter(|chain: &Vec<_>| !chain.is_empty())
        .ok_or_else(|| TlsError::NoCertificate { path: files.certificate.clone() })?;
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|_| TlsError::NoKey { path: files.key.clone() })?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Loaded { config: Arc::new(config), digest })
}

fn read(files: &Files) -> Result<(Vec<u8>, Zeroizing<Vec<u8>>), TlsError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| TlsError::Read { path, source }
    };
    let certificate = std::fs::read(&files.certificate).map_err(failed(&files.certificate))?;
    let mut file = File::open(&files.key).map_err(failed(&files.key))?;
    if file.metadata().map_err(failed(&files.key))?.mode() & 0o077 != 0 {
        return Err(TlsError::Exposed { path: files.key.clone() });
    }
    let mut key = Zeroizing::new(Vec::new());
    file.read_to_end(&mut key).map_err(failed(&files.key))?;
    Ok((certificate, key))
}

fn digest(certificate: &[u8], key: &[u8]) -> [u8; 32] {
    Sha256::new()
        .chain_update((certificate.len() as u64).to_le_bytes())
        .chain_update(certificate)
        .chain_update(key)
        .finalize()
        .into()
}

impl Tls {
    #[must_use]
    pub fn new(loaded: Loaded) -> Self {
        Self(Arc::new(RwLock::new(loaded)))
    }

    /// For a connection that begins now.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        let loaded = self.0.read().unwrap_or_else(PoisonError::into_inner);
        TlsAcceptor::from(Arc::clone(&loaded.config))
    }

    /// Takes what the files hold now; `false` when that is what is used already.
    ///
    /// # Errors
    /// Why the files cannot be used; then the last good certificate stays.
    pub fn reload(&self, files: &Files) -> Result<bool, TlsError> {
        let (certificate, key) = read(files)?;
        let same = self.0.read().unwrap_or_else(PoisonError::into_inner).digest == digest(&certificate, &key);
        if same {
            return Ok(false);
        }
        let loaded = load(files)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        Ok(true)
    }

    /// Follows the files until `shutdown`. A fault is told once, until it changes.
    pub async fn follow(self, files: Files, shutdown: CancellationToken) {
        let mut hangup = match signal(SignalKind::hangup()) {
            Ok(hangup) => hangup,
            Err(error) => {
                tracing::warn!(%error, "SIGHUP cannot be listened to; a restart reads a new certificate");
                return;
            }
        };
        let mut looks = tokio::time::interval(LOOK_EVERY);
        let mut told = None;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = looks.tick() => {}
                _ = hangup.recv() => told = None,
            }
            let (tls, paths) = (self.clone(), files.clone());
            // reading files blocks
            let outcome =
                tokio::task::spawn_blocking(move || tls.reload(&paths).map_err(|error| error.to_string())).await;
            match outcome {
                Ok(Ok(changed)) => {
                    told = None;
                    if changed {
                        tracing::info!("the certificate of the API was read again");
                    }
                }
                Ok(Err(fault)) if told.as_ref() != Some(&fault) => {
                    tracing::error!(fault, "the certificate of the API cannot be read again; the last one stays");
                    told = Some(fault);
                }
                Ok(Err(_)) | Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use rcgen::{CertifiedKey, generate_simple_self_signed};

    use super::*;

    pub(in crate::http) fn written(directory: &Path) -> Files {
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let files = Files { certificate: directory.join("cert.pem"), key: directory.join("key.pem") };
        fs::write(&files.certificate, cert.pem()).unwrap();
        fs::write(&files.key, signing_key.serialize_pem()).unwrap();
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600)).unwrap();
        files
    }

    #[test]
    fn a_new_certificate_is_taken_and_a_half_written_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let files = written(directory.path());
        let tls = Tls::new(load(&files).unwrap());
        let used = || tls.0.read().unwrap().digest;
        let first = used();
        assert!(!tls.reload(&files).unwrap());
        let good = fs::read(&files.certificate).unwrap();
        for bad in
            [&b""[..], &good[..good.len() / 2], b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
        {
            fs::write(&files.certificate, bad).unwrap();
            assert!(tls.reload(&files).is_err());
            assert_eq!(used(), first);
        }
        // a certificate whose key has not been written yet
        let other = tempfile::tempdir().unwrap();
        let next = written(other.path());
        fs::copy(&next.certificate, &files.certificate).unwrap();
        assert!(matches!(tls.reload(&files), Err(TlsError::Unusable(_))));
        fs::copy(&next.key, &files.key).unwrap();
        assert!(tls.reload(&files).unwrap());
        assert_ne!(used(), first);
    }

    #[test]
    fn a_key_that_others_may_read_and_files_that_are_something_else_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let files = written(directory.path());
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(load(&files), Err(TlsError::Exposed { .. })));
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600)).unwrap();
        let swapped = Files { certificate: files.certificate.clone(), key: files.certificate.clone() };
        fs::set_permissions(&files.certificate, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(load(&swapped), Err(TlsError::NoKey { .. })));
        let missing = Files { certificate: directory.path().join("none"), ..files };
        assert!(matches!(load(&missing), Err(TlsError::Read { .. })));
    }
}
