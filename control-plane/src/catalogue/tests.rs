//! Plants faults and expects each to be named.

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::violations;
use crate::postgres::scratch::ScratchDatabase;
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
            "function peek() outside the schemas of CVault runs with its owner's rights",
        ),
        ("alter function cvault.tenant_id() set search_path = public", "not known: function cvault.tenant_id()"),
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
        (
            "create or replace function cvault.tenant_id() returns uuid language plpgsql stable security definer
             parallel restricted set search_path = pg_catalog, pg_temp
             as 'begin return split_part(current_setting(''app.ctx'', true), ''.'', 1)::uuid; end'",
            "not known: function cvault.tenant_id()",
        ),
        (
            "create role stranger login; grant cvault_fn to stranger; grant cvault_app to stranger",
            "role stranger is a member of cvault_fn",
        ),
        ("alter role cvault_fn login", "role cvault_fn may log in"),
        (
            "create table public.copied as select * from cvault.devices; grant select on public.copied to cvault_app",
            "relation copied outside the schemas of CVault is granted to cvault_app",
        ),
        (
            "create schema elsewhere; create table elsewhere.copied (x integer);
             grant select (x) on elsewhere.copied to public",
            "relation elsewhere.copied outside the schemas of CVault is granted to PUBLIC",
        ),
        (
            "grant execute on function platform.withdraw_peer to cvault_app",
            "not known: function platform.withdraw_peer(uuid)",
        ),
        (
            "create function platform.place_peer(text) returns bigint language sql security definer
             set search_path = pg_catalog, pg_temp as 'select 1::bigint'",
            "not known: function platform.place_peer(text)",
        ),
        ("drop function platform.list_servers", "missing: function platform.list_servers()"),
        ("create rule swap as on update to cvault.users do also notify x", "rule swap on cvault.users"),
        (
            "create function public.spy() returns trigger language plpgsql as 'begin return new; end';
             create trigger spy before insert on cvault.users for each row execute function public.spy()",
            "trigger spy on cvault.users runs code",
        ),
        (
            "do $$ begin execute format('grant create on database %I to cvault_app', current_database()); end $$",
            "role cvault_app may create schemas",
        ),
        ("grant delete on platform.peers to cvault_sys", "not known: relation platform.peers cvault_sys"),
        (
            "grant select (email) on cvault.users to cvault_sys",
            "not known: column cvault.users.email cvault_sys SELECT",
        ),
        (
            "drop index cvault.api_keys_key_text; create unique index api_keys_key_text on cvault.api_keys (name)",
            "unique index cvault.api_keys_key_text does not begin with tenant_id",
        ),
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
async fn the_exact_list_is_what_the_migrations_make() {
    // not a world: a program would refuse to start before the list is written
    let database = ScratchDatabase::create().await.unwrap();
    let mut superuser = PgConnection::connect_with(&database.superuser()).await.unwrap();
    let mut text = super::surface(&mut superuser).await.unwrap().join("\n");
    text.push('\n');
    if std::env::var_os("CVAULT_BLESS").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/src/catalogue/surface.txt"), &text).unwrap();
    }
    assert_eq!(text, include_str!("surface.txt"), "run with CVAULT_BLESS=1 after a change of the migrations");
}

#[tokio::test]
async fn a_role_whose_statements_others_can_see_is_refused() {
    let world = World::new().await;
    let show = "do $$ begin
        execute format('alter role cvault_app in database %I set track_activities = on', current_database()); end $$";
    sqlx::raw_sql(show).execute(&mut world.superuser().await).await.unwrap();
    let db = crate::db::Db::connect(&world.database.config()).await.unwrap();
    let refused = super::check(&db).await.unwrap_err().to_string();
    assert!(refused.contains("track_activities is on for DATABASE_URL"), "{refused}");
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
