//! The two messages of a handshake, from either side.

use zeroize::Zeroizing;

use super::cookies::MACS_BYTES;
use super::keys::{Shared, agree, agree_all, public, random};
use super::symmetric::{Hmac, derive, hash, seal, unseal};

/// Length of an initiation.
pub(crate) const INITIATION_BYTES: usize = 148;
/// Length of a response.
pub(crate) const RESPONSE_BYTES: usize = 92;
const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// TAI64 counts from here to 1970 (and ten leap seconds).
const TAI64_1970: u64 = 1 << 62;

/// Our key pair.
pub(crate) struct Local {
    private: Zeroizing<[u8; 32]>,
    public: [u8; 32],
    /// Under the chaining key of the construction.
    first: Hmac,
    /// Of what is known before any message to us.
    hash: [u8; 32],
    /// Of the construction alone, for messages to others.
    hash_to: [u8; 32],
}

/// The other side of a tunnel.
pub(crate) struct Remote {
    pub(crate) public: [u8; 32],
    /// All zeroes: none.
    pub(crate) preshared: Zeroizing<[u8; 32]>,
    /// Between its static key and ours.
    pub(crate) shared: Shared,
}

/// What an initiator has to remember until the response.
pub(crate) struct Initiated {
    pub(crate) local_index: u32,
    ephemeral: Zeroizing<[u8; 32]>,
    chaining_key: Zeroizing<[u8; 32]>,
    hash: [u8; 32],
}

/// When a tunnel began its last handshake: each begins later than the one before, also within a millisecond and when the
/// clock is set back. Of one tunnel, so that no peer learns how many handshakes there are with others.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stamp {
    unix_ns: u64,
}

impl Stamp {
    fn next(&mut self, unix_ms: u64) -> [u8; 12] {
        self.unix_ns = unix_ms.saturating_mul(1_000_000).max(self.unix_ns.saturating_add(1));
        tai64n(self.unix_ns)
    }
}

/// An initiation whose static key was decrypted. Anybody can write any public key there: only a timestamp that decrypts
/// proves it.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Opened {
    pub(crate) public_key: [u8; 32],
    chaining_key: Zeroizing<[u8; 32]>,
    hash: [u8; 32],
}

/// An initiation by whoever has the private key of the public one.
#[derive(Clone)]
pub(crate) struct Proved {
    pub(crate) timestamp: Timestamp,
    public_key: [u8; 32],
    index: u32,
    ephemeral: [u8; 32],
    chaining_key: Zeroizing<[u8; 32]>,
    hash: [u8; 32],
}

/// An initiation that can be answered: the key of the answer is drawn.
pub(crate) struct Agreed {
    proved: Proved,
    ephemeral_public: [u8; 32],
    /// Between that key and the initiator's ephemeral and static ones.
    shared: [Shared; 2],
}

/// What a handshake ends with.
pub(crate) struct SessionKeys {
    pub(crate) send: Zeroizing<[u8; 32]>,
    pub(crate) receive: Zeroizing<[u8; 32]>,
    /// The other side's name of the session.
    pub(crate) remote_index: u32,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opened(..)")
    }
}

impl Local {
    pub(crate) fn new(private: &[u8; 32]) -> Self {
        let private = Zeroizing::new(*private);
        let public = public(&private);
        let chaining_key = hash(CONSTRUCTION, &[]);
        let hash_to = hash(&chaining_key, IDENTIFIER);
        Self { private, public, first: Hmac::new(&chaining_key), hash: hash(&hash_to, &public), hash_to }
    }

    pub(crate) fn public(&self) -> &[u8; 32] {
        &self.public
    }

    /// The secret shared with another static key, worth keeping: it costs one X25519. `None` for keys of small order.
    pub(crate) fn shared_with(&self, public_key: &[u8; 32]) -> Option<Shared> {
        agree(&self.private, public_key)
    }

    /// [`Self::shared_with`] each.
    pub(crate) fn shared_with_all(&self, public_keys: &[[u8; 32]]) -> Vec<Option<Shared>> {
        agree_all(&public_keys.iter().map(|key| (&*self.private, key)).collect::<Vec<_>>())
    }

    /// Whose initiations these claim to be. Costs one X25519 each. The MACs are the caller's business.
    pub(crate) fn open_all(&self, initiations: &[&[u8]]) -> Vec<Option<Opened>> {
        // A message without one is none, as one with a key of small order.
        let ephemerals: Vec<_> = initiations.iter().map(|initiation| part(initiation, 8).unwrap_or_default()).collect();
        let shared = self.shared_with_all(&ephemerals);
        initiations.iter().zip(&shared).map(|(initiation, shared)| self.open(initiation, shared.as_ref()?)).collect()
    }

    /// `shared` is between our static key and the initiator's ephemeral one.
    fn open(&self, initiation: &[u8], shared: &Shared) -> Option<Opened> {
        let initiation: &[u8; INITIATION_BYTES] = initiation.try_into().ok()?;
        let ephemeral: [u8; 32] = part(initiation, 8)?;
        let sealed = &initiation[40..88];
        let before = hash(&self.hash, &ephemeral);
        let [chaining_key] = self.first.derive(&ephemeral);
        let [chaining_key, key] = derive(&chaining_key, shared.as_bytes());
        let public_key = unseal(&key, sealed, &before)?;
        Some(Opened { public_key, chaining_key, hash: hash(&before, sealed) })
    }

    /// Writes an initiation without MACs. Costs one X25519 and a key.
    pub(crate) fn initiate(
        &self,
        remote: &Remote,
        local_index: u32,
        stamp: (&mut Stamp, u64),
        room: &mut [u8],
    ) -> Option<Initiated> {
        let room = room.first_chunk_mut::<INITIATION_BYTES>()?;
        let (stamp, unix_ms) = stamp;
        let ephemeral = Zeroizing::new(random::<32>());
        let ephemeral_public = public(&ephemeral);
        let before = hash(&hash(&self.hash_to, &remote.public), &ephemeral_public);
        let [chaining_key] = self.first.derive(&ephemeral_public);
        let [chaining_key, key] = derive(&chaining_key, agree(&ephemeral, &remote.public)?.as_bytes());
        room[..4].copy_from_slice(&1_u32.to_le_bytes());
        room[4..8].copy_from_slice(&local_index.to_le_bytes());
        room[8..40].copy_from_slice(&ephemeral_public);
        seal(&key, &self.public, &before, &mut room[40..88]);
        let before = hash(&before, &room[40..88]);
        let [chaining_key, key] = derive(&chaining_key, remote.shared.as_bytes());
        seal(&key, &stamp.next(unix_ms), &before, &mut room[88..116]);
        let hash = hash(&before, &room[88..116]);
        Some(Initiated { local_index, ephemeral, chaining_key, hash })
    }

    /// Reads the response to an initiation of ours. Costs two X25519.
    pub(crate) fn finish(&self, remote: &Remote, initiated: &Initiated, response: &[u8]) -> Option<SessionKeys> {
        let response: &[u8; RESPONSE_BYTES] = response.try_into().ok()?;
        let ephemeral: [u8; 32] = part(response, 12)?;
        let before = hash(&initiated.hash, &ephemeral);
        let [chaining_key] = derive(&initiated.chaining_key, &ephemeral);
        let [chaining_key] = derive(&chaining_key, agree(&initiated.ephemeral, &ephemeral)?.as_bytes());
        let [chaining_key] = derive(&chaining_key, agree(&self.private, &ephemeral)?.as_bytes());
        let [chaining_key, temporary, key] = derive(&chaining_key, &*remote.preshared);
        let []: [u8; 0] = unseal(&key, &response[44..60], &hash(&before, &*temporary))?;
        let [send, receive] = derive(&chaining_key, &[]);
        Some(SessionKeys { send, receive, remote_index: u32::from_le_bytes(part(response, 4)?) })
    }
}

impl Opened {
    /// `None` if the sender does not have the private key of `public_key`, with which `shared` is shared.
    pub(crate) fn prove(&self, shared: &Shared, initiation: &[u8]) -> Option<Proved> {
        let initiation: &[u8; INITIATION_BYTES] = initiation.try_into().ok()?;
        let sealed = &initiation[88..116];
        let [chaining_key, key] = derive(&self.chaining_key, shared.as_bytes());
        Some(Proved {
            timestamp: Timestamp::of(unseal(&key, sealed, &self.hash)?),
            public_key: self.public_key,
            index: u32::from_le_bytes(part(initiation, 4)?),
            ephemeral: part(initiation, 8)?,
            chaining_key,
            hash: hash(&self.hash, sealed),
        })
    }
}

impl Agreed {
    pub(crate) fn timestamp(&self) -> Timestamp {
        self.proved.timestamp
    }

    /// Draws the keys of the answers. Costs two X25519 and a key each; `None` for keys of small order.
    pub(crate) fn all(proved: &[Proved]) -> Vec<Option<Self>> {
        let ephemerals: Vec<_> = proved.iter().map(|_| Zeroizing::new(random::<32>())).collect();
        let pairs = ephemerals
            .iter()
            .zip(proved)
            .flat_map(|(ephemeral, proved)| [(&**ephemeral, &proved.ephemeral), (&**ephemeral, &proved.public_key)]);
        let shared = agree_all(&pairs.collect::<Vec<_>>());
        let (both, _) = shared.as_chunks();
        let keys = proved.iter().zip(&ephemerals);
        keys.zip(both).map(|((proved, ephemeral), both)| Self::new(proved, ephemeral, both)).collect()
    }

    fn new(proved: &Proved, ephemeral: &[u8; 32], [one, other]: &[Option<Shared>; 2]) -> Option<Self> {
        let shared = [one.clone()?, other.clone()?];
        Some(Self { proved: proved.clone(), ephemeral_public: public(ephemeral), shared })
    }

    /// Writes the response without MACs.
    pub(crate) fn respond(&self, remote: &Remote, local_index: u32, room: &mut [u8]) -> Option<SessionKeys> {
        let room = room.first_chunk_mut::<RESPONSE_BYTES>()?;
        let Self { proved, ephemeral_public, shared: [with_ephemeral, with_static] } = self;
        let before = hash(&proved.hash, ephemeral_public);
        let [chaining_key] = derive(&proved.chaining_key, ephemeral_public);
        let [chaining_key] = derive(&chaining_key, with_ephemeral.as_bytes());
        let [chaining_key] = derive(&chaining_key, with_static.as_bytes());
        let [chaining_key, temporary, key] = derive(&chaining_key, &*remote.preshared);
        room[..4].copy_from_slice(&2_u32.to_le_bytes());
        room[4..8].copy_from_slice(&local_index.to_le_bytes());
        room[8..12].copy_from_slice(&proved.index.to_le_bytes());
        room[12..44].copy_from_slice(ephemeral_public);
        seal(&key, &[], &hash(&before, &*temporary), &mut room[44..RESPONSE_BYTES - MACS_BYTES]);
        let [receive, send] = derive(&chaining_key, &[]);
        Some(SessionKeys { send, receive, remote_index: proved.index })
    }
}

fn part<const N: usize>(message: &[u8], at: usize) -> Option<[u8; N]> {
    message.get(at..at + N)?.try_into().ok()
}

fn tai64n(unix_ns: u64) -> [u8; 12] {
    let nanos = u32::try_from(unix_ns % 1_000_000_000).expect("less than a second");
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&(TAI64_1970 + 10 + unix_ns / 1_000_000_000).to_be_bytes());
    bytes[8..].copy_from_slice(&nanos.to_be_bytes());
    bytes
}
/// A TAI64N timestamp in 64 bits that keep its order: 34 of seconds since 1970 (enough until 2514), 30 of nanoseconds.
/// What lies beyond is as the end of the range. 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Timestamp(pub(crate) u64);

impl Timestamp {
    fn of(tai64n: [u8; 12]) -> Self {
        const MAX_SECONDS: u64 = (1 << 34) - 1;
        const MAX_NANOS: u64 = (1 << 30) - 1;
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3] = tai64n;
        let seconds = u64::from_be_bytes([s0, s1, s2, s3, s4, s5, s6, s7]).checked_sub(TAI64_1970);
        let nanos = u64::from(u32::from_be_bytes([n0, n1, n2, n3])).min(MAX_NANOS);
        match seconds {
            None => Self(0),
            Some(seconds) if seconds > MAX_SECONDS => Self(u64::MAX),
            Some(seconds) => Self(seconds << 30 | nanos),
        }
    }

    /// Whether an initiation with this timestamp may follow one with `greatest`. Whoever counts beyond the range is not
    /// locked out: only the tunnel's own guard tells its messages apart.
    pub(crate) fn may_follow(self, greatest: Self) -> bool {
        greatest == Self(0) || self > greatest || self == Self(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use boringtun::noise::{Tunn, TunnResult};
    use boringtun::x25519::{PublicKey, StaticSecret};
    use proptest::prelude::*;

    use super::super::Jar;
    use super::*;

    const NOW_MS: u64 = 1_800_000_000_000;

    fn open(local: &Local, initiation: &[u8]) -> Option<Opened> {
        local.open_all(&[initiation]).pop().unwrap()
    }

    fn remote(local: &Local, other: &Local, preshared: u8) -> Remote {
        let shared = local.shared_with(&other.public).unwrap();
        Remote { public: other.public, preshared: Zeroizing::new([preshared; 32]), shared }
    }

    /// Both sides' keys, if the handshake succeeds.
    fn shake(ours: u8, theirs: u8) -> Option<(SessionKeys, SessionKeys)> {
        let (alice, bob) = (Local::new(&[1; 32]), Local::new(&[2; 32]));
        let (to_bob, to_alice) = (remote(&alice, &bob, ours), remote(&bob, &alice, theirs));
        let mut initiation = [0; INITIATION_BYTES];
        let initiated = alice.initiate(&to_bob, 7, (&mut Stamp::default(), NOW_MS), &mut initiation).unwrap();
        let opened = open(&bob, &initiation).unwrap();
        assert_eq!(opened.public_key, alice.public);
        let proved = opened.prove(&to_alice.shared, &initiation).unwrap();
        let mut response = [0; RESPONSE_BYTES];
        let agreed = Agreed::all(&[proved]).pop().unwrap().unwrap();
        let at_bob = agreed.respond(&to_alice, 9, &mut response).unwrap();
        for at in (4..8).chain(12..60) {
            let mut changed = response;
            changed[at] ^= 1;
            let keys = alice.finish(&to_bob, &initiated, &changed);
            assert!(keys.is_none() || at < 8, "byte {at}");
        }
        alice.finish(&to_bob, &initiated, &response).map(|at_alice| (at_alice, at_bob))
    }

    #[test]
    fn both_sides_end_with_the_same_keys_if_they_have_the_same_preshared_one() {
        for preshared in [0, 5] {
            let (alice, bob) = shake(preshared, preshared).unwrap();
            assert_eq!((&*alice.send, &*alice.receive), (&*bob.receive, &*bob.send));
            assert_ne!(*alice.send, *alice.receive);
            assert_eq!((alice.remote_index, bob.remote_index), (9, 7));
        }
        assert!(shake(5, 6).is_none());
    }

    fn tunn(own: u8, other: u8) -> Tunn {
        let public = PublicKey::from(&StaticSecret::from([other; 32]));
        Tunn::new(StaticSecret::from([own; 32]), public, Some([5; 32]), None, 7, None)
    }

    fn written(result: TunnResult<'_>) -> Vec<u8> {
        match result {
            TunnResult::WriteToNetwork(message) => message.to_vec(),
            TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => {
                panic!("{result:?}")
            }
        }
    }

    #[test]
    fn boringtun_understands_us_and_we_it() {
        let (us, it) = (Local::new(&[1; 32]), Local::new(&[2; 32]));
        let to_it = remote(&us, &it, 5);
        let (mut room, mut theirs) = ([0; INITIATION_BYTES], vec![0; 200]);

        let initiation = written(tunn(2, 1).format_handshake_initiation(&mut theirs, false));
        let opened = open(&us, &initiation).unwrap();
        assert_eq!(opened.public_key, it.public);
        let proved = opened.prove(&to_it.shared, &initiation).unwrap();
        let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        assert!((proved.timestamp.0 >> 30).abs_diff(seconds) < 100, "now, give or take the leap seconds");

        let mut responder = tunn(2, 1);
        let initiated = us.initiate(&to_it, 0x700, (&mut Stamp::default(), NOW_MS), &mut room).unwrap();
        Jar::new(&it.public).sign(0, &mut room);
        let response = written(responder.decapsulate(None, &room, &mut theirs));
        assert!(us.finish(&to_it, &initiated, &response).is_some());
    }

    #[test]
    fn a_peer_does_not_learn_how_many_handshakes_there_are_with_others() {
        let alice = Local::new(&[1; 32]);
        let timestamp = |other: u8| {
            let bob = Local::new(&[other; 32]);
            let mut initiation = [0; INITIATION_BYTES];
            let stamp = (&mut Stamp::default(), NOW_MS);
            alice.initiate(&remote(&alice, &bob, 0), 7, stamp, &mut initiation).unwrap();
            let shared = bob.shared_with(&alice.public).unwrap();
            open(&bob, &initiation).unwrap().prove(&shared, &initiation).unwrap().timestamp
        };
        assert_eq!(timestamp(2), timestamp(3));
    }

    #[test]
    fn nothing_else_is_opened() {
        let (alice, bob, eve) = (Local::new(&[1; 32]), Local::new(&[2; 32]), Local::new(&[3; 32]));
        let to_bob = remote(&alice, &bob, 0);
        let mut initiation = [0; INITIATION_BYTES];
        alice.initiate(&to_bob, 7, (&mut Stamp::default(), NOW_MS), &mut initiation).unwrap();
        assert!(open(&eve, &initiation).is_none(), "another server");
        assert!(open(&bob, &initiation[..147]).is_none());
        let opened = open(&bob, &initiation).unwrap();
        assert!(opened.prove(&bob.shared_with(&eve.public).unwrap(), &initiation).is_none(), "the claim is not proved");
        let shared = bob.shared_with(&alice.public).unwrap();
        for at in 8..116 {
            let mut changed = initiation;
            changed[at] ^= 1;
            assert!(open(&bob, &changed).and_then(|opened| opened.prove(&shared, &changed)).is_none(), "byte {at}");
        }
        initiation[8..40].fill(0);
        assert!(open(&bob, &initiation).is_none(), "an ephemeral key of small order");
        assert!(bob.shared_with(&[0; 32]).is_none());
    }

    fn stamp(seconds: u64, nanos: u32) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&seconds.to_be_bytes());
        bytes[8..].copy_from_slice(&nanos.to_be_bytes());
        bytes
    }

    #[test]
    fn beyond_the_range_nobody_is_locked_out() {
        let (early, late) = (Timestamp::of(stamp(0, 5)), Timestamp::of([0xff; 12]));
        let now = Timestamp::of(stamp(TAI64_1970 + 1_800_000_000, 1));
        assert!(early.may_follow(Timestamp(0)) && !early.may_follow(now));
        assert!(late.may_follow(now) && late.may_follow(late));
        assert!(!now.may_follow(now) && !now.may_follow(late));
    }

    proptest! {
        #[test]
        fn packing_keeps_the_order(
            a in 0_u64..1 << 34, b in 0_u64..1 << 34, n in 0_u32..1_000_000_000, m in 0_u32..1_000_000_000,
        ) {
            let (one, other) = (stamp(TAI64_1970 + a, n), stamp(TAI64_1970 + b, m));
            prop_assert_eq!(Timestamp::of(one).cmp(&Timestamp::of(other)), one.cmp(&other));
            let same = stamp(TAI64_1970 + a, m);
            prop_assert_eq!(Timestamp::of(one).cmp(&Timestamp::of(same)), n.cmp(&m));
        }

        #[test]
        fn timestamps_follow_each_other(times in proptest::collection::vec(0_u64..1 << 42, 1..20)) {
            let mut stamp = Stamp::default();
            let stamps: Vec<_> = times.iter().map(|ms| stamp.next(*ms)).collect();
            prop_assert!(stamps.is_sorted_by(|one, next| one < next), "the clock may do what it wants");
        }
    }
}
