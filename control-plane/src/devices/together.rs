//! Registrations that arrive together, made together: one statement registers all that a tenant has waiting. What a registration
//! costs alone is mostly what all of them share: the round trip, the context, the server's row, the commit.
//!
//! Each is judged as if it came alone: what the statement for many passes over, `register` looks at by itself.

use std::collections::HashMap;

use cvault_types::TenantId;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use super::name::Platform;
use super::placed::PlacedRow;
use super::register::{RegisterError, Registered, Registration, refused, register};
use crate::clock::Clock;
use crate::db::DbError;
use crate::http::problem::chain;
use crate::servers::SILENT_AFTER_SECONDS;
use crate::tenancy::{Tenancy, TenantTx};
use crate::together::{Serve, Together, Waiting};

/// One for the process.
#[derive(Clone, Default)]
pub struct Registrations(Together<Placing>);

struct Placing(Tenancy);

/// Devices of one tenant for one region, or any.
type Line = (TenantId, Option<String>);

enum Answer {
    Known(Result<Registered, RegisterError>),
    /// It did not go with the others.
    Alone(Registration),
}

impl Registrations {
    /// Registers a device of `tenant`. Then call `Hub::server_changed` for its server.
    ///
    /// # Errors
    /// As [`register`].
    pub async fn register(
        &self,
        tenancy: &Tenancy,
        tenant: TenantId,
        device: Registration,
    ) -> Result<Registered, RegisterError> {
        let line = (tenant, device.region.clone());
        match self.0.ask(line, device, || Placing(tenancy.clone())).await {
            Some(Answer::Known(outcome)) => outcome,
            Some(Answer::Alone(device)) => alone(tenancy, tenant, device).await,
            None => Err(unknown()),
        }
    }
}

impl Serve for Placing {
    type Line = Line;
    type Item = Registration;
    type Answer = Answer;

    /// In one statement: some ten milliseconds, for which the server's row is locked.
    const MOST: usize = 48;

    async fn serve(&mut self, (tenant, region): &Line, mut batch: Vec<Waiting<Self>>) {
        if batch.len() > 1 {
            return self.together(*tenant, region.as_deref(), batch).await;
        }
        if let Some(Waiting { item: device, answer }) = batch.pop() {
            // whoever asked may be gone
            let _ = answer.send(Answer::Known(alone(&self.0, *tenant, device).await));
        }
    }
}

impl Placing {
    async fn together(&self, tenant: TenantId, region: Option<&str>, batch: Vec<Waiting<Self>>) {
        // alone each of them would only wait for a connection that is not to be had
        let tx = match self.0.single(tenant).await {
            Ok(tx) => tx,
            Err(error) => {
                tracing::debug!(error = chain(&error), "no connection for devices that are registered together");
                return tell_all(batch, unavailable);
            }
        };
        let devices: Vec<&Registration> = batch.iter().map(|waiting| &waiting.item).collect();
        let mut placed = match place(tx, region, &devices, Clock.now()).await {
            Ok(placed) => placed,
            Err(RegisterError::Db(DbError::CommitUnknown(_))) => return tell_all(batch, unknown),
            // one of them is at fault, or the server has filled up: nothing was changed
            Err(_) => HashMap::new(),
        };
        for Waiting { item: device, answer } in batch {
            let told = match placed.remove(&device.id.uuid()) {
                Some(row) => Answer::Known(device.placed(row).map_err(RegisterError::from)),
                None => Answer::Alone(device),
            };
            let _ = answer.send(told);
        }
    }
}

async fn alone(tenancy: &Tenancy, tenant: TenantId, device: Registration) -> Result<Registered, RegisterError> {
    let mut tx = tenancy.single(tenant).await?;
    let outcome = register(&mut tx, device, Clock.now()).await;
    tx.finish(outcome).await
}

/// Registers those that nothing stands against; by their ids.
async fn place(
    mut tx: TenantTx,
    region: Option<&str>,
    devices: &[&Registration],
    now: OffsetDateTime,
) -> Result<HashMap<Uuid, PlacedRow>, RegisterError> {
    let column = |of: fn(&Registration) -> Uuid| devices.iter().map(|device| of(device)).collect::<Vec<Uuid>>();
    let text = |of: fn(&Registration) -> String| devices.iter().map(|device| of(device)).collect::<Vec<String>>();
    let ids = column(|device| device.id.uuid());
    let platforms: Vec<Option<&str>> =
        devices.iter().map(|device| device.platform.as_ref().map(Platform::as_str)).collect();
    let public_keys: Vec<&[u8]> = devices.iter().map(|device| device.keys.public.as_bytes().as_slice()).collect();
    let private_keys: Vec<Option<&[u8]>> = devices.iter().map(|device| device.keys.private_sealed.as_deref()).collect();
    let preshared_keys: Vec<Option<&[u8]>> =
        devices.iter().map(|device| device.keys.preshared_sealed.as_deref()).collect();
    let preshared_hashes: Vec<&[u8]> = devices.iter().map(|device| device.keys.preshared_hash.as_slice()).collect();

    let tenant = tx.tenant();
    let (conn, context) = tx.entering();
    let rows = sqlx::query_as!(
        PlacedRow,
        r#"with placed as (
               select r.* from cvault.enter($1) as tenant cross join lateral platform.register_devices(
                   tenant, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) as r
           ), noted as (
               insert into cvault.audit_log (tenant_id, audit_id, actor, action, target, details, request_id)
               select $13, w.audit_id, w.actor, 'device.register', w.target,
                      jsonb_build_object('server', platform.id_text('srv', p.server_id)), w.request_id
               from placed p join unnest($5::uuid[], $14::uuid[], $15::text[], $16::text[], $17::uuid[])
                   as w (device_id, audit_id, actor, target, request_id) on w.device_id = p.device_id
           )
           select device_id as "device_id!", 'registered' as "outcome!", null::integer as max_devices,
                  null::bigint as devices, client_dns as "client_dns: _", client_allowed_ips as "client_allowed_ips: _",
                  client_mtu, server_id, server_name, region, public_ip as "public_ip: _", endpoint_port,
                  server_public_key, pool_id, capacity, peer_count, last_seen_at, acked_revision, ipv4 as "ipv4: _",
                  ipv6 as "ipv6: _", revision
           from placed"#,
        context,
        region,
        now - Duration::seconds(SILENT_AFTER_SECONDS),
        now,
        &ids,
        &column(|device| device.user.uuid()),
        &text(|device| device.name.as_str().to_owned()),
        &platforms as _,
        &public_keys as _,
        &private_keys as _,
        &preshared_keys as _,
        &preshared_hashes as _,
        tenant.uuid(),
        &column(|_| Uuid::now_v7()),
        &text(|device| device.user.to_string()),
        &text(|device| device.id.to_string()),
        &column(|device| device.request_id.uuid()),
    )
    .fetch_all(conn)
    .await
    .map_err(refused);
    let rows = tx.finish(rows).await?;
    Ok(rows.into_iter().map(|row| (row.device_id, row)).collect())
}

fn tell_all(batch: Vec<Waiting<Placing>>, error: fn() -> RegisterError) {
    for Waiting { answer, .. } in batch {
        let _ = answer.send(Answer::Known(Err(error())));
    }
}

fn unavailable() -> RegisterError {
    RegisterError::Db(DbError::Unavailable(sqlx::Error::PoolTimedOut))
}

fn unknown() -> RegisterError {
    RegisterError::Db(DbError::CommitUnknown(sqlx::Error::WorkerCrashed))
}

#[cfg(test)]
mod tests;
