//! Devices: one WireGuard peer of one user. Register, list, read, delete; the configuration file a client gets.
//!
//! Operations take a [`TenantTx`](crate::tenancy::TenantTx), so a foreign device is simply not there. What makes a
//! server serve the device is the last statement of a registration (`platform.place_peer`).

mod activation;
mod config;
mod name;
mod read;
mod register;
mod revoke;

pub use activation::wait_until_acked;
pub use config::{ClientDefaults, ConfigKey, render_config};
pub use name::{DeviceName, Fault, Platform, PublicKey, is_region};
pub use read::{ConfigError, Device, config_of, find, list};
pub use register::{NewDevice, RegisterError, Registered, register};
pub use revoke::{RevokeError, Revoked, revoke};

#[cfg(test)]
mod tests;
