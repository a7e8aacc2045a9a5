//! Figures, printed with `--nocapture`; `cargo xtask bench` takes more of them. Only gross faults fail here.

use std::time::Duration;

use cvault_tests::platform::{ControlOptions, Platform, figures};

#[test]
fn activation_registration_and_metering_have_figures() {
    let platform = Platform::start(ControlOptions { log: "info".to_owned(), ..ControlOptions::default() }).unwrap();
    let server = platform.server(1).unwrap();
    let activation = figures::activation(&platform, 24).unwrap();
    let rate = figures::registrations(&platform, 24, 8).unwrap();
    let account = figures::metering(&platform, &server, 5 * 1024 * 1024).unwrap();
    println!("{activation:?}, {rate:.0} registrations/s, {account:?}");
    assert!(activation.p50 < Duration::from_secs(1), "{activation:?}");
    assert!(rate > 5.0, "{rate} registrations/s");
    account.billed.check_against(account.server, account.client).unwrap();
}
