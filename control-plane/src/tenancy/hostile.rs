//! SQL as an attacker would run it through role `cvault_app`, inside a valid context of their own tenant: nothing of the
//! other tenant is read or changed.

use sqlx::{AssertSqlSafe, Connection, Executor as _, PgConnection, Row as _};

use super::*;
use crate::testing::{Person, World};

/// Everything the victim owns, as text.
async fn victims_rows(world: &World, victim: Person) -> String {
    let mut superuser = world.superuser().await;
    let mut all = String::new();
    for table in ["tenants", "users", "devices", "sessions", "audit_log", "usage_hourly", "api_keys"] {
        let sql = format!(
            "select coalesce(string_agg(t::text, ',' order by t::text), '') from cvault.{table} t where tenant_id = $1"
        );
        let text: String =
            sqlx::query_scalar(AssertSqlSafe(sql)).bind(victim.tenant.uuid()).fetch_one(&mut superuser).await.unwrap();
        all.push_str(&text);
    }
    for table in ["peers", "addresses", "servers"] {
        let sql = format!("select coalesce(string_agg(t::text, ',' order by t::text), '') from platform.{table} t");
        let text: String = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut superuser).await.unwrap();
        all.push_str(&text);
    }
    all
}

/// Opens a transaction in the tenant's own context.
async fn enter(conn: &mut PgConnection, key: &ContextKey, tenant: TenantId) {
    let backend_pid = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut *conn).await.unwrap();
    let begin = format!("begin; set local app.ctx = '{}'", *key.sign(tenant, Binding::now(backend_pid)));
    sqlx::raw_sql(AssertSqlSafe(begin)).execute(&mut *conn).await.unwrap();
}

/// Runs one or more statements in the attacker's own context and returns every text they gave, errors included.
async fn attack(conn: &mut PgConnection, key: &ContextKey, attacker: TenantId, sql: &str) -> String {
    enter(conn, key, attacker).await;
    let outcome = conn.fetch_all(sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))).await;
    let text = match outcome {
        Ok(rows) => rows
            .iter()
            .map(|row| {
                (0..row.len())
                    .map(|column| {
                        row.try_get_raw(column).ok().and_then(|value| value.as_bytes().ok().map(<[u8]>::to_vec))
                    })
                    .map(|bytes| String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned())
                    .collect::<Vec<_>>()
                    .join("|")
            })
            .collect::<Vec<_>>()
            .join("\n"),
        Err(error) => error.to_string(),
    };
    // what an attacker would want most: that their writes stay
    let _ = sqlx::raw_sql("commit").execute(&mut *conn).await;
    text
}

#[tokio::test]
async fn hostile_sql_reads_and_changes_nothing_of_another_tenant() {
    let (world, server) = World::with_server().await;
    let (victim, attacker) = (world.person().await, world.person().await);
    let device = world.register(victim, "CANARY-device").await.unwrap().id.uuid();
    let own = world.register(attacker, "own").await.unwrap().id.uuid();
    let v = victim.tenant.uuid();
    let a = attacker.tenant.uuid();
    let mut superuser = world.superuser().await;
    sqlx::raw_sql(AssertSqlSafe(format!(
        "update cvault.users set email = 'canary@example.com' where tenant_id = '{v}';
         insert into cvault.sessions (tenant_id, session_id, device_id, user_id, server_id, opened_by)
             values ('{v}', gen_random_uuid(), '{device}', '{u}', '{s}', 'connect');
         insert into cvault.usage_hourly values ('{v}', date_trunc('hour', now()), '{device}', '{u}', '{s}', 987654321, 1)",
        u = victim.user.uuid(),
        s = server.uuid(),
    )))
    .execute(&mut superuser)
    .await
    .unwrap();
    let before = victims_rows(&world, victim).await;

    let key = ContextKey::load(&world.app.db.sys).await.unwrap();
    let mut conn = PgConnection::connect_with(&world.database.options("cvault_app")).await.unwrap();
    let backend_pid = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut conn).await.unwrap();
    let past = Binding { backend_pid, signed_us: 1_000_000_000_000_000 };
    // of this very session, but of long ago
    let expired = key.sign(victim.tenant, past);
    let forged = format!("{v}.{backend_pid}.1000000000000000.{}", "ab".repeat(32));
    let swapped = key.sign(attacker.tenant, past).replace(&a.to_string(), &v.to_string());
    let later = expired.replace("1000000000000000", "9999999999999999");

    let mut statements: Vec<String> = vec![
        "select * from cvault.users".into(),
        "select * from cvault.devices where true or tenant_id = cvault.tenant_id()".into(),
        format!("select * from cvault.users where tenant_id = '{v}'"),
        format!("select set_config('app.tenant_id', '{v}', true); select * from cvault.users"),
        "reset app.ctx; select * from cvault.users".into(),
        "set session app.ctx = 'x'; select * from cvault.users".into(),
        "set row_security = off; select * from cvault.users".into(),
        "set role cvault_owner; select * from cvault.users".into(),
        "set role cvault_sys; select * from cvault.users".into(),
        "set role cvault_fn; select * from cvault.users".into(),
        "set session authorization postgres; select * from cvault.users".into(),
        format!("update cvault.users set email = 'stolen@example.com' where tenant_id = '{v}'"),
        "update cvault.users set email = null, external_user_id = 'x' where email like 'canary%'".into(),
        format!("update cvault.users set tenant_id = '{v}'"),
        format!("update cvault.devices set public_key = '\\x{}' where device_id = '{device}'", "11".repeat(32)),
        "delete from cvault.users".into(),
        format!("delete from cvault.devices where device_id = '{device}'"),
        format!("insert into cvault.users (tenant_id, user_id, email) values ('{v}', gen_random_uuid(), 'evil@example.com')"),
        format!("insert into cvault.users (tenant_id, user_id, email) values ('{v}', '{}', 'x@example.com') on conflict (tenant_id, email) do update set email = excluded.email returning *", victim.user.uuid()),
        format!("insert into cvault.users (tenant_id, user_id, email) values ('{v}', '{}', 'canary@example.com') on conflict do nothing returning *", victim.user.uuid()),
        format!("with w as (update cvault.users set status = 'disabled' where tenant_id = '{v}' returning *) select * from w"),
        "with r as materialized (select * from cvault.devices) select * from r".into(),
        format!("insert into cvault.devices (tenant_id, device_id, user_id, name, public_key, pool_id, ipv4, ipv6, server_id) select '{a}', gen_random_uuid(), '{}', 'x', '\\x{}', pool_id, ipv4, ipv6, server_id from cvault.devices limit 1", victim.user.uuid(), "22".repeat(32)),
        "copy cvault.users to stdout".into(),
        "copy (select * from cvault.users) to program 'cat >/tmp/x'".into(),
        "copy cvault.users from program 'echo'".into(),
        "do $$ begin update cvault.users set status = 'disabled'; execute 'set role cvault_owner'; end $$".into(),
        "prepare p as select * from cvault.users; execute p".into(),
        "declare c cursor for select * from cvault.users; fetch all from c".into(),
        "truncate cvault.users cascade".into(),
        "drop table cvault.users cascade".into(),
        "alter table cvault.users disable row level security".into(),
        "alter table cvault.users no force row level security".into(),
        "create policy open on cvault.users using (true)".into(),
        "drop policy tenant_isolation on cvault.users".into(),
        "create table public.mine as select * from cvault.users".into(),
        "create temp table mine as select * from cvault.users".into(),
        "create function public.leaky(text) returns boolean language plpgsql cost 0.0000001 as $$ begin raise notice '%', $1; return true; end $$; select * from cvault.users where public.leaky(email)".into(),
        "create view public.v as select * from cvault.users".into(),
        "lock table cvault.users in access exclusive mode".into(),
        "select * from cvault.usage_hourly".into(),
        "select * from cvault.usage_hourly_default".into(),
        format!("select * from cvault.usage_hourly_{}", &partition_name(&world)),
        format!("insert into cvault.usage_hourly_{} select * from cvault.usage_hourly", &partition_name(&world)),
        "select * from platform.context_keys".into(),
        "select * from platform.peers".into(),
        "select * from platform.addresses".into(),
        "select * from platform.servers".into(),
        "select * from platform.secrets".into(),
        "update platform.servers set revision = 0".into(),
        "delete from platform.peers".into(),
        "select prosrc, query_to_xml('select * from cvault.users', true, true, '') from pg_proc limit 1".into(),
        "select * from pg_stats where schemaname = 'cvault'".into(),
        "select histogram_bounds, most_common_vals from pg_stats where tablename = 'users'".into(),
        "select lo_import('/etc/passwd')".into(),
        "select pg_read_file('/etc/passwd')".into(),
        "explain analyze select * from cvault.users".into(),
        format!("select platform.place_peer('{device}')"),
        format!("select platform.move_peer('{device}', '{}')", server.uuid()),
        format!("select platform.withdraw_peer('{device}')"),
        format!("select platform.retire_peer('{device}')"),
        format!("select platform.retire_peer('{own}')"),
        format!("select * from platform.allocate_address((select pool_id from cvault.devices limit 1), '{device}')"),
        format!("select platform.take_free_address((select pool_id from cvault.devices limit 1), '{v}', '{device}')"),
        "select platform.ensure_usage_partitions(24)".into(),
        "call platform.protect('cvault.users')".into(),
        "create or replace function cvault.tenant_id() returns uuid language sql as 'select null::uuid'".into(),
        "alter role cvault_app set app.ctx = 'x'".into(),
        "select * from cvault.users tablesample bernoulli (100)".into(),
        "select (select json_agg(u) from cvault.users u), (select xmlagg(xmlelement(name d, d.*)) from cvault.devices d)".into(),
        "merge into cvault.users u using (select 1) x on true when matched then update set status = 'disabled'".into(),
        "select * from cvault.users for update".into(),
        "listen x; notify x, 'y'; select * from cvault.sessions".into(),
        "commit; select * from cvault.users".into(),
        "rollback; select * from cvault.users".into(),
        "abort; begin isolation level serializable; select * from cvault.devices".into(),
        "select dblink('dbname=postgres', 'select 1')".into(),
        "select query from pg_stat_activity".into(),
    ];
    for context in
        [forged.as_str(), expired.as_str(), swapped.as_str(), later.as_str(), &v.to_string(), "", "..", "a.b.c"]
    {
        for table in ["users", "devices", "sessions", "audit_log", "usage_hourly", "tenants"] {
            statements.push(format!("select set_config('app.ctx', '{context}', true); select * from cvault.{table}"));
            statements.push(format!("set local app.ctx = '{context}'; select * from cvault.{table}"));
        }
        statements
            .push(format!("set app.ctx = '{context}'; update cvault.users set status = 'disabled'; reset app.ctx"));
        statements
            .push(format!("select u.email from (select set_config('app.ctx', '{context}', false)) s, cvault.users u"));
    }
    let canaries = ["canary@example.com", "CANARY-device", "987654321"];
    for statement in &statements {
        let seen = attack(&mut conn, &key, attacker.tenant, statement).await;
        for canary in canaries {
            // an attacker may be told again what they said themselves
            assert!(!seen.contains(canary) || statement.contains(canary), "{statement}\nshowed: {seen}");
        }
        let victim_id = v.to_string();
        assert!(!seen.contains(&victim_id) || statement.contains(&victim_id), "{statement}\nshowed: {seen}");
    }
    // the attacker's own registration and retirement touched shared rows; theirs apart, nothing may differ
    assert_eq!(victims_rows(&world, victim).await, before);
    assert!(statements.len() > 150, "{} statements", statements.len());
    // the detector works: without the policies the same statements show everything
    sqlx::raw_sql("alter table cvault.users disable row level security").execute(&mut superuser).await.unwrap();
    let seen = attack(&mut conn, &key, attacker.tenant, "select * from cvault.users").await;
    assert!(seen.contains("canary@example.com"), "{seen}");
}

#[tokio::test]
async fn a_live_transaction_of_the_victim_gives_an_attacker_nothing() {
    let (world, _) = World::with_server().await;
    let (victim, attacker) = (world.person().await, world.person().await);
    world.register(victim, "CANARY-device").await.unwrap();
    let key = ContextKey::load(&world.app.db.sys).await.unwrap();
    let mut conn = PgConnection::connect_with(&world.database.options("cvault_app")).await.unwrap();
    // the victim is in the middle of a request, with a statement that reads and one that locks
    let mut live = world.app.db.tenancy.begin(victim.tenant).await.unwrap();
    let context: String = sqlx::query_scalar("select current_setting('app.ctx')").fetch_one(live.conn()).await.unwrap();
    sqlx::query("update cvault.users set external_user_id = 'CANARY-user'").execute(live.conn()).await.unwrap();

    let mac = context.rsplit('.').next().unwrap();
    let victim_id = victim.tenant.uuid().to_string();
    for statement in [
        "select * from pg_stat_activity",
        "select * from pg_stat_get_activity(null)",
        "select * from pg_locks l left join pg_stat_activity a using (pid)",
        "select * from pg_prepared_statements",
        "select * from pg_cursors",
        "select * from pg_stat_statements",
        "select pg_log_backend_memory_contexts(pid) from pg_stat_activity",
        "set track_activities = on; select * from pg_stat_activity",
        "set stats_fetch_consistency = none; select * from pg_stat_activity",
        "select pg_export_snapshot()",
        "select * from pg_prepared_xacts",
    ] {
        let seen = attack(&mut conn, &key, attacker.tenant, statement).await;
        for secret in [mac, victim_id.as_str(), "CANARY"] {
            assert!(!seen.contains(secret), "{statement}\nshowed: {seen}");
        }
    }
    // even when it was overheard somewhere: it is the context of that one session
    let mut parts: Vec<String> = context.split('.').map(str::to_owned).collect();
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut conn).await.unwrap();
    parts[1] = pid.to_string();
    for stolen in [context.clone(), parts.join(".")] {
        let steal = format!("set local app.ctx = '{stolen}'; select * from cvault.users; select * from cvault.devices");
        let seen = attack(&mut conn, &key, attacker.tenant, &steal).await;
        assert_eq!(seen, "", "{steal}");
    }
    live.commit().await.unwrap();
    let later = format!("set local app.ctx = '{context}'; select * from cvault.users");
    assert_eq!(attack(&mut conn, &key, attacker.tenant, &later).await, "");
    // the test can tell: the attacker's own rows are there
    assert!(
        attack(&mut conn, &key, attacker.tenant, "select * from cvault.users").await.contains("somebody@example.com")
    );
}

#[tokio::test]
async fn a_context_is_worth_nothing_in_its_own_session_when_its_time_is_over() {
    let world = World::new().await;
    let (victim, attacker) = (world.person().await, world.person().await);
    let key = ContextKey::load(&world.app.db.sys).await.unwrap();
    let mut conn = PgConnection::connect_with(&world.database.options("cvault_app")).await.unwrap();
    let backend_pid = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut conn).await.unwrap();
    let now = Binding::now(backend_pid);
    for seconds in [-20, -16, 16, 20] {
        let other = Binding { signed_us: now.signed_us + seconds * 1_000_000, ..now };
        let context = key.sign(victim.tenant, other);
        let steal = format!("set local app.ctx = '{}'; select * from cvault.users", *context);
        assert_eq!(attack(&mut conn, &key, attacker.tenant, &steal).await, "", "{seconds} s");
        let entered = format!("select cvault.enter('{}')", *context);
        assert!(attack(&mut conn, &key, attacker.tenant, &entered).await.contains("not valid"), "{seconds} s");
    }
}

#[tokio::test]
async fn an_api_key_cannot_be_claimed_by_another_tenant() {
    let world = World::new().await;
    let (victim, attacker) = (world.person().await, world.person().await);
    let insert = "insert into cvault.api_keys (tenant_id, api_key_id, key_text, secret_hash)
                  values ($1, gen_random_uuid(), $2, sha256('x'))";
    let mut outcomes = Vec::new();
    for (tenant, text) in [(victim.tenant, "cvk_v"), (attacker.tenant, "cvk_a"), (attacker.tenant, "cvk_v")] {
        let mut tx = world.app.db.tenancy.begin(tenant).await.unwrap();
        let work = sqlx::query(insert).bind(tenant.uuid()).bind(text).execute(tx.conn()).await.map_err(DbError::from);
        outcomes.push(tx.finish(work).await.map(drop).map_err(|error| error.constraint().map(str::to_owned)));
    }
    assert_eq!(outcomes, [Ok(()), Ok(()), Err(Some("api_keys_key_text".to_owned()))]);
    let mut tx = world.app.db.tenancy.begin(attacker.tenant).await.unwrap();
    let renamed = sqlx::query("update cvault.api_keys set key_text = 'cvk_v'").execute(tx.conn()).await;
    assert!(renamed.is_err());
}

fn partition_name(world: &World) -> String {
    let now = world.app.clock.now();
    format!("{:04}_{:02}", now.year(), u8::from(now.month()))
}
