//! What age does to a session that carries traffic. It takes minutes and hardly a processor: its name puts it in front of the rest,
//! beside which it waits.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use cvault_tests::lab::eventually;
use cvault_tests::platform::Pings;
use cvault_tests::tunnel::{Both, End, Outer, Program};

/// How old a session gets before the side that began it renews it.
const REKEY_AFTER: Duration = Duration::from_secs(120);

/// Both sides send all the time until each has seen another handshake.
struct Renewal<'a> {
    both: &'a Both,
    begun: [SystemTime; 2],
    pings: [Pings; 2],
}

impl<'a> Renewal<'a> {
    fn begin(both: &'a Both) -> Result<Self> {
        both.meet(Outer::V4)?;
        let (server, client) = (&both.server, &both.client);
        Ok(Self {
            both,
            begun: [shaken(server, client)?, shaken(client, server)?],
            pings: [Pings::start(&server.machine, "10.8.0.2")?, Pings::start(&client.machine, "fd00:cafe::1")?],
        })
    }

    fn finish(self) -> Result<()> {
        let ends = [&self.both.server, &self.both.client];
        for (own, other, begun) in [(ends[0], ends[1], self.begun[0]), (ends[1], ends[0], self.begun[1])] {
            let again = eventually("the session is renewed", 150, || {
                let now = shaken(own, other)?;
                ensure!(now != begun);
                Ok(now)
            })?;
            let age = again.duration_since(begun)?;
            // The two are told of it a little apart, and each time as its clock has it.
            ensure!(age > REKEY_AFTER - Duration::from_secs(1), "it was {age:?} old");
        }
        for (pings, end) in self.pings.into_iter().zip(ends) {
            pings.wait_for(50)?;
            let count = pings.stop(&end.machine)?;
            ensure!(count.lost() == 0, "of {} echoes {} were lost", count.sent, count.lost());
        }
        self.both.agree()
    }
}

fn shaken(own: &End, other: &End) -> Result<SystemTime> {
    own.tunnel.last_handshake(&own.machine, &other.keys)?.context("no handshake yet")
}

#[test]
fn after_two_minutes_of_traffic_either_renews_the_session_that_it_began_and_no_packet_is_lost() {
    let pairs = [(Program::Engine, Program::WireguardGo), (Program::WireguardGo, Program::Engine)];
    let pairs = pairs.map(|(server, client)| Both::start(server, client).unwrap());
    let renewals = pairs.each_ref().map(|both| Renewal::begin(both).unwrap());
    renewals.into_iter().for_each(|renewal| renewal.finish().unwrap());
}
