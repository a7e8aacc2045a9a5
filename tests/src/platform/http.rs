//! An HTTP client inside a machine: reqwest on a thread that has entered the machine's network.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use reqwest::Method;
use reqwest::header::HeaderMap;
use rustix::fd::AsFd;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::lab::Machine;

const WAITING_CALLS: usize = 1024;
const TIMEOUT: Duration = Duration::from_secs(30);

/// Sends requests from within one machine. Calls may be made from many threads; they run at the same time.
#[derive(Clone)]
pub struct Http {
    calls: mpsc::Sender<Call>,
    base: String,
}

/// A request as data, so that it can be sent, repeated, and printed as curl.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: Method,
    pub path: String,
    pub headers: Vec<Header>,
    pub body: Option<Vec<u8>>,
}

#[derive(Clone, Debug)]
pub struct Header {
    pub name: String,
    pub value: String,
}

#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
    pub took: Duration,
}

struct Call {
    request: Request,
    reply: SyncSender<Result<Answer>>,
}

impl Request {
    pub fn new(method: Method, path: &str) -> Self {
        Self { method, path: path.to_owned(), headers: Vec::new(), body: None }
    }

    pub fn get(path: &str) -> Self {
        Self::new(Method::GET, path)
    }

    pub fn delete(path: &str) -> Self {
        Self::new(Method::DELETE, path)
    }

    pub fn post(path: &str, body: &Value) -> Self {
        Self::new(Method::POST, path).header("Content-Type", "application/json").raw_body(body.to_string().into_bytes())
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push(Header { name: name.to_owned(), value: value.to_owned() });
        self
    }

    pub fn raw_body(mut self, body: Vec<u8>) -> Self {
        self.body = Some(body);
        self
    }

    /// The call as a shell command.
    pub fn curl(&self, base: &str) -> String {
        let mut line = String::from("curl -s");
        if self.method != Method::GET && !(self.method == Method::POST && self.body.is_some()) {
            line.push_str(&format!(" -X {}", self.method));
        }
        line.push_str(&format!(" {}", quoted(&format!("{base}{}", self.path))));
        for header in &self.headers {
            line.push_str(&format!(" -H \"{}: {}\"", header.name, header.value));
        }
        if let Some(body) = &self.body {
            line.push_str(&format!(" -d '{}'", String::from_utf8_lossy(body)));
        }
        line
    }
}

fn quoted(url: &str) -> String {
    if url.contains(['?', '&']) { format!("'{url}'") } else { url.to_owned() }
}

impl Answer {
    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("not JSON ({}): {}", self.status, self.text()))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The `code` of a problem document, or an empty string.
    pub fn code(&self) -> String {
        self.json().ok().and_then(|body| body["code"].as_str().map(str::to_owned)).unwrap_or_default()
    }

    /// The body of an answer that must have this status.
    pub fn expect(&self, status: u16) -> Result<Value> {
        if self.status != status {
            bail!("expected {status}, got {}: {}", self.status, self.text());
        }
        if self.body.is_empty() { Ok(Value::Null) } else { self.json() }
    }
}

impl Http {
    /// Starts the thread in `machine`'s network.
    pub fn enter(machine: &Machine, base: &str) -> Result<Self> {
        let network = machine.network()?;
        let (calls, waiting) = mpsc::channel(WAITING_CALLS);
        let (started, start) = sync_channel(1);
        std::thread::Builder::new().name("lab-http".to_owned()).spawn({
            let base = base.to_owned();
            move || {
                let entered = move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
                    .context("enter the machine's network");
                let failed = entered.is_err();
                let _ = started.send(entered);
                if !failed {
                    serve(&base, waiting);
                }
            }
        })?;
        start.recv().context("the HTTP thread ended")??;
        Ok(Self { calls, base: base.to_owned() })
    }

    pub fn base(&self) -> &str {
        &self.base
    }

    /// Sends one request and waits for its answer, whatever its status.
    pub fn send(&self, request: &Request) -> Result<Answer> {
        let (reply, answer) = sync_channel(1);
        self.calls
            .blocking_send(Call { request: request.clone(), reply })
            .map_err(|_| anyhow!("the HTTP thread has ended"))?;
        answer.recv().context("the HTTP thread ended")?.with_context(|| format!("{} {}", request.method, request.path))
    }
}

fn serve(base: &str, mut waiting: mpsc::Receiver<Call>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be built");
    let client =
        reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build().expect("a client without TLS can be built");
    runtime.block_on(async move {
        while let Some(call) = waiting.recv().await {
            let client = client.clone();
            let url = format!("{base}{}", call.request.path);
            tokio::spawn(async move {
                let answer = exchange(&client, url, call.request).await;
                let _ = call.reply.send(answer);
            });
        }
    });
}

async fn exchange(client: &reqwest::Client, url: String, request: Request) -> Result<Answer> {
    let started = Instant::now();
    let mut builder = client.request(request.method, url);
    for header in request.headers {
        builder = builder.header(header.name, header.value);
    }
    if let Some(body) = request.body {
        builder = builder.body(body);
    }
    let response = builder.send().await?;
    let status = response.status().as_u16();
    let headers = response.headers().clone();
    let body = response.bytes().await?.to_vec();
    Ok(Answer { status, headers, body, took: started.elapsed() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_prints_as_curl() {
        let request = Request::post("/api/v1/devices?wait=active", &serde_json::json!({"device_name": "x"}))
            .header("X-API-Key", "$KEY");
        assert_eq!(
            request.curl("http://h"),
            r#"curl -s 'http://h/api/v1/devices?wait=active' -H "Content-Type: application/json" -H "X-API-Key: $KEY" -d '{"device_name":"x"}'"#
        );
        assert_eq!(Request::delete("/a").curl("http://h"), "curl -s -X DELETE http://h/a");
    }
}
