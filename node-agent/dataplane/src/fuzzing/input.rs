//! The bytes of the fuzzer as small numbers and slices.

/// What is left of them.
pub(super) struct Input<'a>(pub(super) &'a [u8]);

impl<'a> Input<'a> {
    pub(super) fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    pub(super) fn word(&mut self) -> Option<u16> {
        let (first, rest) = self.0.split_first_chunk::<2>()?;
        self.0 = rest;
        Some(u16::from_le_bytes(*first))
    }

    /// So many bytes, or as many as there are.
    pub(super) fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (first, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        first
    }

    /// Bytes behind their length.
    pub(super) fn chunk(&mut self) -> Option<&'a [u8]> {
        let len = self.word()?;
        Some(self.bytes(len.into()))
    }
}
