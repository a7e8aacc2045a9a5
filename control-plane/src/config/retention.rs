//! How long things are kept: CVAULT_RETENTION_*.

use super::Reader;

/// Days after which a periodic task forgets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    pub auth_events_days: i32,
    /// Closed sessions, revoked devices and keys, bytes of unknown devices.
    pub history_days: i32,
    /// Counters that will not be reported again.
    pub counters_days: i32,
    /// Mails that were delivered or given up.
    pub mail_days: i32,
    /// What was asked with tenants' keys.
    pub request_logs_days: i32,
}

impl Reader<'_> {
    pub(super) fn retention(&mut self) -> Retention {
        Retention {
            auth_events_days: self.days("CVAULT_RETENTION_AUTH_EVENTS_DAYS", 7),
            // a month's report reads the sessions of that month
            history_days: self.days("CVAULT_RETENTION_HISTORY_DAYS", 62),
            // twice as long as an agent keeps what it has told
            counters_days: self.days("CVAULT_RETENTION_COUNTERS_DAYS", 14),
            mail_days: self.days("CVAULT_RETENTION_MAIL_DAYS", 1),
            request_logs_days: self.days("CVAULT_RETENTION_REQUEST_LOGS_DAYS", 1),
        }
    }

    fn days(&mut self, name: &str, min: u32) -> i32 {
        i32::try_from(self.number(name, min, 3_650)).unwrap_or(i32::MAX)
    }
}
