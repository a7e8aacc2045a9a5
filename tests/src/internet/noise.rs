//! Bytes that no middle could have guessed and that both ends know, so that a transfer can be checked by its digest.

use std::io::{Read, Result, copy};

use sha2::{Digest, Sha256};

/// The first `count` bytes of one fixed sequence (xorshift64*, Vigna 2016).
pub struct Noise {
    state: u64,
    word: [u8; 8],
    /// How much of `word` has been read.
    used: usize,
    left: u64,
}

impl Noise {
    #[must_use]
    pub fn of(count: u64) -> Self {
        Self { state: 0x9e37_79b9_7f4a_7c15, word: [0; 8], used: 8, left: count }
    }

    /// SHA-256 of all of it, in hex.
    pub fn digest(count: u64) -> Result<String> {
        digest_of(&mut Self::of(count))
    }

    fn draw(&mut self) {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.word = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes();
        self.used = 0;
    }
}

impl Read for Noise {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let count = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let mut rest = &mut buffer[..count];
        while !rest.is_empty() {
            if self.used == self.word.len() {
                self.draw();
            }
            let length = rest.len().min(self.word.len() - self.used);
            let (now, later) = rest.split_at_mut(length);
            now.copy_from_slice(&self.word[self.used..self.used + length]);
            self.used += length;
            rest = later;
        }
        self.left -= count as u64;
        Ok(count)
    }
}

/// SHA-256 of everything there is to read, in hex.
pub fn digest_of(from: &mut impl Read) -> Result<String> {
    let mut digest = Sha256::new();
    copy(from, &mut digest)?;
    Ok(hex::encode(digest.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_the_same_every_time_and_as_long_as_wanted() {
        let mut all = Vec::new();
        Noise::of(1001).read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), 1001);
        assert_eq!(digest_of(&mut &all[..]).unwrap(), Noise::digest(1001).unwrap());
        assert_ne!(Noise::digest(1000).unwrap(), Noise::digest(1001).unwrap());
        let mut single = vec![0; 1001];
        let mut noise = Noise::of(1001);
        single.chunks_mut(1).for_each(|byte| noise.read_exact(byte).unwrap());
        assert_eq!(single, all, "however it is read");
    }
}
