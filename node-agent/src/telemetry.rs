//! Logs to standard error. Levels: error = somebody must act, warn = degraded, info = state changes, debug = decisions.

use anyhow::Context as _;
use tracing_subscriber::EnvFilter;

/// They see frames and messages, which may hold a token or a key: never below info, whatever the filter says.
const LIBRARIES: [&str; 6] = ["h2", "hyper", "hyper_util", "rustls", "tonic", "tower"];

/// Reads CVAULT_LOG (a filter such as `info` or `cvault_node_agent=debug`) and CVAULT_LOG_FORMAT (`text` or `json`).
pub(crate) fn init() -> anyhow::Result<()> {
    let filter = std::env::var("CVAULT_LOG").unwrap_or_else(|_| "info".to_owned());
    let mut filter: EnvFilter = filter.parse().context("CVAULT_LOG is not a log filter: try `info`")?;
    for library in LIBRARIES {
        filter = filter.add_directive(format!("{library}=info").parse().expect("the constants are directives"));
    }
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match std::env::var("CVAULT_LOG_FORMAT").as_deref() {
        Err(_) | Ok("text") => logs.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        Ok("json") => logs.json().init(),
        Ok(_) => anyhow::bail!("CVAULT_LOG_FORMAT must be `text` or `json`"),
    }
    Ok(())
}
