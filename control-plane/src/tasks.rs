//! Periodic work: quarantine, suspensions, sessions, audit chain, usage, mails, signing keys, trimming. Each task runs by itself, is started again after a
//! fault, and stops cleanly. Any number of replicas may run them at once: what a task does in the database changes nothing
//! the second time.

use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::app::App;
use crate::db::DbError;
use crate::{audit, ipam, keys, mail, metrics, sessions, tenants, trim, usage, users};

/// One kind of periodic work; `run` returns how many rows it has dealt with.
struct Task {
    name: &'static str,
    every: Duration,
    run: fn(App) -> BoxFuture<'static, Result<u64, DbError>>,
}

const TASKS: &[Task] = &[
    Task {
        name: "free_quarantined",
        every: Duration::from_secs(1),
        run: |app| Box::pin(async move { ipam::free_quarantined(&app.db.sys).await }),
    },
    Task {
        name: "open_addresses",
        every: Duration::from_secs(1),
        run: |app| Box::pin(async move { ipam::open_ahead(&app.db.sys).await }),
    },
    Task {
        name: "mark_over_limit",
        every: Duration::from_secs(10),
        run: |app| Box::pin(async move { tenants::mark_over_limit(&app.db.sys, app.clock.now()).await }),
    },
    Task {
        name: "enforce_suspensions",
        every: Duration::from_secs(1),
        run: |app| Box::pin(async move { tenants::enforce_suspensions(&app).await }),
    },
    Task {
        name: "finish_deletions",
        every: Duration::from_secs(30),
        run: |app| Box::pin(async move { tenants::finish_deletions(&app).await }),
    },
    Task {
        name: "finish_user_deletions",
        every: Duration::from_secs(30),
        run: |app| Box::pin(async move { users::finish_deletions(&app).await }),
    },
    Task {
        name: "close_silent_sessions",
        every: Duration::from_secs(5),
        run: |app| Box::pin(async move { sessions::close_silent(&app.db.sys).await }),
    },
    Task {
        name: "chain_audit",
        every: Duration::from_secs(2),
        run: |app| Box::pin(async move { audit::chain_new(&app.db.sys).await }),
    },
    Task {
        name: "refresh_usage_daily",
        every: Duration::from_secs(60),
        run: |app| Box::pin(async move { usage::refresh_daily(&app.db.sys).await }),
    },
    Task {
        name: "refresh_usage_week",
        every: Duration::from_secs(3600),
        run: |app| Box::pin(async move { usage::refresh_week(&app.db.sys).await }),
    },
    Task {
        name: "usage_partitions",
        every: Duration::from_secs(6 * 3600),
        run: |app| Box::pin(async move { usage::ensure_partitions(&app.db.sys).await }),
    },
    Task {
        name: "note_key_uses",
        every: Duration::from_secs(15),
        run: |app| Box::pin(async move { app.uses.flush(&app.db.sys).await }),
    },
    Task {
        name: "write_request_logs",
        every: Duration::from_secs(1),
        run: |app| Box::pin(async move { app.request_log.flush(&app.db.sys).await }),
    },
    Task {
        name: "deliver_mail",
        every: Duration::from_secs(1),
        run: |app| Box::pin(async move { mail::deliver(&app).await }),
    },
    Task {
        name: "watch_outbox",
        every: Duration::from_secs(15),
        run: |app| Box::pin(async move { watch_outbox(&app).await }),
    },
    Task {
        name: "sum_metrics",
        every: Duration::from_secs(5),
        run: |_| {
            Box::pin(async {
                metrics::sum_up();
                Ok(0)
            })
        },
    },
    Task {
        name: "reload_signing_keys",
        every: Duration::from_secs(2),
        run: |app| Box::pin(async move { keys::reload(&app).await.map(|()| 0) }),
    },
    Task {
        name: "retire_signing_keys",
        every: Duration::from_secs(60),
        run: |app| Box::pin(async move { keys::retire(&app).await }),
    },
    Task { name: "trim", every: Duration::from_secs(600), run: |app| Box::pin(async move { trim::trim(&app).await }) },
];

/// Between portions of much work, the last of which has `began` then: pauses for as long as it took, which leaves half of the time to
/// whoever waits for an answer, and for a tenth of a second at most. It waits for nothing.
pub(crate) async fn pause_after(began: Instant) {
    tokio::time::sleep(began.elapsed().min(Duration::from_millis(100))).await;
}

/// Runs all tasks until `shutdown`; returns when the last one has finished what it was doing.
pub async fn run(app: App, shutdown: CancellationToken) {
    let tracker = TaskTracker::new();
    for task in TASKS {
        tracker.spawn(repeat(app.clone(), task, shutdown.clone()));
    }
    tracker.close();
    tracker.wait().await;
}

async fn repeat(app: App, task: &'static Task, shutdown: CancellationToken) {
    let mut ticks = interval(task.every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => return,
        }
        // its own task: a panic ends this run and not the supervisor
        match tokio::spawn((task.run)(app.clone())).await {
            Ok(Ok(rows)) => {
                metrics::task_run(task.name, "done");
                if rows > 0 {
                    tracing::debug!(task = task.name, rows, "done");
                }
            }
            Ok(Err(error)) => {
                metrics::task_run(task.name, "failed");
                tracing::warn!(
                    task = task.name,
                    error = crate::http::problem::chain(&error),
                    "a periodic task has failed"
                );
            }
            Err(panicked) => {
                metrics::task_run(task.name, "panicked");
                tracing::error!(task = task.name, error = %panicked, "a periodic task has panicked");
            }
        }
    }
}

async fn watch_outbox(app: &App) -> Result<u64, DbError> {
    let late = mail::expire(&app.db.sys, app.clock.now()).await?;
    mail::measure(&app.db.sys, app.clock.now()).await?;
    Ok(late)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::World;

    #[tokio::test]
    async fn every_task_runs_with_the_rights_it_has() {
        let (world, _) = World::with_server().await;
        let person = world.person().await;
        world.register(person, "d").await.unwrap();
        for task in TASKS {
            for _ in 0..2 {
                (task.run)(world.app.clone()).await.unwrap_or_else(|error| panic!("{}: {error:?}", task.name));
            }
        }
    }

    #[tokio::test]
    async fn all_tasks_end_at_shutdown() {
        let world = World::new().await;
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(run(world.app.clone(), shutdown.clone()));
        shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(10), running).await.unwrap().unwrap();
    }
}
