//! hyper answers a head that is no HTTP by itself, with a bare status and no body, before any of our code sees a request;
//! and one that does not come whole it does not answer at all. [`Worded`] stands between hyper and the socket: it writes a
//! whole problem in the place of such an answer, and hands a connection that ends without one back as [`Left`].
//!
//! What is recognised is exact: one write that is a head of 4xx with `content-length: 0`, which none of our own answers is,
//! because each carries an `x-request-id`. Behind another answer in one write (pipelining) it goes out as hyper made it.

use std::fmt::Write as _;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::extract::Request;
use cvault_types::ErrorCode;
use http::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, STRICT_TRANSPORT_SECURITY};
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::sync::oneshot;

use super::context::RequestContext;
use super::{Problem, middleware};
use crate::metrics;

/// Of what a peer goes on sending after its refusal, so much is read: a close on unread bytes takes the refusal back.
const LEFT_OVERS: u64 = 64 * 1024;

/// A connection whose bare refusals are worded.
pub(super) struct Worded<S> {
    /// There until it is dropped.
    stream: Option<S>,
    /// The connection is protected by TLS: callers are told to keep to it.
    only_tls: bool,
    /// What goes out in the place of an answer that hyper believes to be written.
    pending: Vec<u8>,
    heard: Heard,
    back: Option<oneshot::Sender<Left<S>>>,
}

/// What the peer has said that was not answered yet.
#[derive(Default)]
struct Heard {
    /// The first bytes of all: who begins with `PRI` speaks HTTP/2.
    first: Vec<u8>,
    /// Since the last write something was read that is more than the end of a line.
    unanswered: bool,
    /// The last write was not taken whole: whatever came next would be a part of it.
    stuck: bool,
    /// The peer sends no more.
    ended: bool,
}

/// A connection that ends after bytes nothing was written to.
pub(super) struct Left<S> {
    stream: S,
    only_tls: bool,
    /// It ends because the peer sends no more.
    ended: bool,
}

impl Heard {
    const HTTP_2: &[u8] = b"PRI";

    fn read(&mut self, bytes: &[u8]) {
        let missing = Self::HTTP_2.len() - self.first.len();
        self.first.extend(bytes.iter().take(missing));
        self.unanswered |= bytes.iter().any(|byte| !b"\r\n".contains(byte));
    }

    fn wrote(&mut self, whole: bool) {
        self.unanswered = false;
        self.stuck = !whole;
    }

    fn wants_an_answer(&self) -> bool {
        self.unanswered && !self.stuck && self.first != Self::HTTP_2
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Left<S> {
    /// Says why the request that had begun is not served, and closes the connection.
    pub(super) async fn refuse(mut self) -> io::Result<()> {
        let answer = if self.ended {
            cut_off(self.only_tls)
        } else {
            answer(&Problem::new(ErrorCode::RequestTimeout), self.only_tls)
        };
        self.stream.write_all(&answer).await?;
        self.stream.shutdown().await?;
        tokio::io::copy(&mut self.stream.take(LEFT_OVERS), &mut tokio::io::sink()).await.map(drop)
    }

    pub(super) async fn close(mut self) -> io::Result<()> {
        self.stream.shutdown().await
    }
}

impl<S> Worded<S> {
    pub(super) fn new(stream: S, only_tls: bool) -> (Self, oneshot::Receiver<Left<S>>) {
        let (back, left) = oneshot::channel();
        let heard = Heard::default();
        (Self { stream: Some(stream), only_tls, pending: Vec::new(), heard, back: Some(back) }, left)
    }
}

impl<S: Unpin> Worded<S> {
    fn stream(&mut self) -> Pin<&mut S> {
        Pin::new(self.stream.as_mut().expect("it is there until the drop"))
    }
}

impl<S> Drop for Worded<S> {
    fn drop(&mut self) {
        if self.heard.wants_an_answer()
            && self.pending.is_empty()
            && let (Some(stream), Some(back)) = (self.stream.take(), self.back.take())
        {
            let left = Left { stream, only_tls: self.only_tls, ended: self.heard.ended };
            // nobody waits for it: it is closed
            drop(back.send(left));
        }
    }
}

impl<S: AsyncWrite + Unpin> Worded<S> {
    fn poll_pending(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.pending.is_empty() {
            let pending = std::mem::take(&mut self.pending);
            let written = self.stream().poll_write(cx, &pending);
            self.pending = pending;
            match ready!(written)? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => drop(self.pending.drain(..written)),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn note(&mut self, written: Poll<io::Result<usize>>, of: usize) -> Poll<io::Result<usize>> {
        self.heard.wrote(matches!(written, Poll::Ready(Ok(written)) if written == of));
        written
    }
}

fn is_bare(bytes: &[u8]) -> bool {
    let Some(head) = bytes.strip_suffix(b"\r\n\r\n").filter(|head| head.starts_with(b"HTTP/1.1 4")) else {
        return false;
    };
    let text = String::from_utf8_lossy(head).to_ascii_lowercase();
    let mut lines = text.split("\r\n");
    lines.clone().any(|line| line == "content-length: 0") && !lines.any(|line| line.starts_with("x-request-id:"))
}

fn malformed(only_tls: bool) -> Vec<u8> {
    let detail = "This is not a request of HTTP/1.1, or its head is too large.";
    answer(&Problem::new(ErrorCode::MalformedRequest).detail(detail), only_tls)
}

fn cut_off(only_tls: bool) -> Vec<u8> {
    let detail = "The connection was closed in the middle of the request.";
    answer(&Problem::new(ErrorCode::MalformedRequest).detail(detail), only_tls)
}

/// The whole answer, as bytes of HTTP/1.1.
fn answer(problem: &Problem, only_tls: bool) -> Vec<u8> {
    let context = RequestContext::of(&Request::default());
    let status = StatusCode::from_u16(problem.code().status()).expect("every code has a status");
    let body = serde_json::to_vec(&problem.body(context.id)).expect("a problem is JSON");
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    headers.insert(CONTENT_LENGTH, body.len().into());
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    middleware::add_headers(&mut headers, &context);
    if only_tls {
        headers.insert(STRICT_TRANSPORT_SECURITY, middleware::ONLY_TLS);
    }
    let mut head = format!("HTTP/1.1 {status}\r\n");
    for (name, value) in &headers {
        let value = value.to_str().expect("our own headers are ASCII");
        write!(head, "{name}: {value}\r\n").expect("writing to a string succeeds");
    }
    head.push_str("\r\n");
    metrics::request("malformed".into(), None, status.as_u16(), Duration::ZERO);
    [head.into_bytes(), body].concat()
}

impl<S: AsyncRead + Unpin> AsyncRead for Worded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(self.stream().poll_read(cx, buf));
        match &buf.filled()[before..] {
            [] if buf.remaining() > 0 || read.is_err() => self.heard.ended = true,
            bytes => self.heard.read(bytes),
        }
        Poll::Ready(read)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Worded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_pending(cx))?;
        if is_bare(bytes) {
            self.pending = match (self.heard.first.is_empty(), self.heard.ended) {
                // hyper refuses also what was never said
                (true, _) => Vec::new(),
                (false, true) => cut_off(self.only_tls),
                (false, false) => malformed(self.only_tls),
            };
            return self.note(Poll::Ready(Ok(bytes.len())), bytes.len());
        }
        let written = self.stream().poll_write(cx, bytes);
        self.note(written, bytes.len())
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [bytes] = slices {
            return self.poll_write(cx, bytes);
        }
        ready!(self.poll_pending(cx))?;
        let written = self.stream().poll_write_vectored(cx, slices);
        self.note(written, slices.iter().map(|slice| slice.len()).sum())
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pending(cx))?;
        self.stream().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pending(cx))?;
        if self.heard.wants_an_answer() {
            // whoever gets it back closes it
            return Poll::Ready(Ok(()));
        }
        self.stream().poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_that_is_not_ours_is_replaced() {
        let bare = "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\ndate: now\r\n\r\n";
        assert!(is_bare(bare.as_bytes()));
        assert!(is_bare(bare.replace("400 Bad Request", "431 Request Header Fields Too Large").as_bytes()));
        for other in [
            bare.replace("date: now", "x-request-id: req_1"),
            bare.replace("content-length: 0", "content-length: 10"),
            bare.replace("400 Bad Request", "204 No Content"),
            bare.replace("date: now\r\n\r\n", "date: now\r\n\r\nbody"),
            bare.trim_end().to_owned(),
            String::new(),
        ] {
            assert!(!is_bare(other.as_bytes()), "{other:?}");
        }
        assert!(!is_bare(&malformed(false)));
    }
}
