//! Requests at the same moment.

use std::collections::BTreeSet;

use cvault_tests::platform::{ControlOptions, Device, Platform};

const AT_ONCE: usize = 64;
const DEVICES_PER_USER: usize = 4;

#[test]
fn sixty_four_registrations_at_once_get_sixty_four_addresses() {
    let platform = Platform::start(ControlOptions::default()).unwrap();
    let server = platform.server(1).unwrap();
    let tenant = platform.tenant("Acme").unwrap();
    let users: Vec<_> = (0..AT_ONCE / DEVICES_PER_USER)
        .map(|number| platform.user(&tenant, &format!("user{number}@example.com")).unwrap())
        .collect();

    let devices: Vec<Device> = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..AT_ONCE)
            .map(|number| {
                let (platform, user) = (&platform, &users[number / DEVICES_PER_USER]);
                scope.spawn(move || platform.device(user, &format!("device {number}")).unwrap())
            })
            .collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });

    let addresses: BTreeSet<String> = devices.iter().flat_map(Device::addresses).collect();
    assert_eq!(addresses.len(), 2 * AT_ONCE, "one IPv4 and one IPv6 address each, none twice");
    assert!(devices.iter().all(|device| device.body["status"] == "active"));
    assert_eq!(server.peers().unwrap().len(), AT_ONCE);
    platform.check_logs_hold_no_secret().unwrap();
}

#[test]
fn a_user_cannot_exceed_the_device_limit_by_asking_at_once() {
    let platform = Platform::start(ControlOptions::default()).unwrap();
    let _server = platform.server(1).unwrap();
    let tenant = platform.tenant("Acme").unwrap();
    let user = platform.user(&tenant, "greedy@example.com").unwrap();
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..16)
            .map(|number| {
                let (platform, user) = (&platform, &user);
                scope.spawn(move || platform.http.send(&user.device_request(&format!("device {number}"))).unwrap())
            })
            .collect();
        calls
            .into_iter()
            .map(|call| {
                let answer = call.join().unwrap();
                if answer.status == 201 {
                    Device::from_answer(&platform.lab, &answer).unwrap();
                } else {
                    assert_eq!(answer.code(), "DEVICE_LIMIT_EXCEEDED", "{}", answer.text());
                }
                answer.status
            })
            .collect()
    });
    assert_eq!(statuses.iter().filter(|status| **status == 201).count(), 5);
    assert_eq!(statuses.iter().filter(|status| **status == 403).count(), 11);
    platform.check_logs_hold_no_secret().unwrap();
}
