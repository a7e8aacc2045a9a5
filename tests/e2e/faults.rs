//! Every process is killed while traffic runs. What should go on goes on, nothing is billed twice, state converges.

use anyhow::{Result, bail, ensure};
use cvault_tests::lab::{HTTP_V4, eventually};
use cvault_tests::platform::{Client, ControlOptions, Platform, Server, Tenant, Usage, User};

const ECHOES: u64 = 200;
const SIZE: u64 = 1000;
/// Counted is what was written, right after: when a process is killed, each of its workers (two at most) may have written or
/// sent an echo that is not counted yet.
const UNCOUNTED_BYTES: u64 = 2 * PING_BYTES;
/// Of the pings that are under way then.
const PING_BYTES: u64 = 84;

struct Scene {
    tenant: Tenant,
    user: User,
    client: Client,
    platform: Platform,
}

struct Party {
    tenant: Tenant,
    user: User,
    client: Client,
    server: Server,
}

/// One tenant, one user, one connected client.
fn scene() -> Result<(Scene, Server)> {
    let platform = Platform::start(ControlOptions::default())?;
    let Party { tenant, user, client, server } = party(&platform).inspect_err(|_| platform.lab.print_logs())?;
    Ok((Scene { tenant, user, client, platform }, server))
}

fn party(platform: &Platform) -> Result<Party> {
    let server = platform.server(1)?;
    let tenant = platform.tenant("Acme")?;
    let user = platform.user(&tenant, "ada@example.com")?;
    let device = platform.device(&user, "laptop")?;
    let client = platform.client(1)?;
    client.up(&device.config)?;
    client.echo(HTTP_V4, ECHOES, SIZE)?;
    Ok(Party { tenant, user, client, server })
}

impl Scene {
    /// Breaks something while echoes run, mends it, and demands that no echo was lost.
    fn without_a_lost_packet(&self, what: &str, broken: impl FnOnce() -> Result<()>) -> Result<()> {
        let pings = self.client.start_pings(HTTP_V4)?;
        pings.wait_for(25)?;
        broken()?;
        pings.wait_for(25)?;
        let count = pings.stop(self.client.machine())?;
        if count.lost() > 0 {
            bail!("{what}: {} of {} echoes lost", count.lost(), count.sent);
        }
        Ok(())
    }

    /// New desired state reaches the server: registration, activation, deletion.
    fn converges(&self, server: &Server, name: &str) -> Result<()> {
        let device = eventually("a device can be activated again", 60, || {
            let device = self.platform.device(&self.user, name)?;
            if device.body["status"] == "active" { Ok(device) } else { bail!("{} is {}", name, device.body["status"]) }
        })?;
        let with = server.peers()?.len();
        let deleted = self.platform.http.send(&self.user.delete_device_request(&device))?;
        if deleted.status != 204 {
            bail!("deletion answered {}", deleted.text());
        }
        eventually("the peer is removed again", 20, || {
            if server.peers()?.len() < with { Ok(()) } else { bail!("still there") }
        })
    }

    /// The bill equals the client's and the server's kernels' counts to the byte.
    fn bill_is_exact(&self, server: &Server) -> Result<()> {
        self.client.silence()?;
        let (ours, theirs) = (self.client.counters()?, server.counters()?);
        let exact = |billed: Usage| {
            ensure!(billed.tx == ours.rx_bytes, "billed {billed:?}, client counted {ours:?}");
            ensure!(
                billed.rx == theirs.rx_bytes && billed.rx <= ours.tx_bytes,
                "billed {billed:?}, server counted {theirs:?}"
            );
            Ok(())
        };
        self.platform.bill_where(&self.tenant, exact).map(drop)
    }
}

#[test]
fn tunnels_go_on_to_the_last_packet_while_agent_control_plane_and_postgresql_are_killed() {
    let (scene, mut server) = scene().unwrap();
    scene
        .without_a_lost_packet("agent restarted", || {
            server.stop_agent()?;
            scene.client.echo(HTTP_V4, ECHOES, SIZE)?;
            server.start_agent()?;
            scene.converges(&server, "after the new agent")
        })
        .unwrap();
    scene
        .without_a_lost_packet("agent killed", || {
            server.kill_agent()?;
            scene.client.echo(HTTP_V4, ECHOES, SIZE)?;
            server.start_agent()?;
            scene.converges(&server, "after the agent")
        })
        .unwrap();
    scene
        .without_a_lost_packet("control plane killed", || {
            scene.platform.control.kill()?;
            scene.client.echo(HTTP_V4, ECHOES, SIZE)?;
            scene.platform.control.restart(&scene.platform.http)?;
            scene.converges(&server, "after the control plane")
        })
        .unwrap();
    scene
        .without_a_lost_packet("PostgreSQL killed", || {
            scene.platform.control.kill_postgres()?;
            scene.client.echo(HTTP_V4, ECHOES, SIZE)?;
            scene.converges(&server, "after PostgreSQL")
        })
        .unwrap();
    scene.bill_is_exact(&server).unwrap();
    assert_eq!(scene.platform.control.admin(["verify-ledger"]).unwrap()["mismatches"], 0);
    scene.platform.check_logs_hold_no_secret().unwrap();
}

#[test]
fn a_killed_tunnel_process_comes_back_and_bills_at_most_an_echo_for_each_worker_too_little() {
    let (scene, server) = scene().unwrap();
    let pings = scene.client.start_pings(HTTP_V4).unwrap();
    pings.wait_for(25).unwrap();
    let killed = server.tunnel_pid().unwrap();
    server.kill_tunnel().unwrap();
    pings.wait_for(50).unwrap();
    assert_ne!(server.tunnel_pid().unwrap(), killed);
    let count = pings.stop(scene.client.machine()).unwrap();
    println!("a tunnel killed beside its agent: {} echoes lost, one each 20 ms", count.lost());
    assert!(count.lost() < 500, "the tunnel was away for more than ten seconds: {count:?}");

    scene.converges(&server, "after the tunnel").unwrap();
    scene.client.echo(HTTP_V4, ECHOES, SIZE).unwrap();
    scene.client.silence().unwrap();
    let (ours, theirs) = (scene.client.counters().unwrap(), server.counters().unwrap());
    let right = |billed: Usage| {
        let (least_rx, least_tx) = (theirs.rx_bytes - UNCOUNTED_BYTES, ours.rx_bytes - UNCOUNTED_BYTES);
        ensure!((least_rx..=theirs.rx_bytes).contains(&billed.rx), "billed {billed:?}, server counted {theirs:?}");
        ensure!((least_tx..=theirs.tx_bytes).contains(&billed.tx), "billed {billed:?}, client counted {ours:?}");
        Ok(())
    };
    scene.platform.bill_where(&scene.tenant, right).unwrap();
    scene.platform.check_logs_hold_no_secret().unwrap();
}

#[test]
fn a_server_that_reboots_while_the_control_plane_is_down_serves_again_by_itself() {
    let (scene, server) = scene().unwrap();
    let carried = server.counters().unwrap().rx_bytes;
    let all = |billed: Usage| {
        ensure!(billed.rx == carried, "billed {billed:?}, carried {carried}");
        Ok(())
    };
    scene.platform.bill_where(&scene.tenant, all).unwrap();
    scene.platform.control.kill().unwrap();
    let server = server.reboot(&scene.platform.lab).unwrap();
    eventually("the client's traffic passes again", 60, || {
        if scene.client.pings(HTTP_V4) { Ok(()) } else { bail!("no echo") }
    })
    .unwrap();
    scene.client.echo(HTTP_V4, ECHOES, SIZE).unwrap();

    scene.platform.control.restart(&scene.platform.http).unwrap();
    scene.converges(&server, "after the reboot").unwrap();
    scene.client.silence().unwrap();
    let since = server.counters().unwrap().rx_bytes;
    let once = |billed: Usage| {
        ensure!(
            billed.rx == carried + since,
            "billed {billed:?}, carried {carried} before the reboot and {since} after it"
        );
        Ok(())
    };
    scene.platform.bill_where(&scene.tenant, once).unwrap();
    scene.platform.check_logs_hold_no_secret().unwrap();
}
