//! BLAKE2s, HMAC, the key derivation and the AEAD.

use blake2s_simd::{BLOCKBYTES, Params, State};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroizing;

pub(super) const TAG_BYTES: usize = 16;

pub(super) fn hash(data1: &[u8], data2: &[u8]) -> [u8; 32] {
    *State::new().update(data1).update(data2).finalize().as_array()
}

/// Keyed BLAKE2s of 16 bytes: `MAC` of the paper.
pub(super) fn keyed(key: &[u8], data: &[u8]) -> [u8; 16] {
    let mac = Params::new().hash_length(16).key(key).hash(data);
    mac.as_bytes().try_into().expect("sixteen bytes were asked for")
}

/// HMAC under one key (RFC 2104), of a hash that hmac's crate does not know.
pub(super) struct Hmac {
    inner: State,
    outer: State,
}

impl Hmac {
    pub(super) fn new(key: &[u8; 32]) -> Self {
        let begun = |pad: u8| {
            let mut block = Zeroizing::new([pad; BLOCKBYTES]);
            block.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
            let mut state = State::new();
            state.update(&*block);
            state
        };
        Self { inner: begun(0x36), outer: begun(0x5c) }
    }

    fn of(&self, [part1, part2]: [&[u8]; 2]) -> [u8; 32] {
        let inner = self.inner.clone().update(part1).update(part2).finalize();
        *self.outer.clone().update(inner.as_bytes()).finalize().as_array()
    }

    /// `KDF_N` of the paper.
    pub(super) fn derive<const N: usize>(&self, input: &[u8]) -> [Zeroizing<[u8; 32]>; N] {
        let secret = Self::new(&Zeroizing::new(self.of([input, &[]])));
        let mut last: &[u8] = &[];
        let mut outputs = std::array::from_fn(|_| Zeroizing::new([0; 32]));
        for (number, output) in (1_u8..).zip(&mut outputs) {
            **output = secret.of([last, &[number]]);
            last = &output[..];
        }
        outputs
    }
}

/// `KDF_N` of the paper.
pub(super) fn derive<const N: usize>(key: &[u8; 32], input: &[u8]) -> [Zeroizing<[u8; 32]>; N] {
    Hmac::new(key).derive(input)
}

/// Seals under a key that is used once: `sealed` is `text` and a tag.
pub(super) fn seal(key: &[u8; 32], text: &[u8], hash: &[u8; 32], sealed: &mut [u8]) {
    let (body, tag) = sealed.split_at_mut(text.len());
    body.copy_from_slice(text);
    let made = cipher(key).seal_in_place_separate_tag(first_nonce(), Aad::from(hash), body);
    tag.copy_from_slice(made.expect("a few bytes are not too many").as_ref());
}

/// Opens a message of `N` bytes under a key that is used once.
pub(super) fn unseal<const N: usize>(key: &[u8; 32], sealed: &[u8], hash: &[u8; 32]) -> Option<[u8; N]> {
    let (text, tag) = sealed.split_at_checked(sealed.len().checked_sub(TAG_BYTES)?)?;
    let mut opened: [u8; N] = text.try_into().ok()?;
    let tag: [u8; TAG_BYTES] = tag.try_into().ok()?;
    cipher(key).open_in_place_separate_tag(first_nonce(), Aad::from(hash), tag.into(), &mut opened, 0..).ok()?;
    Some(opened)
}

pub(super) fn cipher(key: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).expect("a key of 32 bytes"))
}

fn first_nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}
