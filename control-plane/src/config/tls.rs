//! TLS of the public API: CVAULT_TLS_*.

use std::path::PathBuf;

use super::Reader;
use crate::http::tls::{self, Files};

impl Reader<'_> {
    /// The files are read here once, so that a wrong one is named with all other faults.
    pub(super) fn tls(&mut self) -> Option<Files> {
        let path = |name: &str| (self.lookup)(name).map(PathBuf::from);
        let files = match (path("CVAULT_TLS_CERT_FILE"), path("CVAULT_TLS_KEY_FILE")) {
            (None, None) => return None,
            (Some(certificate), Some(key)) => Files { certificate, key },
            (Some(_), None) | (None, Some(_)) => {
                self.fault("CVAULT_TLS_CERT_FILE and CVAULT_TLS_KEY_FILE go together; set both or none.");
                return None;
            }
        };
        if let Err(error) = tls::load(&files) {
            self.fault(format!("CVAULT_TLS_CERT_FILE, CVAULT_TLS_KEY_FILE: {error}."));
            return None;
        }
        if (self.lookup)("CVAULT_PUBLIC_URL").is_some_and(|url| url.starts_with("http://")) {
            self.fault("CVAULT_PUBLIC_URL begins with http://, but the API speaks TLS; write https://.");
        }
        Some(files)
    }
}
