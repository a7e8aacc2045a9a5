//! Who this server is: its keys, and the control plane it belongs to. One file, `identity.json` (0600), so that a new
//! identity replaces an old one in one rename. Until the control plane has answered, the keys wait in
//! `identity.pending.json`, so that a lost answer can be asked for again with the same key.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cvault_node_protocol::tls::{Identity, IdentityError, Pin};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use crate::state_dir::StateDir;

const FILE: &str = "identity.json";
const PENDING_FILE: &str = "identity.pending.json";
const VERSION: u32 = 1;

/// The two private keys of a server. `Debug` shows only the public sides.
pub(crate) struct Keys {
    pub(crate) tls: Identity,
    wireguard: x25519_dalek::StaticSecret,
}

/// An enrolled server.
pub(crate) struct Enrolment {
    pub(crate) server_id: [u8; 16],
    pub(crate) server_name: String,
    /// `host:port`
    pub(crate) control_plane: String,
    pub(crate) pin: Pin,
    pub(crate) keys: Keys,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum EnrolmentError {
    #[error("the file {file} cannot be read or written")]
    Io { file: &'static str, source: std::io::Error },
    #[error("the file {file} is damaged: enrol this server again, with --force")]
    Damaged { file: &'static str },
    #[error("the TLS key cannot be used")]
    Tls(#[from] IdentityError),
    #[error("the system has no randomness")]
    Random(#[from] rand::rand_core::OsError),
}

#[derive(Serialize, Deserialize)]
struct KeysFile {
    version: u32,
    /// The token these keys were made for: another token means another server.
    token_id: uuid::Uuid,
    tls_key: String,
    wireguard_key: String,
    server: Option<ServerPart>,
}

impl Drop for KeysFile {
    fn drop(&mut self) {
        self.tls_key.zeroize();
        self.wireguard_key.zeroize();
    }
}

#[derive(Serialize, Deserialize)]
struct ServerPart {
    server_id: uuid::Uuid,
    server_name: String,
    control_plane: String,
    pin: String,
}

impl Keys {
    fn generate() -> Result<Self, EnrolmentError> {
        use rand::TryRngCore as _;
        let mut secret = Zeroizing::new([0; 32]);
        rand::rngs::OsRng.try_fill_bytes(secret.as_mut())?;
        Ok(Self { tls: Identity::generate()?, wireguard: x25519_dalek::StaticSecret::from(*secret) })
    }

    pub(crate) fn wireguard_public(&self) -> [u8; 32] {
        x25519_dalek::PublicKey::from(&self.wireguard).to_bytes()
    }

    pub(crate) fn wireguard_private(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.wireguard.to_bytes())
    }

    fn to_file(&self, token_id: uuid::Uuid, server: Option<ServerPart>) -> KeysFile {
        KeysFile {
            version: VERSION,
            token_id,
            tls_key: STANDARD.encode(self.tls.private_key()),
            wireguard_key: STANDARD.encode(*self.wireguard_private()),
            server,
        }
    }

    fn from_file(stored: &KeysFile, file: &'static str) -> Result<Self, EnrolmentError> {
        let damaged = || EnrolmentError::Damaged { file };
        let tls = Zeroizing::new(STANDARD.decode(stored.tls_key.as_bytes()).map_err(|_| damaged())?);
        let wireguard = Zeroizing::new(STANDARD.decode(stored.wireguard_key.as_bytes()).map_err(|_| damaged())?);
        let wireguard = Zeroizing::new(<[u8; 32]>::try_from(wireguard.as_slice()).map_err(|_| damaged())?);
        Ok(Self { tls: Identity::from_pkcs8(&tls)?, wireguard: x25519_dalek::StaticSecret::from(*wireguard) })
    }
}

/// The keys to enrol with: those of an earlier, unanswered attempt with the same token, or new ones.
pub(crate) fn pending_keys(dir: &StateDir, token_id: uuid::Uuid) -> Result<Keys, EnrolmentError> {
    if let Ok(Some(stored)) = read(dir, PENDING_FILE)
        && stored.token_id == token_id
    {
        return Keys::from_file(&stored, PENDING_FILE);
    }
    let keys = Keys::generate()?;
    write(dir, PENDING_FILE, &keys.to_file(token_id, None))?;
    Ok(keys)
}

/// Makes an answered enrolment this server's identity.
pub(crate) fn save(dir: &StateDir, token_id: uuid::Uuid, enrolment: &Enrolment) -> Result<(), EnrolmentError> {
    let server = ServerPart {
        server_id: uuid::Uuid::from_bytes(enrolment.server_id),
        server_name: enrolment.server_name.clone(),
        control_plane: enrolment.control_plane.clone(),
        pin: hex::encode(enrolment.pin.as_bytes()),
    };
    write(dir, FILE, &enrolment.keys.to_file(token_id, Some(server)))?;
    dir.remove(PENDING_FILE).map_err(|source| EnrolmentError::Io { file: PENDING_FILE, source })
}

/// This server's identity, `None` when it is not enrolled.
pub(crate) fn load(dir: &StateDir) -> Result<Option<Enrolment>, EnrolmentError> {
    let damaged = EnrolmentError::Damaged { file: FILE };
    let Some(mut stored) = read(dir, FILE)? else { return Ok(None) };
    let keys = Keys::from_file(&stored, FILE)?;
    let Some(server) = stored.server.take() else { return Err(damaged) };
    let mut pin = [0; 32];
    if hex::decode_to_slice(&server.pin, &mut pin).is_err() {
        return Err(damaged);
    }
    Ok(Some(Enrolment {
        server_id: server.server_id.into_bytes(),
        server_name: server.server_name,
        control_plane: server.control_plane,
        pin: Pin::from_bytes(pin),
        keys,
    }))
}

/// Whether an identity is stored, readable or not.
pub(crate) fn exists(dir: &StateDir) -> bool {
    dir.file(FILE).exists()
}

fn read(dir: &StateDir, file: &'static str) -> Result<Option<KeysFile>, EnrolmentError> {
    let Some(content) = dir.read(file).map_err(|source| EnrolmentError::Io { file, source })? else { return Ok(None) };
    match serde_json::from_slice::<KeysFile>(&content) {
        Ok(stored) if stored.version == VERSION => Ok(Some(stored)),
        Ok(_) | Err(_) => Err(EnrolmentError::Damaged { file }),
    }
}

fn write(dir: &StateDir, file: &'static str, content: &KeysFile) -> Result<(), EnrolmentError> {
    let text = Zeroizing::new(serde_json::to_vec_pretty(content).expect("strings and numbers are JSON"));
    dir.write(file, &text).map_err(|source| EnrolmentError::Io { file, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_dir::testing::private_directory;

    fn enrolment(keys: Keys) -> Enrolment {
        Enrolment {
            server_id: [5; 16],
            server_name: "fra-1".to_owned(),
            control_plane: "cp.example:8443".to_owned(),
            pin: Pin::from_bytes([6; 32]),
            keys,
        }
    }

    #[test]
    fn a_lost_answer_is_asked_for_with_the_same_keys_and_another_token_gets_others() {
        let root = private_directory();
        let dir = StateDir::open(root.path()).unwrap();
        let (one, two) = (uuid::Uuid::from_u128(1), uuid::Uuid::from_u128(2));
        let first = pending_keys(&dir, one).unwrap();
        let again = pending_keys(&dir, one).unwrap();
        assert_eq!(first.tls.pin(), again.tls.pin());
        assert_eq!(first.wireguard_public(), again.wireguard_public());
        assert_ne!(pending_keys(&dir, two).unwrap().tls.pin(), first.tls.pin());
    }

    #[test]
    fn an_identity_survives_storage_and_damage_is_named() {
        let root = private_directory();
        let dir = StateDir::open(root.path()).unwrap();
        assert!(load(&dir).unwrap().is_none());
        let token = uuid::Uuid::from_u128(1);
        let keys = pending_keys(&dir, token).unwrap();
        let (pin, public) = (keys.tls.pin(), keys.wireguard_public());
        save(&dir, token, &enrolment(keys)).unwrap();
        assert!(!dir.file(PENDING_FILE).exists());
        let loaded = load(&dir).unwrap().unwrap();
        assert_eq!((loaded.keys.tls.pin(), loaded.keys.wireguard_public()), (pin, public));
        assert_eq!((loaded.server_id, loaded.control_plane.as_str()), ([5; 16], "cp.example:8443"));
        dir.write(FILE, b"{").unwrap();
        assert!(load(&dir).err().unwrap().to_string().contains("--force"));
    }
}
