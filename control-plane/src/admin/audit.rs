//! `admin audit …`: reading the log of all tenants and of the platform, and checking its chains.

use cvault_types::TenantId;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::{AdminError, AuditCommand};
use crate::app::App;
use crate::audit::{self, Filter};

pub(super) async fn run(app: &App, command: AuditCommand) -> Result<Value, AdminError> {
    match command {
        AuditCommand::List { tenant, action, actor, from, to, limit } => {
            let filter = Filter { tenant, action, actor, from: moment(from)?, to: moment(to)? };
            let rows = audit::search(&app.db.sys, &filter, None, i64::from(limit)).await?;
            Ok(json!({"entries": rows}))
        }
        AuditCommand::Verify { tenant } => verify(app, tenant).await,
    }
}

pub(super) fn moment(text: Option<String>) -> Result<Option<OffsetDateTime>, AdminError> {
    let refused = || AdminError::Refused("a time must be of RFC 3339, such as 2026-11-01T00:00:00Z".to_owned());
    text.map(|text| OffsetDateTime::parse(&text, &Rfc3339)).transpose().map_err(|_| refused())
}

/// One chain for each tenant, those that were deleted included, and one for the platform itself.
async fn verify(app: &App, only: Option<TenantId>) -> Result<Value, AdminError> {
    let chains = match only {
        Some(tenant) => vec![tenant.uuid()],
        None => audit::chains(&app.db.sys).await?,
    };
    let mut broken = Vec::new();
    for chain in &chains {
        if let Some(fault) = audit::verify_chain(&app.db.sys, *chain).await? {
            let tenant = (*chain != Uuid::nil()).then(|| TenantId::from_uuid(*chain));
            broken.push(json!({"tenant_id": tenant, "chain_sequence": fault.sequence}));
        }
    }
    if broken.is_empty() {
        Ok(json!({"chains": chains.len(), "broken": broken}))
    } else {
        Err(AdminError::Chain(broken))
    }
}
