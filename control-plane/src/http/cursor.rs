//! Cursors of lists: opaque to callers, and authenticated, so that nobody builds one by hand and depends on its form.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::Problem;
use crate::keys::PlatformSecrets;

const MAC_BYTES: usize = 8;

/// A cursor for the list `list` that continues after `last`.
#[must_use]
pub fn encode(secrets: &PlatformSecrets, list: &str, last: Uuid) -> String {
    let mut bytes = last.as_bytes().to_vec();
    bytes.extend_from_slice(&mac(secrets, list, last));
    URL_SAFE_NO_PAD.encode(bytes)
}

/// # Errors
/// `VALIDATION_FAILED` for anything [`encode`] did not make for the same list.
pub fn decode(secrets: &PlatformSecrets, list: &str, cursor: &str) -> Result<Uuid, Problem> {
    let refused =
        || Problem::validation().field("?cursor", "invalid_value", "must be the next_cursor of this list's last page");
    let bytes = URL_SAFE_NO_PAD.decode(cursor).map_err(|_| refused())?;
    let (id, given) = bytes.split_at_checked(16).ok_or_else(refused)?;
    let id = Uuid::from_slice(id).map_err(|_| refused())?;
    if bool::from(mac(secrets, list, id).ct_eq(given)) { Ok(id) } else { Err(refused()) }
}

fn mac(secrets: &PlatformSecrets, list: &str, id: Uuid) -> [u8; MAC_BYTES] {
    let whole = secrets.peppered("cursor", &format!("{list}:{id}"));
    std::array::from_fn(|index| whole[index])
}
