//! CVault as its users meet it: control plane, server agents, HTTP calls, and clients with Debian's WireGuard.

mod account;
mod client;
mod control;
pub mod figures;
mod http;
mod server;

use anyhow::{Result, ensure};

use crate::lab::Lab;

pub use account::{Admin, Device, Tenant, Usage, User};
pub use client::{Client, Counters, PingCount, Pings, Up, dropped, uapi};
pub use control::{Control, ControlOptions};
pub use http::{Answer, Http, Request};
pub use server::{Server, Tally};

struct Running {
    http: Http,
    admin: Admin,
    control: Control,
}

/// A lab with a control plane in it. Servers and clients are added as a test wants them.
pub struct Platform {
    pub http: Http,
    pub admin: Admin,
    pub control: Control,
    pub lab: Lab,
}

impl Platform {
    /// A lab, and a control plane that is ready.
    pub fn start(options: ControlOptions) -> Result<Self> {
        let lab = Lab::build()?;
        Self::start_in(lab, options)
    }

    pub fn start_in(lab: Lab, options: ControlOptions) -> Result<Self> {
        match Self::control_in(&lab, options) {
            Ok(Running { http, admin, control }) => Ok(Self { http, admin, control, lab }),
            Err(error) => {
                lab.print_logs();
                Err(error)
            }
        }
    }

    fn control_in(lab: &Lab, options: ControlOptions) -> Result<Running> {
        let control = Control::start(lab, options)?;
        let http = Http::enter(control.machine(), control::url())?;
        control.wait_until_ready(&http)?;
        control.remember_key(lab)?;
        let admin = Admin::new(lab, &control)?;
        Ok(Running { http, admin, control })
    }

    /// Fails when a log holds a secret, and when one of the logs that must be there is missing or empty. How many secrets there are.
    pub fn check_logs_hold_no_secret(&self) -> Result<usize> {
        let mut demanded = vec![self.lab.dir().join("control/control-plane.log")];
        for entry in std::fs::read_dir(self.lab.dir())? {
            let machine = entry?;
            if machine.file_name().to_string_lossy().starts_with("server") {
                demanded.extend(["node-agent.log", "state/tunnel.log"].map(|log| machine.path().join(log)));
            }
        }
        for log in demanded {
            let length = std::fs::metadata(&log).map_or(0, |found| found.len());
            ensure!(length > 0, "{} is missing or empty: nothing is known about it", log.display());
        }
        self.lab.check_logs_hold_no_secret()
    }

    /// Creates server `number` in the control plane, boots its machine, enrols and starts its agent.
    pub fn server(&self, number: u8) -> Result<Server> {
        Server::join(&self.lab, &self.control, number)
    }

    /// Boots client machine `number`.
    pub fn client(&self, number: u8) -> Result<Client> {
        Client::boot(&self.lab, number)
    }

    pub fn tenant(&self, name: &str) -> Result<Tenant> {
        self.admin.create_tenant(&self.lab, &self.http, name)
    }

    pub fn user(&self, tenant: &Tenant, email: &str) -> Result<User> {
        User::register(&self.lab, &self.http, tenant, email)
    }

    /// Registers a device and waits until its server runs it.
    pub fn device(&self, user: &User, name: &str) -> Result<Device> {
        Device::register(&self.lab, &self.http, user, name)
    }

    /// The state of a pool's address in the database, and of the peer that had it.
    pub fn address_state(&self, address: &str) -> Result<String> {
        self.control.sql(&format!(
            "select a.state || coalesce(', released ' || date_trunc('second', a.released_at)::text, '')
             from platform.addresses a join platform.address_pools p using (pool_id)
             where host(p.ipv4::inet + a.host) = '{address}'"
        ))
    }
}
