//! The protocol's cryptography as plain values: Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s, cookies and sessions, as in the
//! WireGuard paper, section 5.4. No clock and no sockets here; randomness is drawn for keys and nonces only.

mod cookies;
mod handshake;
mod keys;
#[cfg(target_arch = "x86_64")]
mod lanes;
mod replay;
mod session;
mod symmetric;

pub(crate) use cookies::{COOKIE_REPLY_BYTES, Jar, Proof, Seed, Warden};
pub(crate) use handshake::{
    Agreed, INITIATION_BYTES, Initiated, Local, Opened, Proved, RESPONSE_BYTES, Remote, Stamp, Timestamp,
};
pub(crate) use keys::Shared;
pub(crate) use session::{OVERHEAD, REJECT_AFTER_MESSAGES, Session, Unopened};
