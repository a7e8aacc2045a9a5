//! What the demonstration prints: numbered steps with their time, calls as curl, answers in short.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Result;
use cvault_tests::platform::{Answer, Http, Request};
use serde_json::Value;

const WIDTH: usize = 92;

/// Prints as the demonstration goes; knows the values that are shown by a name instead.
pub(crate) struct Show {
    colour: bool,
    number: u32,
    started: Instant,
    names: Vec<Name>,
}

struct Name {
    value: String,
    shown: String,
}

impl Show {
    pub(crate) fn new() -> Self {
        Self { colour: std::io::stdout().is_terminal(), number: 0, started: Instant::now(), names: Vec::new() }
    }

    pub(crate) fn title(&self, text: &str, below: &str) {
        println!("\n{}\n{}\n", self.paint("1", text), self.paint("2", below));
    }

    /// From now on `value` is printed as `$name`.
    pub(crate) fn name(&mut self, name: &str, value: &str) {
        self.names.push(Name { value: value.to_owned(), shown: format!("${name}") });
    }

    /// Does one step and prints what it was and how long it took.
    pub(crate) fn step<T>(&mut self, what: &str, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.number += 1;
        println!("{} {}", self.paint("1;36", &format!("{:>2}", self.number)), self.paint("1", what));
        let started = Instant::now();
        let done = work(self);
        let mark = if done.is_ok() { self.paint("32", "✔") } else { self.paint("31", "✘") };
        println!("   {mark} {}\n", self.paint("2", &took(started.elapsed())));
        done
    }

    /// One fact, with its name in a column.
    pub(crate) fn fact(&self, name: &str, value: &str) {
        println!("   {name:<26} {}", self.paint("1", value));
    }

    pub(crate) fn line(&self, text: &str) {
        println!("   {text}");
    }

    /// Prints a call as curl, sends it, prints the answer's status and the named fields.
    pub(crate) fn call(&self, http: &Http, request: &Request, fields: &[&str]) -> Result<Answer> {
        for (index, line) in wrapped(&self.named(&request.curl(http.base()))).iter().enumerate() {
            let lead = if index == 0 { "$ " } else { "    " };
            println!("   {}", self.paint("36", &format!("{lead}{line}")));
        }
        let answer = http.send(request)?;
        let body = answer.json().unwrap_or(Value::Null);
        let shown: Vec<String> = fields.iter().filter_map(|field| self.field(&body, field)).collect();
        println!("   → {} {{{}}}  {}", answer.status, shown.join(", "), self.paint("2", &took(answer.took)));
        Ok(answer)
    }

    pub(crate) fn end(&self, failure: Option<&anyhow::Error>) {
        let total = took(self.started.elapsed());
        match failure {
            None => println!(
                "{} in {total}.\n",
                self.paint("1;32", "Everything above happened for real, and has been cleaned up,")
            ),
            Some(error) => println!("{} after {total}: {error:#}\n", self.paint("1;31", "The demonstration failed")),
        }
    }

    fn field(&self, body: &Value, path: &str) -> Option<String> {
        let value = path.split('.').fold(body, |value, key| &value[key]);
        if value.is_null() {
            return None;
        }
        let text = self.named(&value.to_string());
        let short: String = if text.chars().count() > 46 && !text.starts_with("\"$") {
            text.chars().take(43).chain("…\"".chars()).collect()
        } else {
            text
        };
        Some(format!("\"{path}\": {short}"))
    }

    fn named(&self, text: &str) -> String {
        self.names.iter().fold(text.to_owned(), |text, name| text.replace(&name.value, &name.shown))
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A duration as people read it.
pub(crate) fn took(duration: Duration) -> String {
    let milliseconds = duration.as_secs_f64() * 1000.0;
    if milliseconds < 10.0 {
        format!("{milliseconds:.1} ms")
    } else if milliseconds < 1000.0 {
        format!("{milliseconds:.0} ms")
    } else {
        format!("{:.2} s", milliseconds / 1000.0)
    }
}

/// A count with spaces between thousands.
pub(crate) fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

/// A shell command over several lines, broken before its options.
fn wrapped(command: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for part in command.replace(" -H ", "\n-H ").replace(" -d ", "\n-d ").lines() {
        let line = lines.last_mut().expect("there is always a line");
        if !line.is_empty() && line.len() + part.len() + 3 > WIDTH {
            line.push_str(" \\");
            lines.push(part.to_owned());
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(part);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_readable() {
        assert_eq!(thousands(52_428_800), "52 428 800");
        assert_eq!(thousands(7), "7");
        assert_eq!(took(Duration::from_micros(2340)), "2.3 ms");
        assert_eq!(took(Duration::from_millis(412)), "412 ms");
        assert_eq!(took(Duration::from_millis(1250)), "1.25 s");
    }

    #[test]
    fn a_long_command_is_broken_before_its_options() {
        let command = format!("curl -s http://h/{} -H \"A: b\" -d '{{}}'", "x".repeat(80));
        assert_eq!(wrapped(&command).len(), 2);
        assert!(wrapped(&command)[0].ends_with(" \\"));
    }
}
