//! Serving the socket.

use std::fs::{DirBuilder, Permissions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::door::Door;
use super::parse::{Invalid, SetParser, SetRequest};
use super::{SOCKET_DIR, format};
use crate::change::PeerChange;
use crate::io::fleet::Fleet;
use crate::io::mailbox::{Reply, Request, WorkerGone};

/// Clients served at the same time; more wait for the end of one, which is bounded in time.
pub(super) const MAX_CLIENTS: usize = 8;
/// The longest line is a key of 64 digits and its name.
const MAX_LINE: usize = 256;
/// 65,000 peers take about 26 MB.
const MAX_REQUEST: usize = 64 * 1024 * 1024;
/// What one `read` may bring: a large request takes hundreds of them instead of thousands.
const READ_BYTES: usize = 64 * 1024;
/// What the first may bring: most requests change a peer or two, and what holds them is zeroed before and after.
pub(super) const SMALL_BYTES: usize = 4096;
/// Peers of a portion for the worker, or asked of it, at a time: less than a millisecond of its attention.
const CHUNK: usize = 256;
/// Prefixes after which no other peer belongs to the portion; of one peer there are no more at a time.
const CHUNK_TENANTS: usize = 64;
const CHUNK_PREFIXES: usize = 2 * CHUNK;
/// How long a client may be silent, or leave an answer unread.
pub(super) const CLIENT_SILENCE: Duration = Duration::from_secs(5);
/// How long a client may take to send one request, or to read one answer.
const CLIENT_PATIENCE: Duration = Duration::from_secs(60);

/// Where the socket of an interface is.
pub(crate) fn socket_path(interface: &str) -> PathBuf {
    Path::new(SOCKET_DIR).join(format!("{interface}.sock"))
}

/// What lies at the path of the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Occupant {
    Nobody,
    Somebody,
}

/// Whether somebody answers there.
pub(crate) fn occupant(path: &Path) -> Occupant {
    match UnixStream::connect(path) {
        Ok(_) => Occupant::Somebody,
        Err(_) => Occupant::Nobody,
    }
}

/// The directory of the sockets, writable by root alone.
pub(crate) fn create_dir() -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(SOCKET_DIR)
}

/// Binds the socket, taking over a path that nobody listens on any more.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    create_dir()?;
    if occupant(path) == Occupant::Somebody {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// What every client thread shares.
pub(crate) struct Server {
    controller: Fleet,
    /// One `set` at a time: a replacement of all peers spans several letters to the worker.
    setting: Mutex<Device>,
}

/// Whether the workers have done all that changes of the device asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Device {
    /// Another change is worth telling them even if it asks for nothing: a socket that could not be bound is tried again.
    #[default]
    Pending,
    Done,
}

impl Server {
    pub(crate) fn new(controller: Fleet) -> Arc<Self> {
        Arc::new(Self { controller, setting: Mutex::default() })
    }

    /// Serves clients from now on, on threads of its own, until the process ends.
    ///
    /// # Errors
    /// When there is no thread to be had, or the socket cannot be used.
    pub(crate) fn start(self: &Arc<Self>, listener: UnixListener) -> io::Result<()> {
        let door = Door::new(Arc::clone(self), listener)?;
        std::thread::Builder::new().name("uapi-door".into()).spawn(move || door.keep())?;
        Ok(())
    }

    /// Serves one client to its end, after telling it what it is `owed`.
    pub(super) fn attend(&self, stream: &UnixStream, owed: Option<String>) {
        match catch_unwind(AssertUnwindSafe(|| self.serve(stream, owed))) {
            Ok(Ok(())) => {}
            // it has read as much as it wanted
            Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Ok(Err(error)) => tracing::debug!(%error, "a client of the control socket failed"),
            Err(_) => tracing::error!("a request on the control socket panicked"),
        }
    }

    fn serve(&self, mut stream: &UnixStream, owed: Option<String>) -> io::Result<()> {
        stream.set_read_timeout(Some(CLIENT_SILENCE))?;
        stream.set_write_timeout(Some(CLIENT_SILENCE))?;
        if let Some(owed) = owed {
            stream.write_all(owed.as_bytes())?;
        }
        let mut lines = Lines::new(stream);
        loop {
            lines.begin_request();
            let errno = match operation(&mut lines)? {
                Operation::End => return Ok(()),
                Operation::Get => errno(self.get(stream)?),
                Operation::Set => match read_set(&mut lines) {
                    Ok(request) => errno(self.set(request)),
                    Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                        stream.write_all(answer(libc::EINVAL).as_bytes())?;
                        return Ok(());
                    }
                    Err(error) => return Err(error),
                },
                Operation::Unknown => {
                    stream.write_all(answer(libc::EPROTO).as_bytes())?;
                    return Ok(());
                }
            };
            stream.write_all(answer(errno).as_bytes())?;
        }
    }

    fn get(&self, stream: &UnixStream) -> io::Result<Result<i32, WorkerGone>> {
        let until = Instant::now() + CLIENT_PATIENCE;
        let Ok(Reply::Device(state)) = self.controller.ask(Request::Describe) else {
            return Ok(Err(WorkerGone));
        };
        write_until(stream, Zeroizing::new(format::device(&state)).as_bytes(), until)?;
        let mut next = Some(0);
        while let Some(from) = next {
            let Ok(Reply::Tenants { tenants, next: more }) =
                self.controller.ask(Request::Tenants { from, limit: CHUNK_TENANTS })
            else {
                return Ok(Err(WorkerGone));
            };
            let mut text = String::new();
            for (id, settings) in &tenants {
                format::tenant(&mut text, id, settings);
            }
            write_until(stream, text.as_bytes(), until)?;
            next = more;
        }
        let mut next = Some(0);
        let mut text = Zeroizing::new(String::with_capacity(CHUNK * 600));
        while let Some(from) = next {
            let Ok(Reply::Peers { peers, next: more }) = self.controller.ask(Request::List { from, limit: CHUNK })
            else {
                return Ok(Err(WorkerGone));
            };
            text.clear();
            for peer in &peers {
                format::peer(&mut text, peer);
            }
            write_until(stream, text.as_bytes(), until)?;
            next = more;
        }
        Ok(Ok(0))
    }

    /// Does what `text` asks for and says how it ended, if that is no more than a change of a few peers, which nobody has to be
    /// waited for to make.
    pub(super) fn change_at_once(&self, text: &[u8]) -> Option<i32> {
        let peers = only_peers(text)?;
        let setting = match self.setting.try_lock() {
            Ok(setting) => setting,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        if *setting == Device::Pending {
            return None;
        }
        Some(self.controller.ask_at_once(Request::Peers(peers))?.errno())
    }

    fn set(&self, request: SetRequest) -> Result<i32, WorkerGone> {
        let mut setting = self.setting.lock().unwrap_or_else(PoisonError::into_inner);
        let SetRequest { device, replace_peers, end_replace, peers } = request;
        if *setting == Device::Pending || !device.is_empty() {
            *setting = Device::Pending;
            let errno = self.done(Request::Device(device))?;
            if errno != 0 {
                return Ok(errno);
            }
            *setting = Device::Done;
        }
        if replace_peers {
            self.done(Request::BeginReplace)?;
        }
        let made = self.make(peers);
        if made.is_err() && replace_peers {
            // Who was named in what the worker did not answer is not to be taken for removed.
            self.done(Request::AbandonReplace)?;
        }
        let mut errno = made?;
        // What was begun is ended, even when a peer was refused; but that peer may be one of an earlier process.
        if replace_peers || (end_replace && errno == 0) {
            let mut settled = self.done(Request::EndReplace)?;
            while settled == libc::EAGAIN {
                settled = self.done(Request::Settle)?;
            }
            errno = if errno == 0 { settled } else { errno };
        }
        Ok(errno)
    }

    /// Adds, changes and removes peers, in portions if they are many.
    fn make(&self, peers: Vec<PeerChange>) -> Result<i32, WorkerGone> {
        let most = peers.len().min(CHUNK);
        let mut peers = peers.into_iter().flat_map(|peer| peer.parts(CHUNK_PREFIXES)).peekable();
        let first = chunk(&mut peers, most);
        if peers.peek().is_some() {
            let mut portions = vec![first];
            while peers.peek().is_some() {
                portions.push(chunk(&mut peers, CHUNK));
                // Who waits for this processor has a packet, most likely.
                std::thread::yield_now();
            }
            self.done(Request::Portions(portions.into_iter()))
        } else if !first.is_empty() {
            self.done(Request::Peers(first))
        } else {
            Ok(0)
        }
    }

    fn done(&self, request: Request) -> Result<i32, WorkerGone> {
        Ok(self.controller.ask(request)?.errno())
    }
}

/// `most` is how many there will be, most often.
fn chunk(peers: &mut impl Iterator<Item = PeerChange>, most: usize) -> Vec<PeerChange> {
    let mut chunk = Vec::with_capacity(most);
    let mut prefixes = 0;
    while chunk.len() < CHUNK
        && prefixes < CHUNK_PREFIXES
        && let Some(peer) = peers.next()
    {
        prefixes += peer.allowed_ips.len() + peer.removed_ips.len();
        chunk.push(peer);
    }
    chunk
}

/// A client that reads a little now and then is not silent, but it must come to an end.
fn write_until(mut stream: &UnixStream, mut bytes: &[u8], until: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        if Instant::now() > until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match stream.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn errno(result: Result<i32, WorkerGone>) -> i32 {
    result.unwrap_or(libc::EIO)
}

/// Errors are negative, as wireguard-go answers and `wg` expects.
pub(super) fn answer(errno: i32) -> String {
    format!("errno={}\n\n", -errno)
}

/// The first line of a request.
enum Operation {
    Get,
    Set,
    Unknown,
    /// The client is done.
    End,
}

fn operation<R: Read>(lines: &mut Lines<R>) -> io::Result<Operation> {
    let operation = match lines.next() {
        Ok(None) => Operation::End,
        Ok(Some("get=1")) => Operation::Get,
        Ok(Some("set=1")) => Operation::Set,
        Ok(Some(_)) => Operation::Unknown,
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Operation::Unknown,
        Err(error) => return Err(error),
    };
    let is_whole = !matches!(operation, Operation::Get) || lines.next()? == Some("");
    Ok(if is_whole { operation } else { Operation::Unknown })
}

/// The changes that a client's bytes ask for, until it would be refused.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn requests(client: impl Read) -> Vec<SetRequest> {
    let mut lines = Lines::new(client);
    let mut requests = Vec::new();
    loop {
        lines.begin_request();
        match operation(&mut lines) {
            Ok(Operation::Get) => {}
            Ok(Operation::Set) => match read_set(&mut lines) {
                Ok(request) => requests.push(request),
                Err(_) => return requests,
            },
            Ok(Operation::Unknown | Operation::End) | Err(_) => return requests,
        }
    }
}

/// The changes that a text asks for, if it is one request, whole, and about nothing else.
fn only_peers(text: &[u8]) -> Option<Vec<PeerChange>> {
    // And a byte, or it would look for more room before it finds the end.
    let mut lines = Lines::with_room(text, text.len() + 1);
    let Ok(Operation::Set) = operation(&mut lines) else {
        return None;
    };
    let SetRequest { device, replace_peers: false, end_replace: false, peers } = read_set(&mut lines).ok()? else {
        return None;
    };
    let is_all = device.is_empty() && matches!(lines.next(), Ok(None));
    is_all.then_some(peers)
}

fn read_set<R: Read>(lines: &mut Lines<R>) -> io::Result<SetRequest> {
    let mut parser = SetParser::default();
    loop {
        match lines.next()? {
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
            Some("") => return Ok(parser.finish()),
            Some(line) => parser.line(line).map_err(|Invalid| io::Error::from(io::ErrorKind::InvalidData))?,
        }
    }
}

/// The lines of one client's requests, bounded in length, number and time.
struct Lines<R> {
    reader: R,
    /// Holds keys, among others.
    buffer: Zeroizing<Vec<u8>>,
    /// What was read and not yet returned.
    unread: Range<usize>,
    bytes_left: usize,
    started: Option<Instant>,
}

impl<R: Read> Lines<R> {
    fn new(reader: R) -> Self {
        Self::with_room(reader, SMALL_BYTES)
    }

    /// `room`: bytes that the first read may bring.
    fn with_room(reader: R, room: usize) -> Self {
        let buffer = Zeroizing::new(vec![0; room]);
        Self { reader, buffer, unread: 0..0, bytes_left: MAX_REQUEST, started: None }
    }

    /// Each request has its own bounds.
    fn begin_request(&mut self) {
        self.bytes_left = MAX_REQUEST;
        self.started = None;
    }

    /// The next line without its end; `None` when the client hung up between lines.
    fn next(&mut self) -> io::Result<Option<&str>> {
        let len = loop {
            let unread = &self.buffer[self.unread.clone()];
            let longest = &unread[..unread.len().min(MAX_LINE)];
            match memchr::memchr(b'\n', longest) {
                Some(len) => break len,
                None if unread.len() >= MAX_LINE => return Err(io::ErrorKind::InvalidData.into()),
                None => {}
            }
            if self.fill()? == 0 {
                let torn = !self.unread.is_empty();
                return if torn { Err(io::ErrorKind::InvalidData.into()) } else { Ok(None) };
            }
        };
        let start = self.unread.start;
        self.unread.start += len + 1;
        self.bytes_left = self.bytes_left.checked_sub(len + 1).ok_or(io::ErrorKind::InvalidData)?;
        let line = str::from_utf8(&self.buffer[start..start + len]).map_err(|_| io::ErrorKind::InvalidData)?;
        Ok(Some(line))
    }

    /// Reads more behind the unread bytes, which are less than a line.
    fn fill(&mut self) -> io::Result<usize> {
        if self.unread.end == self.buffer.len() && self.buffer.len() < READ_BYTES {
            // There is more of it than was expected.
            let mut larger = Zeroizing::new(vec![0; READ_BYTES]);
            larger[..self.unread.len()].copy_from_slice(&self.buffer[self.unread.clone()]);
            self.buffer = larger;
        } else {
            self.buffer.copy_within(self.unread.clone(), 0);
        }
        self.unread = 0..self.unread.len();
        let read = loop {
            match self.reader.read(&mut self.buffer[self.unread.end..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => break done?,
            }
        };
        self.unread.end += read;
        // From the first bytes on: between requests a client may be silent for as long as its socket allows.
        if self.started.get_or_insert_with(Instant::now).elapsed() > CLIENT_PATIENCE {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;
    use std::thread;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;
    use crate::counters::{CounterTable, Field};
    use crate::engine::{Engine, EngineConfig, Now};
    use crate::io::mailbox::{DeviceState, Mailbox, ShellState, mailbox};
    use crate::out::Out;

    /// A peer of an earlier process, of generation 5 and with 1234 bytes, that nobody has added again.
    const LEFT_KEY: &str = "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee";

    /// An engine behind a mailbox, without TUN and sockets.
    fn worker(mailbox: &Mailbox) {
        let counters = CounterTable::anonymous(600, [1; 16]).unwrap();
        counters.occupy(0, &[0xee; 32], 5);
        counters.add(0, Field::RxInner, 1234);
        let mut engine = Engine::new(EngineConfig { counters, seed: 1 });
        let mut out = Out::default();
        loop {
            poll(&mut [PollFd::from_borrowed_fd(mailbox.fd(), PollFlags::IN)], None).unwrap();
            mailbox.clear_wake();
            while let Some(mail) = mailbox.next() {
                let reply = match mail.request {
                    Request::Device(change) => {
                        change.private_key.iter().for_each(|key| engine.set_private_key(key));
                        engine.change_policy(Now::default(), change.policy).unwrap();
                        Reply::Done(0)
                    }
                    Request::Peers(changes) => {
                        assert!(changes.len() <= CHUNK);
                        let mut apply = |change| engine.apply_peer(Now::default(), change, &mut out);
                        let done = changes.into_iter().try_for_each(&mut apply);
                        Reply::Done(done.map_or(libc::ENOSPC, |()| 0))
                    }
                    Request::Portions(portions) => {
                        assert!(portions.as_slice().iter().all(|portion| portion.len() <= CHUNK));
                        let mut apply = |change| engine.apply_peer(Now::default(), change, &mut out);
                        let done = portions.flatten().try_for_each(&mut apply);
                        Reply::Done(done.map_or(libc::ENOSPC, |()| 0))
                    }
                    Request::BeginReplace => {
                        engine.begin_replace();
                        Reply::Done(0)
                    }
                    Request::EndReplace => {
                        engine.end_replace();
                        Reply::Done(libc::EAGAIN)
                    }
                    Request::Settle => {
                        engine.settle(1000, |_| Ok::<(), ()>(())).unwrap();
                        Reply::Done(0)
                    }
                    Request::Describe => Reply::Device(Box::new(DeviceState {
                        view: engine.device(),
                        listen_port: 51820,
                        fwmark: 0,
                        shell: ShellState::default(),
                        workers: Vec::new(),
                    })),
                    Request::Tenants { from, limit } => {
                        let (tenants, next) = engine.tenants(from, limit);
                        Reply::Tenants { tenants, next }
                    }
                    Request::List { from, limit } => {
                        let (peers, next) = engine.peers(u16::try_from(from).unwrap(), limit);
                        Reply::Peers { peers, next: next.map(u32::from) }
                    }
                    Request::Notices(notices) => {
                        engine.on_notices(notices);
                        Reply::Done(0)
                    }
                    Request::AbandonReplace => {
                        engine.abandon_replace();
                        Reply::Done(0)
                    }
                    Request::Policy(_) => panic!("a fleet asks it of several workers"),
                    Request::Stop => return,
                };
                mail.reply.send(reply).unwrap();
            }
        }
    }

    /// Sends everything on one connection and returns all answers.
    fn talk(request: &str) -> String {
        let (controller, mailbox) = mailbox().unwrap();
        let engine = thread::spawn(move || worker(&mailbox));
        let fleet = Fleet::new(vec![controller.clone()], vec![Arc::default()], 600, &[]);
        let server = Server::new(fleet);
        let (mut client, ours) = UnixStream::pair().unwrap();
        let serving = thread::spawn(move || server.serve(&ours, None));
        client.write_all(request.as_bytes()).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        serving.join().unwrap().unwrap();
        assert!(controller.ask(Request::Stop).is_err(), "it stops without an answer");
        engine.join().unwrap();
        answer
    }

    fn peers(numbers: std::ops::Range<u16>) -> String {
        numbers.map(|n| format!("public_key={n:064x}\nallowed_ip=10.8.{}.{}/32\n", n >> 8, n & 0xff)).collect()
    }

    #[test]
    fn what_is_set_can_be_got_on_the_same_connection() {
        let key = format!("08{}41", "01".repeat(30));
        let answer = talk(&format!("set=1\nprivate_key={key}\n{}\nget=1\n\n", peers(1..600)));
        assert!(answer.starts_with(&format!("errno=0\n\nprivate_key={key}\nlisten_port=51820\n")));
        assert!(answer.ends_with("errno=0\n\n"));
        assert_eq!(answer.matches("\npublic_key=").count(), 599, "over several letters to the worker");
        assert!(answer.contains("\nallowed_ip=10.8.2.87/32\n"));
        assert!(answer.contains("\ncvault_drop_spoofed=0\n"));
    }

    #[test]
    fn a_replacement_leaves_the_named_peers() {
        let answer = talk(&format!("set=1\n{}\nset=1\nreplace_peers=true\n{}\nget=1\n\n", peers(1..9), peers(5..7)));
        assert_eq!(answer.matches("public_key=").count(), 2);
        assert!(answer.starts_with("errno=0\n\nerrno=0\n\n"));
    }

    #[test]
    fn the_end_of_a_replace_alone_closes_what_nobody_added() {
        let left = |answer: &str| answer.lines().filter(|line| *line == "errno=0").count();
        let answer = talk(&format!(
            "set=1\ncvault_end_replace=true\n{}\nset=1\npublic_key={LEFT_KEY}\ncvault_generation=5\n\nget=1\n\n",
            peers(1..3)
        ));
        assert_eq!(left(&answer), 3, "{answer}");
        assert!(
            answer.contains("\ncvault_generation=5\ncvault_rx_inner=1234\n"),
            "a closed life goes on from its final counters: {answer}"
        );
        let answer =
            talk(&format!("set=1\ncvault_end_replace=true\npublic_key={LEFT_KEY}\ncvault_generation=5\n\nget=1\n\n"));
        assert!(
            answer.contains("\ncvault_generation=5\ncvault_rx_inner=1234\n"),
            "the peers of the same request are added first: {answer}"
        );
        let answer = talk(&format!(
            "set=1\ncvault_end_replace=true\n{}\nset=1\npublic_key={LEFT_KEY}\ncvault_generation=5\n\nget=1\n\n",
            peers(1..700)
        ));
        assert!(answer.starts_with("errno=-28\n"));
        assert!(
            answer.contains("\ncvault_generation=5\ncvault_rx_inner=1234\n"),
            "a request that failed closes nothing"
        );
    }

    #[test]
    fn a_bad_request_is_refused_as_a_whole() {
        assert_eq!(talk(&format!("set=1\n{}nonsense=1\n\n", peers(1..3))), "errno=-22\n\n");
        assert_eq!(talk("hello\n"), "errno=-71\n\n");
        assert_eq!(talk(""), "");
        assert!(talk(&format!("set=1\n{}\n", peers(1..700))).starts_with("errno=-28"), "more peers than slots");
    }

    #[test]
    fn all_tenants_are_read_though_few_at_a_time() {
        let sections: String =
            (1..=3 * CHUNK_TENANTS).map(|n| format!("cvault_tenant_settings={n:032x}\ncvault_smtp=allow\n")).collect();
        let answer = talk(&format!("set=1\n{sections}\nget=1\n\n"));
        let mut read: Vec<_> = answer.lines().filter_map(|line| line.strip_prefix("cvault_tenant_settings=")).collect();
        read.sort_unstable();
        assert_eq!(read, (1..=3 * CHUNK_TENANTS).map(|n| format!("{n:032x}")).collect::<Vec<_>>());
    }

    #[test]
    fn the_workers_hear_of_the_device_only_when_something_is_asked_of_it_or_was_not_done() {
        let (controller, mailbox) = mailbox().unwrap();
        // The port is taken at first.
        let worker = thread::spawn(move || {
            let mut letters = Vec::new();
            let mut binds = [libc::EADDRINUSE, libc::EADDRINUSE, 0, 0].into_iter();
            loop {
                poll(&mut [PollFd::from_borrowed_fd(mailbox.fd(), PollFlags::IN)], None).unwrap();
                mailbox.clear_wake();
                while let Some(mail) = mailbox.next() {
                    let (letter, errno) = match mail.request {
                        Request::Device(_) => ("device", binds.next().unwrap()),
                        Request::Peers(_) => ("peers", 0),
                        Request::Stop => return letters,
                        Request::Portions(_)
                        | Request::Policy(_)
                        | Request::BeginReplace
                        | Request::AbandonReplace
                        | Request::EndReplace
                        | Request::Settle
                        | Request::Describe
                        | Request::Tenants { .. }
                        | Request::List { .. }
                        | Request::Notices(_) => panic!("nothing else is asked"),
                    };
                    letters.push(letter);
                    mail.reply.send(Reply::Done(errno)).unwrap();
                }
            }
        });
        let server = Server::new(Fleet::new(vec![controller.clone()], vec![Arc::default()], 600, &[]));
        let set = |text: &str| server.set(requests(format!("set=1\n{text}\n").as_bytes()).remove(0)).unwrap();
        let peer = format!("public_key={}\n", "07".repeat(32));
        assert_eq!(set("listen_port=1\n"), libc::EADDRINUSE);
        assert_eq!(set(&peer), libc::EADDRINUSE, "it is tried again, and the peers are not told before");
        assert_eq!(set(&peer), 0);
        assert_eq!(set(&peer), 0);
        assert_eq!(set(&format!("fwmark=7\n{peer}")), 0);
        assert!(controller.ask(Request::Stop).is_err(), "it stops without an answer");
        let letters = worker.join().unwrap();
        assert_eq!(letters, ["device", "device", "device", "peers", "peers", "device", "peers"]);
    }

    #[test]
    fn lines_are_whole_however_much_comes_at_a_time() {
        let text: String = (0..3000).map(|number| format!("a={number}\n")).collect();
        for piece in [1, 7, SMALL_BYTES - 1, SMALL_BYTES, SMALL_BYTES + 1, READ_BYTES] {
            let pieces = text.as_bytes().chunks(piece).map(<[u8]>::to_vec).collect();
            let mut lines = Lines::new(Pieces(pieces));
            for number in 0..3000 {
                assert_eq!(lines.next().unwrap(), Some(format!("a={number}").as_str()), "in pieces of {piece}");
            }
            assert_eq!(lines.next().unwrap(), None);
        }
    }

    /// Each read brings what is left of one piece.
    struct Pieces(std::collections::VecDeque<Vec<u8>>);

    impl Read for Pieces {
        fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
            let Some(piece) = self.0.front_mut() else {
                return Ok(0);
            };
            let len = piece.len().min(room.len());
            room[..len].copy_from_slice(&piece[..len]);
            piece.drain(..len);
            if piece.is_empty() {
                self.0.pop_front();
            }
            Ok(len)
        }
    }

    #[test]
    fn portions_are_bounded_in_peers_and_in_prefixes() {
        let sizes = |prefixes: &[usize]| {
            let peer = |len: &usize| PeerChange { removed_ips: vec![Default::default(); *len], ..Default::default() };
            let mut peers = prefixes.iter().map(peer);
            std::iter::from_fn(|| Some(chunk(&mut peers, CHUNK).len()).filter(|len| *len > 0)).collect::<Vec<_>>()
        };
        assert_eq!(sizes(&[1; CHUNK + 1]), [CHUNK, 1]);
        assert_eq!(sizes(&[CHUNK_PREFIXES - 1, 1, 5]), [2, 1]);
        assert_eq!(sizes(&[9 * CHUNK_PREFIXES, 1]), [1, 1]);
    }

    /// A server on a path of its own, as in the process.
    fn listening(dir: &Path) -> PathBuf {
        let (controller, mailbox) = mailbox().unwrap();
        thread::spawn(move || worker(&mailbox));
        let path = dir.join("wg0.sock");
        let fleet = Fleet::new(vec![controller], vec![Arc::default()], 600, &[]);
        Server::new(fleet).start(UnixListener::bind(&path).unwrap()).unwrap();
        path
    }

    /// What a client that behaves is told within its patience.
    fn told(path: &Path, request: &str) -> String {
        let mut client = UnixStream::connect(path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client.write_all(request.as_bytes()).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn silent_clients_hold_up_nobody_while_one_place_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = listening(dir.path());
        let mut silent: Vec<_> = (0..MAX_CLIENTS - 1).map(|_| UnixStream::connect(&path).unwrap()).collect();
        for (number, client) in silent.iter_mut().enumerate() {
            // nothing at all, half a line, half a request
            client.write_all(["", "set=", "set=1\nreplace_peers=true\n"][number % 3].as_bytes()).unwrap();
        }
        assert_eq!(told(&path, &format!("set=1\n{}\n", peers(1..9))), "errno=0\n\n");
        assert_eq!(told(&path, "get=1\n\n").matches("public_key=").count(), 8);
    }

    #[test]
    fn a_client_too_many_waits_for_the_end_of_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = listening(dir.path());
        let mut silent: Vec<_> = (0..MAX_CLIENTS).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let waiting = thread::spawn(move || told(&path, "get=1\n\n"));
        silent.pop();
        assert!(waiting.join().unwrap().ends_with("errno=0\n\n"));
    }

    #[test]
    fn clients_that_stay_silent_make_room() {
        let dir = tempfile::tempdir().unwrap();
        let path = listening(dir.path());
        let silent: Vec<_> = (0..MAX_CLIENTS).map(|_| UnixStream::connect(&path).unwrap()).collect();
        assert!(told(&path, "get=1\n\n").ends_with("errno=0\n\n"));
        for mut client in silent {
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
        }
    }

    #[test]
    fn a_connection_is_answered_in_order_however_its_requests_come() {
        let dir = tempfile::tempdir().unwrap();
        let path = listening(dir.path());
        assert_eq!(told(&path, "set=1\n\n"), "errno=0\n\n");
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut say = |pieces: &[&str], answer: &str| {
            for piece in pieces {
                client.write_all(piece.as_bytes()).unwrap();
            }
            let mut got = vec![0; answer.len()];
            client.read_exact(&mut got).unwrap();
            assert_eq!(String::from_utf8(got).unwrap(), answer, "to {pieces:?}");
        };
        let one = format!("set=1\n{}\n", peers(1..2));
        for _ in 0..3 {
            say(&[&one], "errno=0\n\n");
        }
        say(&["set=1\n\n"], "errno=0\n\n");
        say(&[&one, &one], "errno=0\n\nerrno=0\n\n");
        say(&[&one[..20], &one[20..]], "errno=0\n\n");
        say(&[&format!("{one}{one}get=1\n")], "errno=0\n\nerrno=0\n\n");
        say(&["\nset=1\nnonsense=1\n\n"], "listen_port=51820\n");
        let mut rest = String::new();
        client.read_to_string(&mut rest).unwrap();
        assert!(rest.ends_with("errno=0\n\nerrno=-22\n\n"), "{rest}");
        assert_eq!(rest.matches("public_key=").count(), 1);
    }

    #[test]
    fn who_reads_no_answers_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = listening(dir.path());
        assert_eq!(told(&path, "set=1\n\n"), "errno=0\n\n");
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        let error = loop {
            if let Err(error) = client.write_all(b"set=1\n\n") {
                break error;
            }
        };
        assert!(matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset), "{error}");
        assert_eq!(told(&path, "set=1\n\n"), "errno=0\n\n");
    }

    #[test]
    fn clients_of_whom_nothing_can_be_read_make_room() {
        let dir = tempfile::tempdir().unwrap();
        let path = listening(dir.path());
        let clients: Vec<_> = (0..MAX_CLIENTS).map(|_| UnixStream::connect(&path).unwrap()).collect();
        for client in &clients {
            // Urgent data make a socket ready for ever, and are not what is read. Not every kernel has them.
            let _ = rustix::net::send(client, b"x", rustix::net::SendFlags::OOB);
        }
        assert_eq!(told(&path, "set=1\n\n"), "errno=0\n\n");
    }

    #[test]
    fn only_a_whole_change_of_peers_and_nothing_else_is_for_the_door() {
        let one = format!("set=1\n{}\n", peers(1..3));
        assert_eq!(only_peers(one.as_bytes()).unwrap().len(), 2);
        for other in [
            String::new(),
            one[..one.len() - 1].to_owned(),
            one.repeat(2),
            format!("{one}s"),
            "get=1\n\n".to_owned(),
            "set=1\nlisten_port=1\n\n".to_owned(),
            one.replace("set=1\n", "set=1\nreplace_peers=true\n"),
            one.replace("set=1\n", "set=1\ncvault_end_replace=true\n"),
            one.replace("public_key", "nonsense"),
        ] {
            assert!(only_peers(other.as_bytes()).is_none(), "{other:?}");
        }
    }

    #[test]
    fn a_client_that_hangs_up_changes_nothing_and_disturbs_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = listening(dir.path());
        assert_eq!(told(&path, &format!("set=1\n{}\n", peers(1..500))), "errno=0\n\n");
        for request in ["set=1\nreplace_peers=true\n", "set=1\nlisten_port=1", "get=1\n\n", "g", ""] {
            for _ in 0..2 * MAX_CLIENTS {
                // In the middle of the request, or with the answer unread.
                UnixStream::connect(&path).unwrap().write_all(request.as_bytes()).unwrap();
            }
        }
        assert_eq!(told(&path, "get=1\n\n").matches("public_key=").count(), 499);
    }

    #[test]
    fn an_endless_line_is_refused_without_being_read_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = listening(dir.path());
        for (begin, errno) in [("", libc::EPROTO), ("set=1\n", libc::EINVAL)] {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(format!("{begin}{}", "a".repeat(MAX_LINE)).as_bytes()).unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, format!("errno=-{errno}\n\n"));
        }
    }

    fn read(bytes: &[u8]) -> io::Result<SetRequest> {
        read_set(&mut Lines::new(bytes))
    }

    #[test]
    fn a_request_ends_with_an_empty_line() {
        assert_eq!(read(b"listen_port=1\n\n").unwrap().device.listen_port, Some(1));
        assert_eq!(read(b"listen_port=1\n").unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(read(b"listen_port=1").unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn lines_are_the_same_however_they_arrive() {
        /// Gives as much at a time as it is told to.
        struct Pieces<'a>(&'a [u8], usize);
        impl Read for Pieces<'_> {
            fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
                let len = self.0.len().min(self.1).min(room.len());
                let (piece, rest) = self.0.split_at(len);
                room[..len].copy_from_slice(piece);
                self.0 = rest;
                Ok(len)
            }
        }
        let text = format!("set=1\n{}\n", peers(1..2000));
        for piece in [1, 7, READ_BYTES - 1, READ_BYTES, usize::MAX] {
            let mut lines = Lines::new(Pieces(text.as_bytes(), piece));
            let mut seen = String::new();
            while let Some(line) = lines.next().unwrap() {
                seen.extend([line, "\n"]);
            }
            assert!(seen == text, "in pieces of {piece}");
        }
    }

    #[test]
    fn a_line_without_end_costs_no_memory() {
        let endless = vec![b'a'; 1 << 20];
        assert_eq!(read(&endless).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(read(&[0xff; 100]).is_err(), "not even text");
    }
}
