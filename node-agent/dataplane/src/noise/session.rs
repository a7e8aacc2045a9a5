//! A session: the keys two sides have agreed on, and the counters that keep each message unique.

use ring::aead::{Aad, LessSafeKey, Nonce};

use super::handshake::SessionKeys;
use super::replay::Window;
use super::symmetric::cipher;

/// Bytes a data message has more than its packet.
pub(crate) const OVERHEAD: usize = 32;
const HEADER_BYTES: usize = 16;
/// `REJECT_AFTER_MESSAGES` of the protocol.
pub(crate) const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// Why a data message was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unopened {
    Replayed,
    Forged,
}

pub(crate) struct Session {
    pub(crate) local_index: u32,
    /// Began with an initiation of ours.
    pub(crate) is_ours: bool,
    pub(crate) born_ms: u64,
    remote_index: u32,
    sender: LessSafeKey,
    receiver: LessSafeKey,
    next_counter: u64,
    window: Window,
}

impl Session {
    pub(crate) fn new(keys: &SessionKeys, local_index: u32, is_ours: bool, born_ms: u64) -> Self {
        Self {
            local_index,
            is_ours,
            born_ms,
            remote_index: keys.remote_index,
            sender: cipher(&keys.send),
            receiver: cipher(&keys.receive),
            next_counter: 0,
            window: Window::new(),
        }
    }

    /// Messages that were sent.
    pub(crate) fn sent(&self) -> u64 {
        self.next_counter
    }

    /// Writes a data message of `padded + OVERHEAD` bytes. `padded` must not be less than the packet.
    pub(crate) fn seal(&mut self, packet: &[u8], padded: usize, room: &mut [u8]) -> Option<usize> {
        let counter = self.next_counter;
        let room = room.get_mut(..padded + OVERHEAD)?;
        if counter >= REJECT_AFTER_MESSAGES {
            return None;
        }
        self.next_counter += 1;
        let (header, rest) = room.split_at_mut(HEADER_BYTES);
        header[..4].copy_from_slice(&4_u32.to_le_bytes());
        header[4..8].copy_from_slice(&self.remote_index.to_le_bytes());
        header[8..].copy_from_slice(&counter.to_le_bytes());
        let (body, tag) = rest.split_at_mut(padded);
        let (text, padding) = body.split_at_mut(packet.len());
        text.copy_from_slice(packet);
        padding.fill(0);
        let made = self.sender.seal_in_place_separate_tag(nonce(counter), Aad::empty(), body).ok()?;
        tag.copy_from_slice(made.as_ref());
        Some(padded + OVERHEAD)
    }

    /// Decrypts a data message of this session into `room`; says how long its content is.
    pub(crate) fn open(&mut self, message: &[u8], room: &mut [u8]) -> Result<usize, Unopened> {
        let (header, sealed) = message.split_first_chunk::<HEADER_BYTES>().ok_or(Unopened::Forged)?;
        let counter = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
        if counter >= REJECT_AFTER_MESSAGES || !self.window.may_accept(counter) {
            return Err(Unopened::Replayed);
        }
        let room = room.get_mut(..sealed.len()).ok_or(Unopened::Forged)?;
        room.copy_from_slice(sealed);
        let opened = self.receiver.open_in_place(nonce(counter), Aad::empty(), room).map_err(|_| Unopened::Forged)?;
        let len = opened.len();
        if self.window.accept(counter) { Ok(len) } else { Err(Unopened::Replayed) }
    }

    #[cfg(test)]
    pub(crate) fn skip_to(&mut self, counter: u64) {
        self.next_counter = counter;
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

#[cfg(test)]
mod tests {
    use zeroize::Zeroizing;

    use super::*;

    fn pair() -> (Session, Session) {
        let keys = |send, receive| SessionKeys {
            send: Zeroizing::new([send; 32]),
            receive: Zeroizing::new([receive; 32]),
            remote_index: 5,
        };
        (Session::new(&keys(1, 2), 5, true, 0), Session::new(&keys(2, 1), 5, false, 0))
    }

    #[test]
    fn what_is_sealed_is_opened_once() {
        let (mut one, mut other) = pair();
        let (mut sealed, mut opened) = ([0; 200], [0; 200]);
        for packet in [&b""[..], b"x", &[7; 100]] {
            let len = one.seal(packet, packet.len(), &mut sealed).unwrap();
            assert_eq!(len, packet.len() + OVERHEAD);
            for at in (8..len).step_by(3) {
                let mut forged = sealed;
                forged[at] ^= 1;
                assert!(other.open(&forged[..len], &mut opened).is_err(), "byte {at}");
            }
            assert_eq!(other.open(&sealed[..len], &mut opened), Ok(packet.len()));
            assert_eq!(&opened[..packet.len()], packet);
            assert_eq!(other.open(&sealed[..len], &mut opened), Err(Unopened::Replayed));
        }
        for len in 0..OVERHEAD {
            assert!(other.open(&sealed[..len], &mut opened).is_err());
        }
    }

    #[test]
    fn the_last_counters_are_never_used() {
        let (mut one, mut other) = pair();
        let mut room = [0; 64];
        one.skip_to(REJECT_AFTER_MESSAGES - 1);
        let len = one.seal(b"", 0, &mut room).unwrap();
        assert_eq!(other.open(&room[..len], &mut [0; 64]), Ok(0));
        assert_eq!(one.seal(b"", 0, &mut room), None);
        room[8..16].copy_from_slice(&REJECT_AFTER_MESSAGES.to_le_bytes());
        assert_eq!(other.open(&room[..len], &mut [0; 64]), Err(Unopened::Replayed));
    }
}
