//! Keys at rest: a key-encryption key (KEK) from outside the database wraps one data key per tenant; data keys seal
//! columns with AES-256-GCM. The associated data names table, column, tenant and row, so that a sealed value copied to
//! another place does not open. Destroying a tenant's data key destroys everything sealed with it.
//!
//! Deliberately absent: reading the KEK from the environment (`config.rs`).

mod data_keys;
mod platform;
mod rotate;
mod seal;

pub use data_keys::DataKeys;
pub(crate) use platform::kept_answer_aad;
pub use platform::{PlatformSecrets, SecretsError, TokenKey};
pub use rotate::{InUse, RingError, RotateError, Rotated, check, in_use, rotate};
pub use seal::{Aad, KeyError, KeyRing, SealedDataKey};
