//! Tenants, users, devices and usage, by the API's own calls.

use anyhow::{Context, Result, bail};
use reqwest::Method;
use serde_json::{Value, json};

use super::client::Counters;
use super::control::Control;
use super::http::{Answer, Http, Request};
use crate::lab::Lab;

/// The platform's administrator.
pub struct Admin {
    pub token: String,
}

#[derive(Clone, Debug)]
pub struct Tenant {
    pub id: String,
    pub api_key: String,
    pub api_secret: String,
}

#[derive(Clone, Debug)]
pub struct User {
    pub tenant: Tenant,
    pub id: String,
    pub email: String,
    pub password: String,
    pub access_token: String,
    pub refresh_token: String,
}

#[derive(Clone, Debug)]
pub struct Device {
    pub id: String,
    pub config: String,
    pub assigned_ip: String,
    pub body: Value,
}

/// Billed bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// From the device.
    pub rx: u64,
    /// To the device.
    pub tx: u64,
}

impl Usage {
    pub fn total(self) -> u64 {
        self.rx + self.tx
    }

    /// Fails unless the bill agrees with what both kernels counted.
    ///
    /// With the server's count (`Server::counters_on_wire`) to the byte. The client's kernel has also counted what never arrived: no more than it sent may be billed, and
    /// no less than it received.
    pub fn check_against(self, server: Counters, client: Counters) -> Result<()> {
        let agrees = self.rx == server.rx_bytes && self.tx == server.tx_bytes;
        if !agrees || self.rx > client.tx_bytes || self.tx < client.rx_bytes {
            bail!("billed {self:?}, counted by the server's kernel {server:?}, by the client's {client:?}");
        }
        Ok(())
    }

    /// Fails unless the bill is to the byte what the server's kernel counted, and what the client's kernel counted unless
    /// packets were lost between the two: then it received less than was sent to it, and sent more than arrived.
    pub fn equals(self, server: Counters, client: Counters) -> Result<()> {
        let equal = |arrived: u64, arrived_packets: u64, sent: u64, sent_packets: u64| {
            if arrived_packets == sent_packets {
                arrived == sent
            } else {
                arrived < sent && arrived_packets < sent_packets
            }
        };
        let agrees = server.rx_bytes == self.rx
            && server.tx_bytes == self.tx
            && equal(self.rx, server.rx_packets, client.tx_bytes, client.tx_packets)
            && equal(client.rx_bytes, client.rx_packets, self.tx, server.tx_packets);
        if !agrees {
            bail!("billed {self:?}, counted by the server's kernel {server:?}, by the client's {client:?}");
        }
        Ok(())
    }
}

impl std::ops::Sub for Usage {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self { rx: self.rx - before.rx, tx: self.tx - before.tx }
    }
}

impl Admin {
    pub(super) fn new(lab: &Lab, control: &Control) -> Result<Self> {
        let answer = control.admin(["token"])?;
        let token = text(&answer, "token")?;
        lab.secret("admin token", &token);
        Ok(Self { token })
    }

    pub fn create_tenant_request(&self, name: &str) -> Request {
        Request::post("/admin/tenants", &json!({ "name": name }))
            .header("Authorization", &format!("Bearer {}", self.token))
    }

    pub fn update_tenant_request(&self, tenant: &Tenant, changes: &Value) -> Request {
        Request::new(Method::PATCH, &format!("/admin/tenants/{}", tenant.id))
            .header("Authorization", &format!("Bearer {}", self.token))
            .header("Content-Type", "application/json")
            .raw_body(changes.to_string().into_bytes())
    }

    pub(super) fn create_tenant(&self, lab: &Lab, http: &Http, name: &str) -> Result<Tenant> {
        Tenant::from_answer(lab, &http.send(&self.create_tenant_request(name))?)
    }
}

impl Tenant {
    pub fn from_answer(lab: &Lab, answer: &Answer) -> Result<Self> {
        let body = answer.expect(201)?;
        let tenant =
            Self { id: text(&body, "id")?, api_key: text(&body, "api_key")?, api_secret: text(&body, "api_secret")? };
        lab.secret("API secret", &tenant.api_secret);
        Ok(tenant)
    }

    /// Adds the tenant's key and secret.
    pub fn sign(&self, request: Request) -> Request {
        request.header("X-API-Key", &self.api_key).header("X-API-Secret", &self.api_secret)
    }

    pub fn usage_request(&self) -> Request {
        self.sign(Request::get("/api/v1/usage"))
    }
}

impl User {
    pub fn register_request(tenant: &Tenant, email: &str, password: &str) -> Request {
        tenant.sign(Request::post("/api/v1/auth/register", &json!({ "email": email, "password": password })))
    }

    pub fn login_request(tenant: &Tenant, email: &str, password: &str) -> Request {
        tenant.sign(Request::post("/api/v1/auth/login", &json!({ "email": email, "password": password })))
    }

    pub(super) fn register(lab: &Lab, http: &Http, tenant: &Tenant, email: &str) -> Result<Self> {
        let password = format!("Correct-Horse-{email}-9");
        let answer = http.send(&Self::register_request(tenant, email, &password))?;
        Self::from_answer(lab, tenant, email, &password, &answer, 201)
    }

    /// A user from the answer of `register` (201) or `login` (200).
    pub fn from_answer(
        lab: &Lab,
        tenant: &Tenant,
        email: &str,
        password: &str,
        answer: &Answer,
        status: u16,
    ) -> Result<Self> {
        let body = answer.expect(status)?;
        let user = Self {
            tenant: tenant.clone(),
            id: text(&body, "user_id")?,
            email: email.to_owned(),
            password: password.to_owned(),
            access_token: text(&body, "access_token")?,
            refresh_token: text(&body, "refresh_token")?,
        };
        lab.secret("password", password);
        lab.secret("access token", &user.access_token);
        lab.secret("refresh token", &user.refresh_token);
        Ok(user)
    }

    /// Adds the tenant's key and the user's token.
    pub fn sign(&self, request: Request) -> Request {
        request
            .header("X-API-Key", &self.tenant.api_key)
            .header("Authorization", &format!("Bearer {}", self.access_token))
    }

    pub fn device_request(&self, name: &str) -> Request {
        self.sign(Request::post("/api/v1/devices?wait=active", &json!({ "device_name": name })))
    }

    pub fn connect_request(&self, device: &Device) -> Request {
        self.sign(Request::post("/api/v1/vpn/connect", &json!({ "device_id": device.id })))
    }

    pub fn disconnect_request(&self, device: &Device) -> Request {
        self.sign(Request::post("/api/v1/vpn/disconnect", &json!({ "device_id": device.id })))
    }

    pub fn status_request(&self) -> Request {
        self.sign(Request::get("/api/v1/vpn/status"))
    }

    pub fn get_request(&self, path: &str) -> Request {
        self.sign(Request::get(path))
    }

    pub fn delete_device_request(&self, device: &Device) -> Request {
        self.sign(Request::delete(&format!("/api/v1/devices/{}", device.id)))
    }
}

impl Device {
    pub(super) fn register(lab: &Lab, http: &Http, user: &User, name: &str) -> Result<Self> {
        Self::from_answer(lab, &http.send(&user.device_request(name))?)
    }

    pub fn from_answer(lab: &Lab, answer: &Answer) -> Result<Self> {
        let body = answer.expect(201)?;
        let device = Self {
            id: text(&body, "device_id")?,
            config: text(&body, "config")?,
            assigned_ip: text(&body, "assigned_ip")?.split('/').next().unwrap_or_default().to_owned(),
            body,
        };
        for line in device.config.lines() {
            if let Some((name, key)) = line.split_once('=')
                && ["PrivateKey", "PresharedKey"].contains(&name.trim())
            {
                lab.secret("device key", key.trim());
            }
        }
        Ok(device)
    }

    /// The device's two addresses, without prefix lengths, from its configuration.
    pub fn addresses(&self) -> Vec<String> {
        self.config
            .lines()
            .filter_map(|line| line.split_once('=').filter(|(name, _)| name.trim() == "Address"))
            .flat_map(|(_, value)| value.split(','))
            .map(|address| address.trim().split('/').next().unwrap_or_default().to_owned())
            .collect()
    }
}

impl Usage {
    /// The bytes of the current period, from the body of `GET /api/v1/usage`.
    pub fn from_body(body: &Value) -> Result<Self> {
        let period = &body["current_period"];
        let figure =
            |name: &str| period[name].as_u64().with_context(|| format!("no {name} in the current period {period}"));
        Ok(Self { rx: figure("rx_bytes")?, tx: figure("tx_bytes")? })
    }
}

fn text(body: &Value, name: &str) -> Result<String> {
    body[name].as_str().map(str::to_owned).with_context(|| format!("the answer has no {name}"))
}
