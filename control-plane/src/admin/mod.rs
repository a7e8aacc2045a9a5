//! `admin …`: what an operator does from a shell on the control plane's host, against the database directly.
//!
//! Each command answers with one JSON object (`--json`) or a few lines for people; secrets appear only in the answer
//! that makes them.

mod api_keys;
mod audit;
mod command;
mod keys;
mod mail;
mod portal;
mod run;
mod token;

pub use command::{
    AdminArgs, AdminCommand, ApiKeyCommand, ApproveArgs, AuditCommand, KeysCommand, Limit, MailCommand, PolicyChange,
    PoolCommand, PortalCommand, ServerCommand, SigningArgs, TenantCommand, TenantUpdate, TokenArgs, TokenCommand,
};
pub use run::{AdminError, run};
