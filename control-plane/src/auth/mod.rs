//! Who is calling: API keys and secrets, passwords, user and admin tokens, refresh families.

pub mod admin_tokens;
pub mod api_keys;
pub mod approvals;
pub mod email;
pub mod events;
pub mod opaque;
pub mod passwords;
pub mod refresh;
pub mod throttle;
pub mod tokens;
pub mod verified;
