//! The one place that reads the clock. Operations take `now` as an argument.

use time::OffsetDateTime;

/// Tells the time, UTC, to the microsecond, as PostgreSQL keeps it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clock;

impl Clock {
    #[must_use]
    pub fn now(self) -> OffsetDateTime {
        let now = OffsetDateTime::now_utc();
        now.replace_nanosecond(now.nanosecond() / 1_000 * 1_000).expect("fewer nanoseconds than before")
    }
}
