//! Devices: one WireGuard peer of one user. Register, list, read, give new keys, delete; the configuration file a client gets.
//!
//! Operations take a [`TenantTx`](crate::tenancy::TenantTx), so a foreign device is simply not there. What makes a
//! server serve the device is the last statement of a registration (`platform.place_peer`).

mod activation;
mod config;
mod keys;
mod name;
mod read;
mod register;
mod revoke;
mod rotate;

pub use activation::wait_until_acked;
pub use config::{ClientDefaults, ConfigKey, ConfigKeys, qr, render_config};
pub use keys::KeyRequest;
pub use name::{DeviceName, Fault, Platform, PublicKey, is_region};
pub(crate) use read::preshared_key_aad;
pub use read::{ConfigError, Device, OwnedDevice, ServedDevice, config_of, find, list, list_all};
pub use register::{Carried, NewDevice, RegisterError, Registered, carried, register};
pub use revoke::{RevokeError, Revoked, is_revoked, revoke};
pub use rotate::{NewDeviceKeys, RotateError, Rotated, rotate};

#[cfg(test)]
mod tests;
