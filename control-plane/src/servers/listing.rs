//! The list of servers is the same for everybody: those who ask at the same time are answered by one statement, and with the
//! same bytes.

use cvault_types::ErrorCode;
use sqlx::PgPool;
use time::OffsetDateTime;

use super::{Server, read};
use crate::db::{DbError, Kept};
use crate::http::{Problem, Written};
use crate::together::{Serve, Together, Waiting, answer_each};

type Answer = Result<Written, Problem>;

/// One for the process.
#[derive(Debug, Default, Clone)]
pub struct Listing(Together<Reading>);

struct Reading {
    sys: Kept,
    write: fn(&[Server], OffsetDateTime) -> Answer,
}

impl Listing {
    /// What `write` makes, at about `now`, of all servers that were not removed when this was called, by region and name.
    ///
    /// # Errors
    /// Those of the database and of `write`.
    pub async fn servers(
        &self,
        sys: &PgPool,
        now: OffsetDateTime,
        write: fn(&[Server], OffsetDateTime) -> Answer,
    ) -> Answer {
        let answer = self.0.ask((), now, || Reading { sys: Kept::of(sys.clone()), write }).await;
        answer.unwrap_or_else(|| Err(Problem::new(ErrorCode::DatabaseUnavailable).retry_after(1)))
    }
}

impl Reading {
    async fn read(&mut self) -> Result<Vec<Server>, DbError> {
        let mut session = self.sys.session().await?;
        let found = read(session.conn()).await?;
        self.sys.keep(session);
        Ok(found)
    }
}

impl Serve for Reading {
    type Line = ();
    /// When they asked.
    type Item = OffsetDateTime;
    type Answer = Answer;

    const MOST: usize = 256;

    async fn serve(&mut self, (): &(), batch: Vec<Waiting<Self>>) {
        let now = batch.last().expect("one at least").item;
        let found = self.read().await.map_err(Problem::from);
        let answer = found.and_then(|servers| (self.write)(&servers, now));
        let everybody = answer.map(|answer| vec![answer; batch.len()]);
        answer_each(batch, everybody);
    }
}
