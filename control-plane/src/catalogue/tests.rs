//! Plants faults and expects each to be named.

use sqlx::AssertSqlSafe;

use super::violations;
use crate::testing::World;

#[tokio::test]
async fn every_planted_fault_is_named() {
    let world = World::new().await;
    let mut owner = world.superuser().await;
    assert_eq!(violations(&mut owner).await.unwrap(), Vec::<String>::new());
    let faults = [
        ("alter table cvault.devices no force row level security", "table cvault.devices has no row-level security"),
        ("alter table cvault.users disable row level security", "table cvault.users has no row-level security"),
        ("drop policy tenant_isolation on cvault.sessions", "table cvault.sessions has no tenant policy"),
        ("alter policy tenant_isolation on cvault.users with check (true)", "table cvault.users has no tenant policy"),
        (
            "create policy open on cvault.users to cvault_app using (true)",
            "policy open on cvault.users opens the table",
        ),
        (
            "grant select on cvault.usage_hourly_default to cvault_app",
            "privilege SELECT on cvault.usage_hourly_default",
        ),
        (
            "grant select on platform.servers to cvault_app",
            "privilege SELECT on platform.servers is granted to cvault_app",
        ),
        ("grant select (key) on platform.context_keys to cvault_app", "privilege SELECT on platform.context_keys"),
        ("grant select on cvault.users to public", "privilege SELECT on cvault.users is granted to PUBLIC"),
        ("grant truncate on cvault.users to cvault_app", "privilege TRUNCATE on cvault.users"),
        ("grant update on cvault.audit_log to cvault_app", "privilege UPDATE on cvault.audit_log"),
        ("create view cvault.leak as select * from cvault.devices", "view cvault.leak runs with its owner's rights"),
        (
            "create materialized view cvault.copy as select * from cvault.devices",
            "materialised view cvault.copy cannot have",
        ),
        (
            "create function public.peek() returns bigint language sql security definer
             as 'select count(*) from cvault.devices'",
            "function peek() runs with its owner's rights",
        ),
        (
            "alter function cvault.tenant_id() set search_path = public",
            "function cvault.tenant_id() runs with its owner's rights and is not one of the known ones",
        ),
        (
            "grant execute on function platform.withdraw_peer to public",
            "withdraw_peer(uuid) may be executed by everybody",
        ),
        ("create table cvault.forgotten (x integer)", "table cvault.forgotten has no row-level security"),
        ("create unique index bare on cvault.users (email)", "unique index cvault.bare does not begin with tenant_id"),
        ("alter default privileges in schema cvault grant select on tables to cvault_app", "default privileges of"),
        ("grant create on schema cvault to cvault_app", "schema cvault lets cvault_app create objects"),
        ("alter role cvault_app bypassrls", "role cvault_app is superuser, BYPASSRLS"),
        ("grant cvault_owner to cvault_app", "role cvault_app is a member of cvault_owner"),
    ];
    for (fault, named) in faults {
        let mut tx = sqlx::Connection::begin(&mut owner).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(fault.to_owned())).execute(&mut *tx).await.unwrap();
        let found = violations(&mut tx).await.unwrap();
        assert!(found.iter().any(|violation| violation.contains(named)), "{fault}: {found:?}");
        tx.rollback().await.unwrap();
    }
    assert_eq!(violations(&mut owner).await.unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn a_program_logged_in_as_another_role_is_refused_by_name() {
    let world = World::new().await;
    let mut config = world.database.config();
    config.app = world.database.superuser();
    let db = crate::db::Db::connect(&config).await.unwrap();
    let refused = super::check(&db).await.unwrap_err().to_string();
    assert!(refused.contains("DATABASE_URL logs in as"), "{refused}");
}
