//! What a tenant decides for itself, in the portal. Its limits and its status are the platform's.

use std::net::IpAddr;

use cvault_types::TenantId;
use cvault_types::settings::{TenantLimits, TenantSettings, UpdateSettings};
use ipnet::IpNet;
use serde_json::json;
use time::OffsetDateTime;

use super::{Actor, ClientSettings, GB, Settings, TenantError, note, object, parse_status};
use crate::db::DbError;
use crate::http::Problem;
use crate::tenancy::TenantTx;

const MAX_ORIGINS: usize = 100;
const MAX_DNS: usize = 4;
/// A file with more is longer than a QR code can hold.
const MAX_ALLOWED_IPS: usize = 32;
const ORIGIN_FORM: &str = "must be a scheme, a host, and a port if it is not the usual one, as https://app.example.com";

/// What is to change, checked; `None` stays.
#[derive(Debug, Clone)]
pub struct SettingsChange {
    name: Option<String>,
    whitelabel_config: Option<serde_json::Map<String, serde_json::Value>>,
    public_clients: Option<bool>,
    allowed_origins: Option<Vec<String>>,
    dns: Option<Option<Vec<IpNet>>>,
    allowed_ips: Option<Option<Vec<IpNet>>>,
    mtu: Option<Option<u16>>,
}

impl SettingsChange {
    /// # Errors
    /// All faults at once.
    pub fn parse(request: UpdateSettings) -> Result<Self, Problem> {
        let mut faults = Faults(Problem::validation());
        let named = request.name.is_some();
        let branded = request.whitelabel_config.is_some();
        let mut settings = Settings::named(request.name.unwrap_or_else(|| "unchanged".to_owned()));
        settings.whitelabel_config = request.whitelabel_config.unwrap_or_default();
        let settings = faults.of(settings.checked());
        let allowed_origins = request.allowed_origins.map(|texts| {
            let mut origins = faults.list("/allowed_origins", &texts, 0..=MAX_ORIGINS, ORIGIN_FORM, origin);
            origins.sort();
            origins.dedup();
            origins
        });
        let dns = request.client_dns.map(|texts| {
            texts.map(|texts| {
                let form = "must be an IPv4 or IPv6 address";
                faults
                    .list("/client_dns", &texts, 1..=MAX_DNS, form, |text| text.parse::<IpAddr>().ok().map(IpNet::from))
            })
        });
        let allowed_ips = request.client_allowed_ips.map(|texts| {
            texts.map(|texts| {
                let form = "must be a network, as 10.0.0.0/8 or fd00::/8, or an address";
                faults.list("/client_allowed_ips", &texts, 1..=MAX_ALLOWED_IPS, form, network)
            })
        });
        if request.client_mtu.flatten().is_some_and(|mtu| !(1280..=1500).contains(&mtu)) {
            faults.add("/client_mtu", "out_of_range", "must be from 1280 to 1500");
        }
        let (name, whitelabel_config) = settings.map(|all| (all.name, all.whitelabel_config)).unzip();
        faults.0.or_ok(Self {
            name: name.filter(|_| named),
            whitelabel_config: whitelabel_config.filter(|_| branded),
            public_clients: request.public_clients,
            allowed_origins,
            dns,
            allowed_ips,
            mtu: request.client_mtu,
        })
    }
}

struct Faults(Problem);

impl Faults {
    fn add(&mut self, pointer: &str, code: &str, detail: &str) {
        let problem = std::mem::replace(&mut self.0, Problem::validation());
        self.0 = problem.field(pointer, code, detail);
    }

    /// Takes over the faults of a check made elsewhere.
    fn of<T>(&mut self, checked: Result<T, Problem>) -> Option<T> {
        checked.map_err(|problem| self.0 = problem).ok()
    }

    fn list<T>(
        &mut self,
        pointer: &str,
        texts: &[String],
        length: std::ops::RangeInclusive<usize>,
        form: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Vec<T> {
        if texts.len() < *length.start() {
            self.add(pointer, "too_short", "must not be empty; null goes back to the platform's");
        } else if texts.len() > *length.end() {
            self.add(pointer, "too_long", &format!("must have at most {} entries", length.end()));
            return Vec::new();
        }
        let mut parsed = Vec::with_capacity(texts.len());
        for (index, text) in texts.iter().enumerate() {
            match parse(text) {
                Some(value) => parsed.push(value),
                None => self.add(&format!("{pointer}/{index}"), "invalid_format", form),
            }
        }
        parsed
    }
}

/// An origin as browsers serialize it (HTML standard, 7.1.1): lower case, without a path and without the usual port.
fn origin(text: &str) -> Option<String> {
    let lower = text.to_ascii_lowercase();
    let (scheme, authority) = lower.split_once("://")?;
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    };
    let scheme_ok = scheme.starts_with(|c: char| c.is_ascii_lowercase())
        && scheme.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b));
    let host_ok = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').is_some_and(|ip| ip.parse::<std::net::Ipv6Addr>().is_ok()),
        None => {
            !host.is_empty()
                && host.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b))
        }
    };
    let port = match port {
        None => None,
        Some(port) => Some(port.parse::<u16>().ok().filter(|number| number.to_string() == port)?),
    };
    if !scheme_ok || !host_ok || lower.len() > 255 {
        return None;
    }
    match (scheme, port) {
        (_, None) | ("https", Some(443)) | ("http", Some(80)) => Some(format!("{scheme}://{host}")),
        (_, Some(port)) => Some(format!("{scheme}://{host}:{port}")),
    }
}

fn network(text: &str) -> Option<IpNet> {
    text.parse::<IpNet>().ok().map(|net| net.trunc()).or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// The current tenant's settings. `rate_limit_per_minute` is the platform's, for a tenant that has none of its own.
///
/// # Errors
/// [`TenantError::NotFound`] for a deleted tenant.
pub async fn settings(tx: &mut TenantTx, rate_limit_per_minute: u32) -> Result<TenantSettings, TenantError> {
    let tenant = tx.tenant();
    let row = sqlx::query!(
        r#"select tenant_id, name, status, whitelabel_config, public_clients, allowed_origins,
                  client_dns as "dns: Vec<IpNet>", client_allowed_ips as "allowed_ips: Vec<IpNet>", client_mtu,
                  bandwidth_limit_bytes, user_limit, max_devices_per_user, rate_limit_per_minute
           from cvault.tenants where tenant_id = $1 and status <> 'deleted'"#,
        tenant.uuid()
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(DbError::from)?
    .ok_or(TenantError::NotFound)?;
    let client = ClientSettings::from_row(row.dns, row.allowed_ips, row.client_mtu);
    Ok(TenantSettings {
        tenant_id: TenantId::from_uuid(row.tenant_id),
        name: row.name,
        status: parse_status(&row.status),
        whitelabel_config: object(row.whitelabel_config),
        public_clients: row.public_clients,
        allowed_origins: row.allowed_origins,
        client_dns: client.dns.map(|all| all.iter().map(ToString::to_string).collect()),
        client_allowed_ips: client.allowed_ips.map(|all| all.iter().map(ToString::to_string).collect()),
        client_mtu: client.mtu,
        limits: TenantLimits {
            bandwidth_limit_gb: row.bandwidth_limit_bytes.map(|bytes| bytes / GB),
            user_limit: row.user_limit,
            max_devices_per_user: row.max_devices_per_user,
            rate_limit_per_minute: row
                .rate_limit_per_minute
                .and_then(|limit| u32::try_from(limit).ok())
                .unwrap_or(rate_limit_per_minute),
        },
    })
}

/// Changes what `change` names.
///
/// # Errors
/// [`TenantError::NotFound`] for a deleted tenant.
pub async fn update_settings(
    tx: &mut TenantTx,
    change: SettingsChange,
    actor: &Actor,
    now: OffsetDateTime,
) -> Result<(), TenantError> {
    let tenant = tx.tenant().uuid();
    let mut changed = Vec::new();
    let mut named = |is: bool, name: &'static str| changed.extend(is.then_some(name));
    named(change.name.is_some(), "name");
    named(change.whitelabel_config.is_some(), "whitelabel_config");
    named(change.public_clients.is_some(), "public_clients");
    named(change.allowed_origins.is_some(), "allowed_origins");
    named(change.dns.is_some(), "client_dns");
    named(change.allowed_ips.is_some(), "client_allowed_ips");
    named(change.mtu.is_some(), "client_mtu");
    let details =
        json!({"changed": changed, "public_clients": change.public_clients, "allowed_origins": change.allowed_origins});
    let (dns, networks) = (change.dns.as_ref(), change.allowed_ips.as_ref());
    let done = sqlx::query!(
        "update cvault.tenants
         set name = coalesce($2, name), whitelabel_config = coalesce($3, whitelabel_config),
             public_clients = coalesce($4, public_clients), allowed_origins = coalesce($5, allowed_origins),
             client_dns = case when $6 then $7 else client_dns end,
             client_allowed_ips = case when $8 then $9 else client_allowed_ips end,
             client_mtu = case when $10 then $11 else client_mtu end, updated_at = $12
         where tenant_id = $1 and status <> 'deleted'",
        tenant,
        change.name,
        change.whitelabel_config.map(serde_json::Value::Object),
        change.public_clients,
        change.allowed_origins.as_deref(),
        dns.is_some(),
        dns.and_then(Option::as_deref),
        networks.is_some(),
        networks.and_then(Option::as_deref),
        change.mtu.is_some(),
        change.mtu.flatten().map(i32::from),
        now
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    if done.rows_affected() == 0 {
        return Err(TenantError::NotFound);
    }
    Ok(note(tx, actor, "tenant.settings", details).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_kept_as_browsers_write_it() {
        for (text, kept) in [
            ("https://app.example.com", "https://app.example.com"),
            ("HTTPS://App.Example.com:443", "https://app.example.com"),
            ("http://localhost:3000", "http://localhost:3000"),
            ("http://[2001:db8::1]:8080", "http://[2001:db8::1]:8080"),
            ("https://[::1]", "https://[::1]"),
            ("capacitor://localhost", "capacitor://localhost"),
        ] {
            assert_eq!(origin(text).as_deref(), Some(kept), "{text}");
        }
        for text in [
            "",
            "*",
            "null",
            "https://",
            "example.com",
            "https://*.example.com",
            "https://a.example/",
            "https://a.example/x",
            "https://u@a.example",
            "https://a.example:0443",
            "https://a.example:",
            "https://a.example:70000",
            "https://a b",
            "https://a.example\r\nX: y",
            "https://ä.example",
            "1a://b",
            "https://[1::2::3]",
            "https://a.example:443:443",
        ] {
            assert_eq!(origin(text), None, "{text}");
        }
    }

    #[test]
    fn networks_lose_their_host_bits_and_nothing_else_passes() {
        assert_eq!(network("10.1.2.3/8").unwrap().to_string(), "10.0.0.0/8");
        assert_eq!(network("10.1.2.3").unwrap().to_string(), "10.1.2.3/32");
        for text in ["", "10.0.0.0/33", "0.0.0.0/0, ::/0", "10.0.0.0/8\nPostUp = id", "fd00::/129", "all"] {
            assert!(network(text).is_none(), "{text}");
        }
    }
}
