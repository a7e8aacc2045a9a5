//! Logs to standard error. Levels: error = somebody must act, warn = degraded, info = state changes, debug = decisions.

use anyhow::Context as _;
use tracing_subscriber::filter::{FilterExt as _, LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

/// They see frames and messages, which may hold a token or a key: never below info, whatever the filter says.
const LIBRARIES: [&str; 7] = ["h2", "hyper", "hyper_util", "rustls", "tokio_rustls", "tonic", "tower"];

/// Reads CVAULT_LOG (a filter such as `info` or `cvault_node_agent=debug`) and CVAULT_LOG_FORMAT (`text` or `json`).
pub(crate) fn init() -> anyhow::Result<()> {
    let filter = std::env::var("CVAULT_LOG").unwrap_or_else(|_| "info".to_owned());
    let filter: EnvFilter = filter.parse().context("CVAULT_LOG is not a log filter: try `info`")?;
    let logs = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let logs = match std::env::var("CVAULT_LOG_FORMAT").as_deref() {
        Err(_) | Ok("text") => logs.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed(),
        Ok("json") => logs.json().boxed(),
        Ok(_) => anyhow::bail!("CVAULT_LOG_FORMAT must be `text` or `json`"),
    };
    tracing_subscriber::registry().with(logs.with_filter(filter.and(floor()))).init();
    Ok(())
}

/// What is never logged, whatever the filter says.
fn floor() -> Targets {
    Targets::new().with_default(LevelFilter::TRACE).with_targets(LIBRARIES.map(|library| (library, LevelFilter::INFO)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn no_filter_opens_the_libraries_that_see_secrets() {
        let written = Written::default();
        let writer = written.clone();
        let filter: EnvFilter = "trace,h2::codec=trace".parse().unwrap();
        let logs =
            tracing_subscriber::fmt::layer().with_writer(move || writer.clone()).with_filter(filter.and(floor()));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(logs), || {
            tracing::trace!(target: "h2::codec::framed_read", "a frame");
            tracing::trace!(target: "cvault_node_agent", "our own");
            tracing::info!(target: "tonic::transport", "a connection");
        });
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        assert!(text.contains("our own") && text.contains("a connection"), "{text}");
        assert!(!text.contains("a frame"), "{text}");
    }
}
