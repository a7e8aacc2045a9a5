//! Figures to look at, not yet targets: activation, registrations, metering.

use anyhow::Result;
use cvault_tests::bench::Row;
use cvault_tests::platform::{ControlOptions, Platform, figures};

use crate::show::{Show, thousands, took};
use crate::with_logs;

const AT_ONCE: usize = 16;
const BILLED_BYTES: u64 = 20 * 1024 * 1024;

pub(crate) fn run(show: &mut Show, devices: usize) -> Result<()> {
    show.title("CVault: figures", "One lab, one server, everything on this computer; debug or release as built.");
    let platform = show.step("Start a lab with a control plane", |_| start())?;
    let done = measure(show, &platform, devices);
    with_logs(&platform, done)
}

/// The same for scripts. There is nothing to compare with and nothing is demanded yet.
pub(crate) fn lines(devices: usize) -> Result<String> {
    let platform = start()?;
    let rows = with_logs(&platform, rows(&platform, devices))?;
    Ok(rows.iter().map(|row| format!("{}\n", row.to_json())).collect())
}

fn rows(platform: &Platform, devices: usize) -> Result<Vec<Row>> {
    let server = platform.server(1)?;
    let activation = figures::activation(platform, devices)?;
    let registrations = figures::registrations(platform, devices, AT_ONCE)?;
    let figures::Metering { up, account } = figures::metering(platform, &server, BILLED_BYTES)?;
    let milliseconds = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    #[expect(clippy::cast_precision_loss, reason = "a difference of some packets")]
    let apart = |one: u64, other: u64| one.abs_diff(other) as f64;
    Ok(vec![
        Row::figure("activation_p50", "ms", milliseconds(activation.p50)),
        Row::figure("activation_p99", "ms", milliseconds(activation.p99)),
        Row::figure("registrations", "per s", registrations),
        Row::figure("first_handshake", "ms", milliseconds(up.handshake)),
        Row::figure("billed_from_device_apart", "bytes", apart(account.billed.rx, account.client.tx_bytes)),
        Row::figure("billed_to_device_apart", "bytes", apart(account.billed.tx, account.server.tx_bytes)),
    ])
}

fn start() -> Result<Platform> {
    Platform::start(ControlOptions { log: "warn".to_owned(), ..ControlOptions::default() })
}

fn measure(show: &mut Show, platform: &Platform, devices: usize) -> Result<()> {
    let server = platform.server(1)?;
    show.step(&format!("Activate {devices} devices, one after the other"), |show| {
        let activation = figures::activation(platform, devices)?;
        show.fact("activation p50 / p99", &format!("{} / {}", took(activation.p50), took(activation.p99)));
        Ok(())
    })?;
    show.step(&format!("Register {devices} devices, {AT_ONCE} at a time, without waiting for their server"), |show| {
        let rate = figures::registrations(platform, devices, AT_ONCE)?;
        show.fact("registrations", &format!("{rate:.0} per second"));
        Ok(())
    })?;
    show.step("Bill 20 MiB each way", |show| {
        let figures::Metering { up, account } = figures::metering(platform, &server, BILLED_BYTES)?;
        show.fact("first handshake", &format!("{}  (wg-quick itself {})", took(up.handshake), took(up.wg_quick)));
        show.line(&format!("{:<34}{:>16}{:>16}", "bytes of IP packets", "from device", "to device"));
        show.line(&format!("{:<34}{:>16}{:>16}", "billed", thousands(account.billed.rx), thousands(account.billed.tx)));
        show.line(&format!(
            "{:<34}{:>16}{:>16}",
            "counted by the client's kernel",
            thousands(account.client.tx_bytes),
            thousands(account.client.rx_bytes)
        ));
        show.line(&format!(
            "{:<34}{:>16}{:>16}",
            "counted by the server's kernel",
            thousands(account.server.rx_bytes),
            thousands(account.server.tx_bytes)
        ));
        Ok(())
    })
}
