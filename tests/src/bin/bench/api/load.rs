//! Many clients at once over plain HTTP/1.1, each with a connection of its own, on one thread: what the generator takes of
//! the processors is not there for the platform.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cvault_tests::bench::quantile;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// Longer than anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await.context("connect to the control plane")?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    pub(crate) async fn send(&mut self, request: &[u8]) -> Result<Answer> {
        tokio::time::timeout(PATIENCE, self.exchange(request)).await.context("no answer in a minute")?
    }

    async fn exchange(&mut self, request: &[u8]) -> Result<Answer> {
        self.stream.get_mut().write_all(request).await?;
        let mut line = String::new();
        self.stream.read_line(&mut line).await?;
        let status = line.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no HTTP status")?;
        let mut length = 0;
        loop {
            line.clear();
            self.stream.read_line(&mut line).await?;
            match line.trim_end().split_once(':') {
                None if line.trim_end().is_empty() => break,
                None => bail!("a header without a colon"),
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => length = value.trim().parse()?,
                Some(_) => {}
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).await?;
        Ok(Answer { status, body })
    }
}

/// A request as it is on the wire.
pub(crate) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: Option<&str>) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\nhost: bench\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    if let Some(body) = body {
        text.push_str(&format!("content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
    } else {
        text.push_str("\r\n");
    }
    text.into_bytes()
}

/// What came of a run.
#[derive(Debug, Default)]
pub(crate) struct Load {
    pub(crate) seconds: f64,
    /// Milliseconds of those that were answered with success.
    pub(crate) latencies: Vec<f64>,
    /// The others, by status.
    pub(crate) refused: Vec<u16>,
}

impl Load {
    pub(crate) fn rate(&self) -> f64 {
        f64::from(u32::try_from(self.latencies.len()).unwrap_or(u32::MAX)) / self.seconds
    }

    /// Answered one way or the other.
    pub(crate) fn asked_a_second(&self) -> f64 {
        f64::from(u32::try_from(self.latencies.len() + self.refused.len()).unwrap_or(u32::MAX)) / self.seconds
    }

    /// Several runs as if they were one.
    pub(crate) fn all(loads: &[Self]) -> Self {
        let mut whole = Self::default();
        for load in loads {
            whole.seconds += load.seconds;
            whole.latencies.extend(&load.latencies);
            whole.refused.extend(&load.refused);
        }
        whole
    }

    pub(crate) fn p50(&self) -> Option<f64> {
        quantile(&self.latencies, 50)
    }

    pub(crate) fn p99(&self) -> Option<f64> {
        quantile(&self.latencies, 99)
    }

    fn add(&mut self, status: u16, took: Duration) {
        if (200..300).contains(&status) {
            self.latencies.push(took.as_secs_f64() * 1e3);
        } else {
            self.refused.push(status);
        }
    }
}

/// When the clients send.
#[derive(Clone, Copy)]
pub(crate) enum Pace {
    /// The next request when the last one is answered.
    Closed,
    /// One each interval, whatever the answers do; latency counts from when it was due.
    Every(Duration),
    /// So long after the last answer, beginning all at once.
    After(Duration),
}

impl Pace {
    /// When a client's request number `count` is sent.
    fn due(self, began: Instant, client: usize, clients: usize, count: u64) -> Instant {
        match self {
            Self::Closed => Instant::now(),
            Self::After(_) if count == 0 => Instant::now(),
            Self::After(pause) => Instant::now() + pause,
            Self::Every(interval) => {
                let interval = interval.as_secs_f64();
                // the clients are spread over the interval
                let place =
                    f64::from(u32::try_from(client).unwrap_or(0)) / f64::from(u32::try_from(clients).unwrap_or(1));
                let count = f64::from(u32::try_from(count).unwrap_or(u32::MAX));
                began + Duration::from_secs_f64(interval * (place + count))
            }
        }
    }
}

/// `clients` connections for `time`; `make(client, number)` writes each request.
pub(crate) async fn run(
    address: SocketAddr,
    clients: usize,
    time: Duration,
    pace: Pace,
    make: impl Fn(usize, u64) -> Vec<u8>,
) -> Result<Load> {
    let began = Instant::now();
    let make = &make;
    let client = |number: usize| async move {
        let mut connection = Connection::open(address).await?;
        let mut load = Load::default();
        for count in 0.. {
            let due = pace.due(began, number, clients, count);
            if due.duration_since(began) >= time {
                break;
            }
            tokio::time::sleep_until(due.into()).await;
            let answer = connection.send(&make(number, count)).await?;
            load.add(answer.status, due.elapsed());
        }
        Ok::<_, anyhow::Error>(load)
    };
    let loads = futures::future::join_all((0..clients).map(client)).await;
    let loads = loads.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(Load { seconds: began.elapsed().as_secs_f64(), ..Load::all(&loads) })
}
