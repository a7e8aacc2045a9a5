//! Users of a tenant who ask for their devices at the same time are answered by one statement: most of what a short one costs is
//! its context and its beginning.

use cvault_types::{ErrorCode, TenantId};

use super::read::{Page, ServedDevice, pages};
use crate::db::DbError;
use crate::http::Problem;
use crate::tenancy::Tenancy;
use crate::together::{Serve, Together, Waiting, answer_each};

type Answer = Result<Vec<ServedDevice>, Problem>;

/// One for the process.
#[derive(Debug, Default, Clone)]
pub struct Listing(Together<Reading>);

struct Reading(Tenancy);

impl Listing {
    /// As [`super::list`].
    ///
    /// # Errors
    /// Those of the database.
    pub async fn page(&self, tenancy: &Tenancy, tenant: TenantId, page: Page) -> Answer {
        let answer = self.0.ask(tenant, page, || Reading(tenancy.clone())).await;
        answer.unwrap_or_else(|| Err(Problem::new(ErrorCode::DatabaseUnavailable).retry_after(1)))
    }
}

impl Reading {
    async fn read(&self, tenant: TenantId, asked: &[Page]) -> Result<Vec<Vec<ServedDevice>>, DbError> {
        let mut tx = self.0.single(tenant).await?;
        let found = pages(&mut tx, asked).await;
        tx.finish(found).await
    }
}

impl Serve for Reading {
    type Line = TenantId;
    type Item = Page;
    type Answer = Answer;

    /// Some thousand rows at the most.
    const MOST: usize = 32;

    async fn serve(&mut self, tenant: &TenantId, batch: Vec<Waiting<Self>>) {
        let asked: Vec<Page> = batch.iter().map(|waiting| waiting.item).collect();
        answer_each(batch, self.read(*tenant, &asked).await.map_err(Problem::from));
    }
}

#[cfg(test)]
mod tests {
    use futures::future::join_all;

    use super::*;
    use crate::testing::{Person, World};
    use cvault_types::DeviceId;

    #[tokio::test]
    async fn each_gets_its_own_devices_and_no_more_than_it_asked_for_whoever_asks_at_the_same_time() {
        let (world, _) = World::with_server().await;
        let mut people: Vec<(Person, Vec<DeviceId>)> = Vec::new();
        // more than one statement takes, of several tenants
        for number in 0..Reading::MOST + 8 {
            let person = match number % 20 {
                0 => world.person().await,
                _ => world.user(people[number - 1].0.tenant, &format!("{number}@example.com")).await,
            };
            let mut own = Vec::new();
            for device in 0..number % 4 {
                own.push(world.register(person, &format!("d{device}")).await.unwrap().id);
            }
            people.push((person, own));
        }
        let (lists, tenancy) = (Listing::default(), &world.app.db.tenancy);
        let asked = people.iter().flat_map(|(person, own)| {
            let second = own.get(1).copied().into_iter().map(|second| (Some(own[0]), 1, vec![second]));
            second.chain([(None, 9, own.clone())]).map(|(after, limit, wanted)| {
                let page = Page { user: person.user, after, limit };
                let found = lists.page(tenancy, person.tenant, page);
                async move { (found.await.unwrap(), wanted) }
            })
        });
        for (found, wanted) in join_all(asked).await {
            assert_eq!(found.iter().map(|served| served.device.id).collect::<Vec<_>>(), wanted);
        }
        let (stranger, (person, own)) = (world.person().await, &people[3]);
        let page = Page { user: person.user, after: None, limit: 9 };
        assert_eq!(lists.page(tenancy, person.tenant, page).await.unwrap().len(), own.len());
        assert_eq!(lists.page(tenancy, stranger.tenant, page).await.unwrap().len(), 0, "another tenant's");
    }
}
