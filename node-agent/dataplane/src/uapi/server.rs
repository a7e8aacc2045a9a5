//! Serving the socket.

use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::parse::{Invalid, SetParser, SetRequest};
use super::{SOCKET_DIR, format};
use crate::change::PeerChange;
use crate::io::fleet::Fleet;
use crate::io::mailbox::{Reply, Request, WorkerGone};

/// Clients served at the same time; more are turned away.
const MAX_CLIENTS: usize = 8;
/// The longest line is a key of 64 digits and its name.
const MAX_LINE: u64 = 256;
/// 65,000 peers take about 26 MB.
const MAX_REQUEST: u64 = 64 * 1024 * 1024;
/// Peers handed to the worker, or asked of it, at a time: less than a millisecond of its attention.
const CHUNK: usize = 256;
/// How long a client may be silent, or leave an answer unread.
const CLIENT_SILENCE: Duration = Duration::from_secs(5);
/// How long a client may take for one request.
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
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// What every client thread shares.
pub(crate) struct Server {
    controller: Fleet,
    journal: Option<PathBuf>,
    clients: AtomicUsize,
    /// One `set` at a time: a replacement of all peers spans several letters to the worker.
    setting: Mutex<()>,
}

impl Server {
    pub(crate) fn new(controller: Fleet, journal: Option<PathBuf>) -> Arc<Self> {
        Arc::new(Self { controller, journal, clients: AtomicUsize::new(0), setting: Mutex::new(()) })
    }

    /// Accepts whoever waits and serves each on a thread of its own.
    pub(crate) fn accept(self: &Arc<Self>, listener: &UnixListener) -> io::Result<()> {
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if self.clients.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
                self.clients.fetch_sub(1, Ordering::Relaxed);
                tracing::debug!("too many clients on the control socket");
                continue;
            }
            let server = Arc::clone(self);
            let client = move || {
                match server.serve(&stream) {
                    Ok(()) => {}
                    // it has read as much as it wanted
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                    Err(error) => tracing::debug!(%error, "a client of the control socket failed"),
                }
                server.clients.fetch_sub(1, Ordering::Relaxed);
            };
            if let Err(error) = std::thread::Builder::new().name("uapi-client".into()).spawn(client) {
                self.clients.fetch_sub(1, Ordering::Relaxed);
                return Err(error);
            }
        }
    }

    fn serve(&self, stream: &UnixStream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(CLIENT_SILENCE))?;
        stream.set_write_timeout(Some(CLIENT_SILENCE))?;
        let mut reader = BufReader::new(stream);
        loop {
            let mut lines = Lines::new(&mut reader);
            let errno = match text(&lines.next()?) {
                None => return Ok(()),
                Some("get=1") if text(&lines.next()?) == Some("") => errno(self.get(stream)?),
                Some("set=1") => match read_set(&mut lines) {
                    Ok(request) => errno(self.set(request)),
                    Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                        answer(stream, libc::EINVAL)?;
                        return Ok(());
                    }
                    Err(error) => return Err(error),
                },
                Some(_) => {
                    answer(stream, libc::EPROTO)?;
                    return Ok(());
                }
            };
            answer(stream, errno)?;
        }
    }

    fn get(&self, mut stream: &UnixStream) -> io::Result<Result<i32, WorkerGone>> {
        let Ok(Reply::Device(state)) = self.controller.ask(Request::Describe) else {
            return Ok(Err(WorkerGone));
        };
        stream.write_all(Zeroizing::new(format::device(&state)).as_bytes())?;
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
            stream.write_all(text.as_bytes())?;
            next = more;
        }
        Ok(Ok(0))
    }

    fn set(&self, request: SetRequest) -> Result<i32, WorkerGone> {
        let _one_at_a_time = self.setting.lock().unwrap_or_else(PoisonError::into_inner);
        let SetRequest { device, replace_peers, end_replace, peers } = request;
        let removes = replace_peers || end_replace || peers.iter().any(|peer| peer.remove || peer.generation.is_some());
        let mut errno = self.done(Request::Device(device))?;
        if errno != 0 {
            return Ok(errno);
        }
        if replace_peers {
            self.done(Request::BeginReplace)?;
        }
        let mut peers = peers.into_iter().peekable();
        while errno == 0 && peers.peek().is_some() {
            let chunk: Vec<PeerChange> = peers.by_ref().take(CHUNK).collect();
            errno = self.done(Request::Peers(chunk))?;
        }
        // What was begun is ended, even when a peer was refused; but that peer may be one of an earlier process.
        if replace_peers || (end_replace && errno == 0) {
            let mut settled = self.done(Request::EndReplace)?;
            while settled == libc::EAGAIN {
                settled = self.done(Request::Settle)?;
            }
            errno = if errno == 0 { settled } else { errno };
        }
        if let (true, Some(journal)) = (removes, &self.journal)
            && let Err(error) = File::open(journal).and_then(|file| file.sync_data())
        {
            tracing::warn!(%error, "the journal of closed peers may not survive a crash of the host");
        }
        Ok(errno)
    }

    fn done(&self, request: Request) -> Result<i32, WorkerGone> {
        Ok(self.controller.ask(request)?.errno())
    }
}

fn errno(result: Result<i32, WorkerGone>) -> i32 {
    result.unwrap_or(libc::EIO)
}

/// Errors are negative, as wireguard-go answers and `wg` expects.
fn answer(mut stream: &UnixStream, errno: i32) -> io::Result<()> {
    stream.write_all(format!("errno={}\n\n", -errno).as_bytes())
}

fn read_set<R: BufRead>(lines: &mut Lines<'_, R>) -> io::Result<SetRequest> {
    let mut parser = SetParser::default();
    loop {
        match text(&lines.next()?) {
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
            Some("") => return Ok(parser.finish()),
            Some(line) => parser.line(line).map_err(|Invalid| io::Error::from(io::ErrorKind::InvalidData))?,
        }
    }
}

fn text(line: &Option<Zeroizing<String>>) -> Option<&str> {
    line.as_ref().map(|line| line.as_str())
}

/// The lines of one request, bounded in length, number and time.
struct Lines<'a, R> {
    reader: &'a mut R,
    bytes_left: u64,
    started: Option<Instant>,
}

impl<'a, R: BufRead> Lines<'a, R> {
    fn new(reader: &'a mut R) -> Self {
        Self { reader, bytes_left: MAX_REQUEST, started: None }
    }

    /// The next line without its end; `None` when the client hung up between lines. Lines may hold keys.
    fn next(&mut self) -> io::Result<Option<Zeroizing<String>>> {
        let mut line = Zeroizing::new(String::with_capacity(128));
        let read = self.reader.by_ref().take(MAX_LINE).read_line(&mut line)? as u64;
        let started = *self.started.get_or_insert_with(Instant::now);
        if read == 0 {
            return Ok(None);
        }
        self.bytes_left = self.bytes_left.saturating_sub(read);
        if started.elapsed() > CLIENT_PATIENCE {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if line.pop() != Some('\n') || self.bytes_left == 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Some(line))
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
                        Reply::Done(0)
                    }
                    Request::Peers(changes) => {
                        assert!(changes.len() <= CHUNK);
                        let mut apply = |change| engine.apply_peer(Now::default(), change, &mut out);
                        let done = changes.into_iter().try_for_each(&mut apply);
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
                    Request::List { from, limit } => {
                        let (peers, next) = engine.peers(u16::try_from(from).unwrap(), limit);
                        Reply::Peers { peers, next: next.map(u32::from) }
                    }
                    Request::Notices(notices) => {
                        notices.into_iter().for_each(|notice| engine.on_notice(notice));
                        Reply::Done(0)
                    }
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
        let server = Server::new(fleet, None);
        let (mut client, ours) = UnixStream::pair().unwrap();
        let serving = thread::spawn(move || server.serve(&ours));
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
        let key = "01".repeat(32);
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
            answer.contains("\ncvault_generation=5\ncvault_rx_inner=0\n"),
            "a closed life does not go on: {answer}"
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

    fn read(bytes: &[u8]) -> io::Result<SetRequest> {
        let mut reader = bytes;
        read_set(&mut Lines::new(&mut reader))
    }

    #[test]
    fn a_request_ends_with_an_empty_line() {
        assert_eq!(read(b"listen_port=1\n\n").unwrap().device.listen_port, Some(1));
        assert_eq!(read(b"listen_port=1\n").unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(read(b"listen_port=1").unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_line_without_end_costs_no_memory() {
        let endless = vec![b'a'; 1 << 20];
        assert_eq!(read(&endless).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(read(&[0xff; 100]).is_err(), "not even text");
    }
}
