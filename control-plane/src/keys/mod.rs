//! Keys at rest: a key-encryption key (KEK) from outside the database wraps one data key per tenant; data keys seal
//! columns with AES-256-GCM. The associated data names table, column, tenant and row, so that a sealed value copied to
//! another place does not open. Destroying a tenant's data key destroys everything sealed with it.
//!
//! Deliberately absent: reading the KEK from the environment (`config.rs`).

mod data_keys;
pub(crate) mod leased;
mod platform;
mod replace;
mod rotate;
mod seal;
mod token_keys;

pub use data_keys::DataKeys;
pub(crate) use platform::kept_answer_aad;
pub use platform::{PlatformSecrets, SecretsError};
pub use replace::{
    KeyState, Replaced, Replacement, Stage, context_key_states, reload, replace_context_key, replace_token_key, retire,
    token_key_states,
};
pub use rotate::{InUse, RingError, RotateError, Rotated, check, in_use, rotate};
pub use seal::{Aad, KeyError, KeyRing, SealedDataKey};
pub use token_keys::{TokenKey, TokenKeyring, TokenKeys};
