//! Figures to look at, not yet targets: activation, registrations, metering.

use anyhow::Result;
use cvault_tests::platform::{ControlOptions, Platform, figures};

use crate::show::{Show, thousands, took};
use crate::with_logs;

pub(crate) fn run(show: &mut Show, devices: usize) -> Result<()> {
    show.title("CVault: figures", "One lab, one server, everything on this computer; debug or release as built.");
    let platform = show.step("Start a lab with a control plane", |_| {
        Platform::start(ControlOptions { log: "warn".to_owned(), ..ControlOptions::default() })
    })?;
    let done = measure(show, &platform, devices);
    with_logs(&platform, done)
}

fn measure(show: &mut Show, platform: &Platform, devices: usize) -> Result<()> {
    let server = platform.server(1)?;
    show.step(&format!("Activate {devices} devices, one after the other"), |show| {
        let activation = figures::activation(platform, devices)?;
        show.fact("activation p50 / p99", &format!("{} / {}", took(activation.p50), took(activation.p99)));
        Ok(())
    })?;
    show.step(&format!("Register {devices} devices, 16 at a time, without waiting for their server"), |show| {
        let rate = figures::registrations(platform, devices, 16)?;
        show.fact("registrations", &format!("{rate:.0} per second"));
        Ok(())
    })?;
    show.step("Bill 20 MiB each way", |show| {
        let figures::Metering { up, account } = figures::metering(platform, &server, 20 * 1024 * 1024)?;
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
