//! Figures, printed with `--nocapture`; `cargo xtask bench` takes more of them. Only gross faults fail here.

use std::time::Duration;

use cvault_tests::platform::{ControlOptions, Platform, figures};

const LOAD: u64 = 2 * 1024 * 1024;

#[test]
fn activation_registration_and_metering_have_figures() {
    let platform = Platform::start(ControlOptions { log: "info".to_owned(), ..ControlOptions::default() }).unwrap();
    let server = platform.server(1).unwrap();
    let activation = figures::activation(&platform, 24).unwrap();
    let rate = figures::registrations(&platform, 24, 8).unwrap();
    let metering = figures::metering(&platform, &server, 5 * 1024 * 1024).unwrap();
    println!("{activation:?}, {rate:.0} registrations/s, {metering:?}");
    assert!(activation.p50 < Duration::from_secs(1), "{activation:?}");
    assert!(rate > 5.0, "{rate} registrations/s");
    let account = metering.account;
    account.billed.check_against(account.server, account.client).unwrap();
}

#[test]
fn slow_tcp_is_billed_to_the_byte_as_both_kernels_counted_it() {
    let platform = Platform::start(ControlOptions::default()).unwrap();
    let server = platform.server(1).unwrap();
    let tenant = platform.tenant("Acme").unwrap();
    let user = platform.user(&tenant, "ada@example.com").unwrap();
    let device = platform.device(&user, "laptop").unwrap();
    let client = platform.client(1).unwrap();
    client.up(&device.config).unwrap();
    let account = figures::exact(&platform, &server, &client, &tenant, LOAD).unwrap();
    assert!(account.billed.rx > LOAD && account.billed.tx > LOAD, "{account:?}");
    account.billed.equals(account.server, account.client).unwrap();
}
