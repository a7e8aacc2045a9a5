//! HTTP/1.1, one request per connection: `GET /ip` answers the caller's address, `GET /bytes/<n>` sends n bytes,
//! `POST /sink` swallows a body and answers its length. `GET /noise/<n>` and `POST /digest` are for transfers that are
//! checked byte by byte.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use super::noise::{Noise, digest_of};

const CHUNK: usize = 64 * 1024;

/// Accepts on port 80 of every address, IPv4 and IPv6.
pub(super) fn serve() -> Result<()> {
    let listener = TcpListener::bind("[::]:80").context("listen on port 80")?;
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || {
            if let Err(error) = answer(&stream) {
                eprintln!("request failed: {error:#}");
            }
        });
    }
    Ok(())
}

fn answer(stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.set_nodelay(true)?;
    let caller = unmapped(stream.peer_addr()?.ip());
    let mut reader = BufReader::with_capacity(CHUNK, stream);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut length = 0u64;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 || header == "\r\n" {
            break;
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse()?;
        }
    }
    let path = first.split(' ').nth(1).unwrap_or("/");
    if path == "/sink" {
        let swallowed = std::io::copy(&mut reader.take(length), &mut std::io::sink())?;
        return text(stream, "200 OK", &swallowed.to_string());
    }
    if path == "/digest" {
        return text(stream, "200 OK", &digest_of(&mut reader.take(length))?);
    }
    if let Some(Ok(count)) = path.strip_prefix("/noise/").map(str::parse::<u64>) {
        return body(stream, count, &mut Noise::of(count));
    }
    match path.strip_prefix("/bytes/").map(str::parse::<u64>) {
        Some(Ok(count)) => bytes(stream, count),
        Some(Err(_)) => text(stream, "400 Bad Request", "how many bytes?"),
        None if path == "/ip" || path == "/" => text(stream, "200 OK", &caller.to_string()),
        None => text(stream, "404 Not Found", "no such page"),
    }
}

fn text(mut stream: &TcpStream, status: &str, body: &str) -> Result<()> {
    let length = body.len() + 1;
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-type: text/plain\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}\n"
    )?;
    Ok(())
}

fn bytes(stream: &TcpStream, count: u64) -> Result<()> {
    body(stream, count, &mut std::io::repeat(0x5a).take(count))
}

fn body(mut stream: &TcpStream, count: u64, from: &mut impl Read) -> Result<()> {
    write!(
        stream,
        "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: {count}\r\nconnection: close\r\n\r\n"
    )?;
    std::io::copy(from, &mut stream)?;
    Ok(())
}

fn unmapped(address: IpAddr) -> IpAddr {
    address.to_canonical()
}
