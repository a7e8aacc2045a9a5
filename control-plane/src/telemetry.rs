//! Logging to stderr: JSON lines by default, text for people.
//!
//! `CVAULT_LOG` is the level of our own lines. Libraries stay at `warn`: at `trace` they would log headers and statements,
//! and a secret must not reach a log at any level.

use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat};

/// Starts logging. A second call changes nothing.
pub fn start(config: LogConfig) {
    let filter = EnvFilter::new(format!("warn,cvault_control_plane={}", config.level));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match config.format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).try_init(),
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
    };
    if started.is_err() {
        tracing::debug!("logging had been started before");
    }
}
