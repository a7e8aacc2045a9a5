//! Append-only files of checked frames: `magic (8) | frame*`, frame = `length u32 | crc of length u32 | crc of
//! payload u32 | payload`, all little endian.
//!
//! The header has a check sum of its own, so that a torn tail (the last frame was not written whole: normal after a
//! crash, cut off) can be told from damage in the middle (refused: what follows cannot be trusted).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

const MAGIC_BYTES: usize = 8;
const HEADER_BYTES: usize = 12;
/// A frame holds at most a full snapshot: 2^20 peers of about 140 bytes.
const MAX_FRAME_BYTES: usize = 256 << 20;

/// An open frame file. Appended frames are durable after [`FrameFile::sync`].
#[derive(Debug)]
pub(crate) struct FrameFile {
    file: File,
    path: PathBuf,
    length: u64,
    dirty: bool,
}

/// Where a frame's payload lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Location {
    offset: u64,
    length: u32,
    crc: u32,
}

impl Location {
    /// Bytes the frame takes in the file.
    pub(crate) fn bytes(self) -> u64 {
        u64::from(self.length) + HEADER_BYTES as u64
    }
}

/// What a file held when it was opened.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) frames: Vec<(Location, Vec<u8>)>,
    /// Bytes of an unfinished last frame that were cut off.
    pub(crate) torn_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("cannot be read or written")]
    Io(#[from] io::Error),
    #[error("is of another format or a newer version")]
    Magic,
    #[error("is damaged at byte {offset}")]
    Damaged { offset: u64 },
}

impl FrameFile {
    /// Opens or makes a file, reads every frame, cuts off a torn tail.
    ///
    /// # Errors
    /// [`FrameError::Magic`] and [`FrameError::Damaged`] leave the file as it is.
    pub(crate) fn open(path: &Path, magic: &[u8; MAGIC_BYTES]) -> Result<(Self, Recovered), FrameError> {
        let content = match std::fs::read(path) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                crate::state_dir::replace_file(path, magic)?;
                magic.to_vec()
            }
            Err(error) => return Err(error.into()),
        };
        if content.get(..MAGIC_BYTES) != Some(magic.as_slice()) {
            return Err(FrameError::Magic);
        }
        let (frames, end) = parse(&content)?;
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let torn_bytes = content.len() as u64 - end;
        if torn_bytes > 0 {
            file.set_len(end)?;
            file.sync_all()?;
        }
        let frames = frames
            .into_iter()
            .map(|location| {
                let start = usize::try_from(location.offset).expect("the file was read into memory");
                (location, content[start..start + location.length as usize].to_vec())
            })
            .collect();
        Ok((Self { file, path: path.to_owned(), length: end, dirty: false }, Recovered { frames, torn_bytes }))
    }

    /// Appends one frame. A failed append leaves the file as it was.
    ///
    /// # Errors
    /// When the disk is full or broken.
    pub(crate) fn append(&mut self, payload: &[u8]) -> io::Result<Location> {
        let (header, crc) = header(payload)?;
        let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
        frame.extend_from_slice(&header);
        frame.extend_from_slice(payload);
        if let Err(error) = self.file.write_all_at(&frame, self.length) {
            self.file.set_len(self.length)?;
            return Err(error);
        }
        let location = Location {
            offset: self.length + HEADER_BYTES as u64,
            length: u32::try_from(payload.len()).expect("checked by header()"),
            crc,
        };
        self.length += frame.len() as u64;
        self.dirty = true;
        Ok(location)
    }

    /// Makes everything appended so far durable.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        if self.dirty {
            self.file.sync_data()?;
            self.dirty = false;
        }
        Ok(())
    }

    /// Reads one frame back and checks it.
    pub(crate) fn read(&self, location: Location) -> Result<Vec<u8>, FrameError> {
        let mut payload = vec![0; location.length as usize];
        self.file.read_exact_at(&mut payload, location.offset)?;
        if crc32fast::hash(&payload) == location.crc {
            Ok(payload)
        } else {
            Err(FrameError::Damaged { offset: location.offset })
        }
    }

    /// Replaces the whole file by these frames, atomically and durably. Answers their locations, in order.
    pub(crate) fn rewrite(&mut self, magic: &[u8; MAGIC_BYTES], frames: &[Vec<u8>]) -> io::Result<Vec<Location>> {
        let mut content = magic.to_vec();
        let mut locations = Vec::with_capacity(frames.len());
        for payload in frames {
            let (header, crc) = header(payload)?;
            content.extend_from_slice(&header);
            let offset = content.len() as u64;
            content.extend_from_slice(payload);
            let length = u32::try_from(payload.len()).expect("checked by header()");
            locations.push(Location { offset, length, crc });
        }
        self.file = crate::state_dir::replace_file(&self.path, &content)?;
        self.length = content.len() as u64;
        self.dirty = false;
        Ok(locations)
    }

    pub(crate) fn length(&self) -> u64 {
        self.length
    }
}

/// Cuts a damaged file where the damage begins: the frames before it can be used.
pub(crate) fn cut(path: &Path, offset: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.set_len(offset)?;
    file.sync_all()
}

fn header(payload: &[u8]) -> io::Result<([u8; HEADER_BYTES], u32)> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|length| *length as usize <= MAX_FRAME_BYTES)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a frame is too long"))?
        .to_le_bytes();
    let crc = crc32fast::hash(payload);
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&length);
    header[4..8].copy_from_slice(&crc32fast::hash(&length).to_le_bytes());
    header[8..].copy_from_slice(&crc.to_le_bytes());
    Ok((header, crc))
}

/// The whole frames and where they end.
fn parse(content: &[u8]) -> Result<(Vec<Location>, u64), FrameError> {
    let mut frames = Vec::new();
    let mut at = MAGIC_BYTES;
    loop {
        let rest = &content[at..];
        if rest.len() < HEADER_BYTES || rest.iter().all(|byte| *byte == 0) {
            return Ok((frames, at as u64));
        }
        let word = |n: usize| u32::from_le_bytes(rest[n..n + 4].try_into().expect("four bytes"));
        let (length, crc) = (word(0), word(8));
        if crc32fast::hash(&rest[..4]) != word(4) || length as usize > MAX_FRAME_BYTES {
            return Err(FrameError::Damaged { offset: at as u64 });
        }
        let end = HEADER_BYTES + length as usize;
        let whole = rest.get(HEADER_BYTES..end).is_some_and(|payload| crc32fast::hash(payload) == crc);
        if !whole && end < rest.len() {
            return Err(FrameError::Damaged { offset: at as u64 });
        }
        if !whole {
            return Ok((frames, at as u64));
        }
        frames.push(Location { offset: (at + HEADER_BYTES) as u64, length, crc });
        at += end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAGIC: &[u8; 8] = b"CVTEST\0\x01";

    fn payloads(recovered: &Recovered) -> Vec<Vec<u8>> {
        recovered.frames.iter().map(|(_, payload)| payload.clone()).collect()
    }

    proptest! {
        #[test]
        fn cutting_a_file_anywhere_loses_only_the_frames_behind_the_cut(
            frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..8),
            cut in 0usize..400,
        ) {
            let root = tempfile::tempdir().unwrap();
            let path = root.path().join("f");
            let (mut file, _) = FrameFile::open(&path, MAGIC).unwrap();
            let mut ends = vec![MAGIC_BYTES];
            for payload in &frames {
                file.append(payload).unwrap();
                ends.push(usize::try_from(file.length()).unwrap());
            }
            let content = std::fs::read(&path).unwrap();
            let cut = MAGIC_BYTES + cut % (content.len() - MAGIC_BYTES + 1);
            std::fs::write(&path, &content[..cut]).unwrap();
            let whole = ends.iter().filter(|end| **end <= cut).count() - 1;
            let (mut file, recovered) = FrameFile::open(&path, MAGIC).unwrap();
            prop_assert_eq!(payloads(&recovered), frames[..whole].to_vec());
            file.append(b"after").unwrap();
            let (_, recovered) = FrameFile::open(&path, MAGIC).unwrap();
            prop_assert_eq!(recovered.frames.len(), whole + 1);
        }

        #[test]
        fn a_flipped_bit_is_never_taken_for_data(bit in 64usize..(8 + 3 * 32) * 8) {
            let root = tempfile::tempdir().unwrap();
            let path = root.path().join("f");
            let (mut file, _) = FrameFile::open(&path, MAGIC).unwrap();
            let frames = [[1u8; 20], [2; 20], [3; 20]];
            for payload in &frames { file.append(payload).unwrap(); }
            let mut content = std::fs::read(&path).unwrap();
            content[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &content).unwrap();
            match FrameFile::open(&path, MAGIC) {
                Ok((_, recovered)) => prop_assert_eq!(payloads(&recovered), frames[..2].iter().map(|f| f.to_vec()).collect::<Vec<_>>()),
                Err(FrameError::Damaged { .. }) => {}
                Err(other) => prop_assert!(false, "{other}"),
            }
        }
    }

    #[test]
    fn another_format_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("f");
        std::fs::write(&path, b"something else").unwrap();
        assert!(matches!(FrameFile::open(&path, MAGIC), Err(FrameError::Magic)));
    }

    #[test]
    fn a_rewritten_file_has_only_the_new_frames() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("f");
        let (mut file, _) = FrameFile::open(&path, MAGIC).unwrap();
        file.append(b"old").unwrap();
        let locations = file.rewrite(MAGIC, &[b"new".to_vec()]).unwrap();
        assert_eq!(file.read(locations[0]).unwrap(), b"new");
        file.append(b"more").unwrap();
        let (_, recovered) = FrameFile::open(&path, MAGIC).unwrap();
        assert_eq!(payloads(&recovered), [b"new".to_vec(), b"more".to_vec()]);
    }
}
