//! hyper answers a head that is no HTTP by itself, with a bare status and no body, before any of our code sees a request.
//! [`Worded`] stands between hyper and the socket and writes a whole problem in the place of such an answer.
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
use http::{HeaderMap, HeaderValue};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::context::RequestContext;
use super::{Problem, middleware};
use crate::metrics;

/// A connection whose bare refusals are worded.
pub(super) struct Worded<S> {
    stream: S,
    /// The connection is protected by TLS: callers are told to keep to it.
    only_tls: bool,
    /// What goes out in the place of an answer that hyper believes to be written.
    pending: Vec<u8>,
}

impl<S> Worded<S> {
    pub(super) fn new(stream: S, only_tls: bool) -> Self {
        Self { stream, only_tls, pending: Vec::new() }
    }
}

impl<S: AsyncWrite + Unpin> Worded<S> {
    fn poll_pending(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.pending.is_empty() {
            match ready!(Pin::new(&mut self.stream).poll_write(cx, &self.pending))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => drop(self.pending.drain(..written)),
            }
        }
        Poll::Ready(Ok(()))
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

/// The whole answer, as bytes of HTTP/1.1.
fn malformed(only_tls: bool) -> Vec<u8> {
    let context = RequestContext::of(&Request::default());
    let detail = "This is not a request of HTTP/1.1, or its head is too large.";
    let problem = Problem::new(ErrorCode::MalformedRequest).detail(detail);
    let body = serde_json::to_vec(&problem.body(context.id)).expect("a problem is JSON");
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    headers.insert(CONTENT_LENGTH, body.len().into());
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    middleware::add_headers(&mut headers, &context);
    if only_tls {
        headers.insert(STRICT_TRANSPORT_SECURITY, middleware::ONLY_TLS);
    }
    let mut head = String::from("HTTP/1.1 400 Bad Request\r\n");
    for (name, value) in &headers {
        let value = value.to_str().expect("our own headers are ASCII");
        write!(head, "{name}: {value}\r\n").expect("writing to a string succeeds");
    }
    head.push_str("\r\n");
    metrics::request("malformed".into(), None, 400, Duration::ZERO);
    [head.into_bytes(), body].concat()
}

impl<S: AsyncRead + Unpin> AsyncRead for Worded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Worded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_pending(cx))?;
        if is_bare(bytes) {
            self.pending = malformed(self.only_tls);
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut self.stream).poll_write(cx, bytes)
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
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pending(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pending(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
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
