//! Devices: one WireGuard peer of one user. Register, list, read, give new keys, delete; the configuration file a client gets.
//!
//! Operations take a [`TenantTx`](crate::tenancy::TenantTx), so a foreign device is simply not there. What makes a
//! server serve the device is done in the same transaction (`platform.register_device`, `platform.place_peer`).

mod activation;
mod config;
mod keys;
mod listing;
mod name;
mod placed;
mod read;
mod register;
mod revoke;
mod rotate;
mod together;
mod used_up;

pub use activation::wait_until_acked;
pub use config::{ClientDefaults, ConfigKey, ConfigKeys, qr, render_config};
pub use keys::KeyRequest;
pub use listing::Listing;
pub use name::{DeviceName, Fault, Platform, PublicKey, is_region};
pub(crate) use read::preshared_key_aad;
pub use read::{ConfigError, Device, OwnedDevice, Page, ServedDevice, config_of, find, list, list_all};
pub use register::{NewDevice, RegisterError, Registered, Registration, register};
pub use revoke::{RevokeError, Revoked, is_revoked, revoke};
pub use rotate::{NewDeviceKeys, RotateError, Rotated, rotate};
pub use together::Registrations;
pub use used_up::{UsedUp, used_up};

#[cfg(test)]
mod tests;
