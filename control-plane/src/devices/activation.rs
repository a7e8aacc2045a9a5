//! Waiting until a server has acknowledged a revision.

use std::time::Duration;

use cvault_types::ServerId;
use sqlx::PgPool;
use tokio::time::{Instant, interval, timeout_at};

use crate::db::DbError;
use crate::nodes::Hub;

/// How soon an acknowledgement that another replica has received is noticed.
const POLL: Duration = Duration::from_millis(100);

/// Returns `true` as soon as `server` has acknowledged `revision`, `false` when `deadline` passes first. Needs no
/// transaction and holds no connection while it waits. Cancel-safe.
///
/// # Errors
/// Those of the database.
pub async fn wait_until_acked(
    hub: &Hub,
    sys: &PgPool,
    server: ServerId,
    revision: u64,
    deadline: Instant,
) -> Result<bool, DbError> {
    let mut acked = hub.acked(server);
    let mut poll = interval(POLL);
    // the first tick is immediate, and there is nothing to find yet
    poll.reset();
    loop {
        if *acked.borrow_and_update() >= revision {
            return Ok(true);
        }
        let woken = async {
            tokio::select! {
                changed = acked.changed() => changed.is_ok(),
                _ = poll.tick() => false,
            }
        };
        match timeout_at(deadline, woken).await {
            Err(_) => return Ok(false),
            Ok(true) => {}
            Ok(false) => {
                let known = sqlx::query_scalar!(
                    "select acked_revision from platform.servers where server_id = $1",
                    server.uuid()
                )
                .fetch_optional(sys)
                .await?
                .unwrap_or_default();
                if u64::try_from(known).is_ok_and(|known| known >= revision) {
                    return Ok(true);
                }
            }
        }
    }
}
