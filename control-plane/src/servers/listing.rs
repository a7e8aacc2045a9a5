//! The list of servers is the same for everybody: those who ask at the same time are answered by one statement.

use std::sync::Arc;

use cvault_types::ErrorCode;
use sqlx::PgPool;

use super::{Server, read};
use crate::db::{DbError, Kept};
use crate::http::Problem;
use crate::together::{Serve, Together, Waiting, answer_each};

type Answer = Result<Arc<[Server]>, Problem>;

/// One for the process.
#[derive(Debug, Default, Clone)]
pub struct Listing(Together<Reading>);

struct Reading(Kept);

impl Listing {
    /// All servers that were not removed when this was called, by region and name.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn servers(&self, sys: &PgPool) -> Answer {
        let answer = self.0.ask((), (), || Reading(Kept::of(sys.clone()))).await;
        answer.unwrap_or_else(|| Err(Problem::new(ErrorCode::DatabaseUnavailable).retry_after(1)))
    }
}

impl Reading {
    async fn read(&mut self) -> Result<Vec<Server>, DbError> {
        let mut session = self.0.session().await?;
        let found = read(session.conn()).await?;
        self.0.keep(session);
        Ok(found)
    }
}

impl Serve for Reading {
    type Line = ();
    type Item = ();
    type Answer = Answer;

    const MOST: usize = 256;

    async fn serve(&mut self, (): &(), batch: Vec<Waiting<Self>>) {
        let found: Answer = self.read().await.map(Arc::from).map_err(Problem::from);
        let everybody = found.map(|servers| vec![servers; batch.len()]);
        answer_each(batch, everybody);
    }
}
