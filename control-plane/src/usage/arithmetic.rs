//! The arithmetic of the ledger: differences of cumulative counters, and their attribution to hours. Pure.

use time::{Duration, OffsetDateTime};

/// A counter that claims more than this is damaged: a 100 Gbit/s server needs three years to get here.
pub const MAX_PLAUSIBLE: u64 = 1 << 60;

/// A window longer than this is attributed to its last day. Windows are seconds long; this bounds the work for one of
/// an agent that was away.
const MAX_WINDOW: Duration = Duration::DAY;

/// No server's line carries more: 400 Gbit/s.
const LINE_BYTES_PER_SECOND: u64 = 50_000_000_000;
/// Ten seconds of that line: for clocks that differ, and time between reading a counter and telling it.
const GROWTH_SLACK: u64 = 10 * LINE_BYTES_PER_SECOND;

/// Bytes of one hour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HourShare {
    /// Beginning of the hour, UTC.
    pub hour: OffsetDateTime,
    pub bytes: u64,
}

/// What a cumulative value adds to the greatest one known. Loss, repetition and reordering of reports cannot change the
/// sum of what this returns.
#[must_use]
pub fn growth(known: u64, reported: u64) -> u64 {
    reported.saturating_sub(known)
}

/// The most a counter can have grown by: a window's length as the agent measured it, or the time since the counter was
/// last entered if that is longer (windows get lost), at the rate of a line.
#[must_use]
pub fn most_bytes(measured_ms: u64, elapsed: Duration) -> u64 {
    let elapsed_ms = u64::try_from(elapsed.whole_milliseconds()).unwrap_or(0);
    // a year is as long as any window is believed to be
    let ms = measured_ms.min(31_536_000_000).max(elapsed_ms);
    (LINE_BYTES_PER_SECOND / 1_000).saturating_mul(ms).saturating_add(GROWTH_SLACK)
}

/// When a window was, by the receiver's clock. Ages are the agent's, so no two clocks are compared.
#[must_use]
pub fn window(received_at: OffsetDateTime, age_start_ms: u64, age_end_ms: u64) -> (OffsetDateTime, OffsetDateTime) {
    // older than a year is a fault of the agent's clock; the bytes are still somebody's
    let ago = |ms: u64| received_at - Duration::milliseconds(i64::try_from(ms.min(31_536_000_000)).unwrap_or(0));
    let end = ago(age_end_ms);
    (ago(age_start_ms).clamp(end - MAX_WINDOW, end), end)
}

/// Splits bytes over the hours of a window in proportion to time; what does not divide goes to the later part. The
/// shares sum to `bytes` exactly.
#[must_use]
pub fn split(bytes: u64, start: OffsetDateTime, end: OffsetDateTime) -> Vec<HourShare> {
    let whole = (end - start).whole_microseconds().max(0).unsigned_abs();
    let mut shares = Vec::new();
    let mut hour = hour_of(start.min(end));
    let mut given = 0;
    loop {
        let next = hour + Duration::HOUR;
        if next >= end || whole == 0 {
            shares.push(HourShare { hour: if whole == 0 { hour_of(end) } else { hour }, bytes: bytes - given });
            return shares;
        }
        let until = (next - start).whole_microseconds().max(0).unsigned_abs();
        // whole ≤ one day in µs < 2^37 and bytes < 2^64: no overflow in 128 bits
        let due = u64::try_from(u128::from(bytes) * until / whole).expect("a share is at most the whole");
        shares.push(HourShare { hour, bytes: due - given });
        given = due;
        hour = next;
    }
}

/// The beginning of the hour, UTC.
#[must_use]
pub fn hour_of(at: OffsetDateTime) -> OffsetDateTime {
    let seconds = at.unix_timestamp();
    OffsetDateTime::from_unix_timestamp(seconds - seconds.rem_euclid(3600)).expect("an hour earlier is still a time")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use time::macros::datetime;

    #[test]
    fn a_window_within_an_hour_is_that_hours() {
        let shares = split(1000, datetime!(2026-01-01 10:10 UTC), datetime!(2026-01-01 10:20 UTC));
        assert_eq!(shares, [HourShare { hour: datetime!(2026-01-01 10:00 UTC), bytes: 1000 }]);
    }

    #[test]
    fn what_does_not_divide_goes_to_the_later_hour() {
        let shares = split(10, datetime!(2026-01-01 10:59:50 UTC), datetime!(2026-01-01 11:00:20 UTC));
        assert_eq!(shares.iter().map(|share| share.bytes).collect::<Vec<_>>(), [3, 7]);
    }

    #[test]
    fn a_window_that_ends_on_the_hour_stays_before_it() {
        let shares = split(10, datetime!(2026-01-01 10:59 UTC), datetime!(2026-01-01 11:00 UTC));
        assert_eq!(shares, [HourShare { hour: datetime!(2026-01-01 10:00 UTC), bytes: 10 }]);
    }

    proptest! {
        #[test]
        fn the_shares_sum_to_the_bytes(bytes: u64, start in 0i64..4_000_000_000, long in -10i64..200_000_000) {
            let received = OffsetDateTime::from_unix_timestamp(start).unwrap();
            let (start, end) = (received - Duration::milliseconds(long), received);
            let shares = split(bytes, start.max(end - MAX_WINDOW), end);
            prop_assert_eq!(shares.iter().map(|share| u128::from(share.bytes)).sum::<u128>(), u128::from(bytes));
            prop_assert!(shares.windows(2).all(|pair| pair[1].hour - pair[0].hour == Duration::HOUR));
            prop_assert!(shares.len() <= 25);
        }

        #[test]
        fn no_age_makes_a_window_that_ends_before_it_begins(start: u64, end: u64) {
            let (from, to) = window(datetime!(2026-01-01 10:00 UTC), start, end);
            prop_assert!(from <= to && to <= datetime!(2026-01-01 10:00 UTC) && to - from <= MAX_WINDOW);
        }

        #[test]
        fn any_order_and_any_repetition_of_reports_bills_the_greatest_value(mut reports: Vec<u32>, repeat in 0usize..9) {
            let truth = u64::from(reports.iter().copied().max().unwrap_or(0));
            reports.extend(reports.clone().into_iter().rev().take(repeat));
            let (mut known, mut billed) = (0, 0);
            for report in reports {
                billed += growth(known, report.into());
                known = known.max(report.into());
            }
            prop_assert_eq!(billed, truth);
        }
    }
}
