//! The list of servers is the same for everybody: those who ask at the same time are answered by one statement.

use std::sync::Arc;

use cvault_types::ErrorCode;
use sqlx::PgPool;

use super::{Server, read};
use crate::db::DbError;
use crate::http::Problem;
use crate::together::{Serve, Together, Waiting, answer_each};

type Answer = Result<Arc<[Server]>, Problem>;

/// One for the process.
#[derive(Debug, Default, Clone)]
pub struct Listing(Together<Reading>);

struct Reading(PgPool);

impl Listing {
    /// All servers that were not removed when this was called, by region and name.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn servers(&self, sys: &PgPool) -> Answer {
        let answer = self.0.ask((), (), || Reading(sys.clone())).await;
        answer.unwrap_or_else(|| Err(Problem::new(ErrorCode::DatabaseUnavailable).retry_after(1)))
    }
}

impl Serve for Reading {
    type Line = ();
    type Item = ();
    type Answer = Answer;

    const MOST: usize = 256;

    async fn serve(&self, (): &(), batch: Vec<Waiting<Self>>) {
        let found = async { read(&mut *self.0.acquire().await?).await };
        let found: Answer = found.await.map(Arc::from).map_err(|error: DbError| Problem::from(error));
        let everybody = found.map(|servers| vec![servers; batch.len()]);
        answer_each(batch, everybody);
    }
}
