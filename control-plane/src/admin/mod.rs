//! `admin …`: what an operator does from a shell on the control plane's host, against the database directly.
//!
//! Each command answers with one JSON object (`--json`) or a few lines for people; secrets appear only in the answer
//! that makes them.

mod command;
mod keys;
mod mail;
mod run;

pub use command::{AdminArgs, AdminCommand, KeysCommand, MailCommand, PoolCommand, ServerCommand, TenantCommand};
pub use run::{AdminError, run};
