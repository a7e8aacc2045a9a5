//! The Ed25519 keys of tokens. One signs; the others verify: the next one, before everybody knows it, and earlier ones, until what
//! they have signed has expired. `replace` puts one in the place of another.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::EncodePrivateKey;
use rand::CryptoRng;
use sha2::{Digest, Sha256};
use sqlx::PgPool;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::KeyRing;
use super::leased::Leased;
use super::platform::{SecretsError, bytes32, secret_aad};
use crate::db::DbError;

/// The key an installation begins with. Later ones have their id in the name.
const FIRST: &str = "token_key";
/// Tokens of a key that is not known, each of which may be a reason to read the keys again: so many at once, then one a second.
const UNKNOWN_AT_ONCE: Duration = Duration::from_secs(10);
const UNKNOWN_EVERY: Duration = Duration::from_secs(1);

/// An Ed25519 key that signs user, portal and admin tokens. `Debug` shows the key id only.
pub struct TokenKey {
    kid: String,
    id: [u8; 8],
    public: [u8; 32],
    encoding: jsonwebtoken::EncodingKey,
    decoding: jsonwebtoken::DecodingKey,
}

/// The keys that count at one time, by the first second they sign in. Never none.
#[derive(Debug)]
pub struct TokenKeys(Vec<Dated>);

#[derive(Debug, Clone)]
struct Dated {
    secret: String,
    signs_from: OffsetDateTime,
    key: Arc<TokenKey>,
}

/// This replica's knowledge of them.
pub struct TokenKeyring {
    known: Leased<TokenKeys>,
    /// Until when tokens of unknown keys have used up their reading.
    unknown: Mutex<Instant>,
}

impl TokenKey {
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let key = SigningKey::from_bytes(seed);
        let public = key.verifying_key().to_bytes();
        let der = key.to_pkcs8_der().expect("an Ed25519 key has a PKCS#8 form");
        let [a, b, c, d, e, f, g, h, ..] = <[u8; 32]>::from(Sha256::digest(public));
        let id = [a, b, c, d, e, f, g, h];
        Self {
            kid: hex::encode(id),
            id,
            public,
            encoding: jsonwebtoken::EncodingKey::from_ed_der(der.as_bytes()),
            decoding: jsonwebtoken::DecodingKey::from_ed_der(&public),
        }
    }

    /// Names this key in token headers and in the JWKS.
    #[must_use]
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// The same, as what it is made of.
    #[must_use]
    pub fn id(&self) -> [u8; 8] {
        self.id
    }

    #[must_use]
    pub fn public(&self) -> &[u8; 32] {
        &self.public
    }

    pub(crate) fn encoding(&self) -> &jsonwebtoken::EncodingKey {
        &self.encoding
    }

    pub(crate) fn decoding(&self) -> &jsonwebtoken::DecodingKey {
        &self.decoding
    }
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenKey").field("kid", &self.kid).finish_non_exhaustive()
    }
}

impl From<TokenKey> for TokenKeys {
    /// One that has always signed.
    fn from(key: TokenKey) -> Self {
        let signs_from = OffsetDateTime::UNIX_EPOCH;
        Self(vec![Dated { secret: FIRST.to_owned(), signs_from, key: Arc::new(key) }])
    }
}

impl TokenKeys {
    /// The one that signs at `now`.
    #[must_use]
    pub fn signing(&self, now: OffsetDateTime) -> &TokenKey {
        // by a clock that is behind, a key that replaced all others may be the next one only
        let signs = self.0.iter().rfind(|dated| dated.signs_from <= now).or(self.0.first());
        &signs.expect("there is always one").key
    }

    #[must_use]
    pub fn named(&self, kid: &str) -> Option<&TokenKey> {
        self.iter().find(|key| key.kid == kid)
    }

    #[must_use]
    pub fn has(&self, id: [u8; 8]) -> bool {
        self.iter().any(|key| key.id == id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &TokenKey> {
        self.0.iter().map(|dated| &*dated.key)
    }
}

struct Row {
    name: String,
    signs_from: OffsetDateTime,
    sealed: Vec<u8>,
}

impl Row {
    fn open(self, ring: &KeyRing) -> Result<Dated, SecretsError> {
        let Self { name, signs_from, sealed } = self;
        let seed = match ring.unwrap(&secret_aad(&name), &sealed) {
            Ok(seed) => seed,
            Err(source) => return Err(SecretsError::WrongKek { name, source }),
        };
        let key = Arc::new(TokenKey::from_seed(&*bytes32(&seed, &name)?));
        Ok(Dated { secret: name, signs_from, key })
    }
}

impl TokenKeyring {
    /// Reads the keys, after drawing the first one if there is none.
    ///
    /// # Errors
    /// When the database does not answer, or one of them does not open.
    pub async fn load(sys: &PgPool, ring: &KeyRing, rng: &mut impl CryptoRng) -> Result<Self, SecretsError> {
        draw_first(sys, ring, rng).await?;
        let known = Leased::first(async || -> Result<_, SecretsError> {
            let keys: Result<Vec<_>, _> = rows(sys).await?.into_iter().map(|row| row.open(ring)).collect();
            keys.map(TokenKeys)
        });
        Ok(Self { known: known.await?, unknown: Mutex::new(Instant::now()) })
    }

    /// The keys that count now.
    ///
    /// # Errors
    /// When they have to be read and the database does not answer.
    pub async fn now(&self, sys: &PgPool, ring: &KeyRing) -> Result<Arc<TokenKeys>, DbError> {
        self.known.at(Instant::now(), async || read(sys, ring, &self.known.last()).await).await
    }

    /// Reads the keys again.
    ///
    /// # Errors
    /// When the database does not answer; then those that are known count until their lease is over.
    pub async fn reload(&self, sys: &PgPool, ring: &KeyRing) -> Result<Arc<TokenKeys>, DbError> {
        self.known.read(async || read(sys, ring, &self.known.last()).await).await
    }

    /// The same, because somebody has shown a token of another key; `None` when that happens too often.
    ///
    /// # Errors
    /// As [`TokenKeyring::reload`].
    pub async fn reload_for_unknown(&self, sys: &PgPool, ring: &KeyRing) -> Result<Option<Arc<TokenKeys>>, DbError> {
        if !self.may_ask(Instant::now()) {
            return Ok(None);
        }
        self.reload(sys, ring).await.map(Some)
    }

    /// What was read last: for whoever only shows the public keys.
    #[must_use]
    pub fn last(&self) -> Arc<TokenKeys> {
        self.known.last()
    }

    fn may_ask(&self, now: Instant) -> bool {
        let mut used = self.unknown.lock().unwrap_or_else(PoisonError::into_inner);
        if used.saturating_duration_since(now) + UNKNOWN_EVERY > UNKNOWN_AT_ONCE {
            return false;
        }
        *used = (*used).max(now) + UNKNOWN_EVERY;
        true
    }
}

impl fmt::Debug for TokenKeyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenKeyring").field("known", &self.known.last()).finish_non_exhaustive()
    }
}

/// What a secret of this key is called.
pub(super) fn secret_name(key: &TokenKey) -> String {
    format!("{FIRST}:{}", key.kid)
}

/// Whichever replica starts first draws it.
async fn draw_first(sys: &PgPool, ring: &KeyRing, rng: &mut impl CryptoRng) -> Result<(), SecretsError> {
    let mut seed = Zeroizing::new([0; 32]);
    rng.fill_bytes(seed.as_mut());
    sqlx::query!(
        "insert into platform.secrets (name, kek_version, sealed, signs_from)
         select $1, $2, $3, now() where not exists (select from platform.secrets where signs_from is not null)
         on conflict do nothing",
        FIRST,
        ring.version(),
        ring.wrap(&secret_aad(FIRST), seed.as_ref())
    )
    .execute(sys)
    .await?;
    Ok(())
}

async fn rows(sys: &PgPool) -> Result<Vec<Row>, sqlx::Error> {
    sqlx::query_as!(
        Row,
        r#"select name, signs_from as "signs_from!", sealed from platform.secrets
           where signs_from is not null order by signs_from, name"#
    )
    .fetch_all(sys)
    .await
}

/// A key that does not open costs the tokens it has signed, and not all others.
async fn read(sys: &PgPool, ring: &KeyRing, known: &TokenKeys) -> Result<TokenKeys, DbError> {
    let mut keys = Vec::new();
    for row in rows(sys).await? {
        if let Some(known) = known.0.iter().find(|known| known.secret == row.name) {
            keys.push(Dated { signs_from: row.signs_from, ..known.clone() });
            continue;
        }
        match row.open(ring) {
            Ok(new) => {
                tracing::info!(kid = new.key.kid, signs_from = %new.signs_from, "a new key for tokens is known");
                keys.push(new);
            }
            Err(error) => tracing::error!(
                error = crate::http::problem::chain(&error),
                "a key for tokens does not open: what it signs is refused here"
            ),
        }
    }
    if keys.is_empty() {
        let none = "no key for tokens opens with the key-encryption keys of this process";
        return Err(DbError::Other(sqlx::Error::Decode(none.into())));
    }
    Ok(TokenKeys(keys))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dated(seed: u8, unix: i64) -> Dated {
        let signs_from = OffsetDateTime::from_unix_timestamp(unix).unwrap();
        Dated { secret: seed.to_string(), signs_from, key: Arc::new(TokenKey::from_seed(&[seed; 32])) }
    }

    #[test]
    fn the_newest_key_whose_time_has_come_signs() {
        let keys = TokenKeys(vec![dated(1, 100), dated(2, 200), dated(3, 300)]);
        for (now, seed) in [(99, 1), (100, 1), (199, 1), (200, 2), (299, 2), (300, 3), (9_999, 3)] {
            let now = OffsetDateTime::from_unix_timestamp(now).unwrap();
            assert_eq!(keys.signing(now).kid(), TokenKey::from_seed(&[seed; 32]).kid(), "{now}");
        }
    }

    #[tokio::test]
    async fn tokens_of_unknown_keys_do_not_keep_the_database_busy() {
        let keys = Leased::first(async || Ok::<_, ()>(TokenKeys::from(TokenKey::from_seed(&[1; 32])))).await.unwrap();
        let start = Instant::now();
        let ring = TokenKeyring { known: keys, unknown: Mutex::new(start) };
        let asked = |now| (0..100).filter(|_| ring.may_ask(now)).count();
        assert_eq!(asked(start), 10);
        assert_eq!(asked(start + UNKNOWN_EVERY * 3), 3);
        assert_eq!(asked(start + UNKNOWN_EVERY * 1_000), 10);
    }
}
