//! Waiting for a condition. The only sleep of the tests is in here.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

const PAUSE: Duration = Duration::from_millis(20);
const SHORT_PAUSE: Duration = Duration::from_micros(100);

/// Repeats `check` until it answers or `seconds` have passed; then fails with what was awaited and the last error.
pub fn eventually<T>(what: &str, seconds: u64, check: impl FnMut() -> Result<T>) -> Result<T> {
    repeat(what, seconds, PAUSE, check)
}

/// As `eventually`, for a moment that is to be measured.
pub fn promptly<T>(what: &str, seconds: u64, check: impl FnMut() -> Result<T>) -> Result<T> {
    repeat(what, seconds, SHORT_PAUSE, check)
}

fn repeat<T>(what: &str, seconds: u64, pause: Duration, mut check: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        match check() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= deadline => {
                return Err(anyhow!("not within {seconds} s: {what}; last: {error:#}"));
            }
            Err(_) => std::thread::sleep(pause),
        }
    }
}

/// As `eventually`, for checks that answer `None` while it is not yet so.
pub fn eventually_some<T>(what: &str, seconds: u64, mut check: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    eventually(what, seconds, || check()?.ok_or_else(|| anyhow!("not yet")))
}

/// Reads a figure until it has not changed for `still`, and returns it.
pub fn quiescent<T: PartialEq>(
    what: &str,
    still: Duration,
    seconds: u64,
    mut read: impl FnMut() -> Result<T>,
) -> Result<T> {
    let mut last = read()?;
    let mut since = Instant::now();
    eventually(what, seconds, || {
        let now = read()?;
        if now != last {
            last = now;
            since = Instant::now();
            return Err(anyhow!("still changing"));
        }
        if since.elapsed() < still { Err(anyhow!("not still long enough")) } else { Ok(now) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_never_holds_fails_with_its_name_and_last_error() {
        let error = eventually::<()>("the moon is cheese", 0, || Err(anyhow!("it is rock"))).unwrap_err();
        assert_eq!(error.to_string(), "not within 0 s: the moon is cheese; last: it is rock");
    }

    #[test]
    fn a_condition_is_tried_until_it_holds() {
        let mut tries = 0;
        let value = eventually_some("three tries", 5, || {
            tries += 1;
            Ok((tries == 3).then_some(tries))
        });
        assert_eq!(value.unwrap(), 3);
    }
}
