//! `cargo xtask <verb>`: the one door to building, testing, measuring and showing CVault, for people and for CI.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a command-line tool")]

mod bench;
mod database;
mod host;
mod schemathesis;
mod verbs;

use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask <verb>

  demo [--keep]   from nothing to a metered WireGuard tunnel, in a lab on this computer (root)
  test [--fast]   every test; --fast leaves out the end-to-end tests, which need root
  schemathesis    the step of `test` that tries the OpenAPI document on a running control plane, by itself
  check           what CI demands: format, lints, OpenAPI document, database schema, checked queries
  lint            format and lints only
  openapi         write docs/openapi/v1.json from the control plane's router
  schema          write migrations/schema.sql from the migrations
  sqlx-prepare    write .sqlx/, the checked queries' data, so that building needs no database
  bench           figures of a release build (root): every suite, or one of
    spine         activation, registrations, first handshake, metering
    api           the control plane under load, with durable commits; --only, --seconds, --record
    dataplane     the engine beside other userspace WireGuards; --help lists its options, --install-peers builds peers
                  all take --json (one object a line) and --quick";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["demo"] => verbs::demo(&[]),
        ["demo", "--keep"] => verbs::demo(&["--keep"]),
        ["test"] => verbs::test(),
        ["test", "--fast"] => verbs::test_fast(),
        ["schemathesis"] => verbs::schemathesis(),
        ["check"] => verbs::check(),
        ["lint"] => verbs::lint(),
        ["openapi"] => verbs::openapi(),
        ["schema"] => verbs::schema(),
        ["sqlx-prepare"] => verbs::sqlx_prepare(),
        ["bench", words @ ..] => bench::run(words),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
