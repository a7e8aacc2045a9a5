//! Every tenant table × verb × context × form of statement, run by role `cvault_app` as an attacker would: the tables
//! are read from the catalogue, so a table nobody thought of is attacked too, and fails the test until it has a row in
//! `seed.sql` to be stolen.

use futures::TryStreamExt as _;
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Connection, Executor as _, PgConnection, Row as _};
use uuid::Uuid;

use super::*;
use crate::testing::{Person, World};

const MARK: &str = "decafbad";
const WORD: &str = "canary";
const NUMBER: &str = "987654321";

/// A tenant table, and what the attacker's role may do with its columns.
struct Table {
    name: String,
    partition: bool,
    readable: Vec<String>,
    insertable: Vec<String>,
    updatable: Vec<String>,
    /// The victim's row, as literals of the insertable columns.
    victims: String,
    primary_key: String,
}

/// One thing an attacker tries, before it is put into a form.
struct Query {
    sql: String,
    /// A row in the answer is the victim's, whatever it holds.
    aims_at_victim: bool,
    reads_only: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Simple,
    Extended,
    Prepared,
    Cursor,
    Cte,
    Do,
    View,
    Aggregate,
    Copy,
}

/// All but COPY.
const FORMS: [Form; 8] =
    [Form::Simple, Form::Extended, Form::Prepared, Form::Cursor, Form::Cte, Form::Do, Form::View, Form::Aggregate];

impl Form {
    fn of(self, sql: &str) -> String {
        match self {
            Self::Simple | Self::Extended => sql.to_owned(),
            Self::Prepared => format!("deallocate all; prepare attack as {sql}; execute attack"),
            Self::Cursor => format!("declare attack cursor for {sql}; fetch all from attack"),
            Self::Cte => format!("with attack as ({sql}) select * from attack"),
            // what a loop finds is shown by the error it raises
            Self::Do => format!(
                "do $x$ declare r record; begin for r in {sql} loop raise exception 'found %', r; end loop; end $x$"
            ),
            Self::View => format!("create temporary view attack as {sql}; select * from attack"),
            Self::Aggregate => format!("with attack as ({sql}) select json_agg(attack) from attack"),
            Self::Copy => format!("copy ({sql}) to stdout"),
        }
    }
}

async fn seed(superuser: &mut PgConnection, person: Person, device: Uuid, server: Uuid, marks: [&str; 3]) {
    let sql = include_str!("seed.sql")
        .replace("TENANT", &person.tenant.uuid().to_string())
        .replace("USER", &person.user.uuid().to_string())
        .replace("DEVICE", &device.to_string())
        .replace("SERVER", &server.to_string())
        .replace("MARK", marks[0])
        .replace("WORD", marks[1])
        .replace("NUMBER", marks[2]);
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(superuser).await.unwrap();
}

async fn tables(superuser: &mut PgConnection, victim: Person) -> Vec<Table> {
    let rows = sqlx::query(
        "select c.relname::text as name, c.relispartition as partition,
                coalesce((select conname::text from pg_constraint where conrelid = c.oid and contype = 'p'), '') as pkey,
                array_agg(quote_ident(a.attname)) filter
                    (where has_column_privilege('cvault_app', c.oid, a.attnum, 'select')) as readable,
                array_agg(quote_ident(a.attname)) filter
                    (where has_column_privilege('cvault_app', c.oid, a.attnum, 'insert')) as insertable,
                array_agg(quote_ident(a.attname)) filter
                    (where has_column_privilege('cvault_app', c.oid, a.attnum, 'update')) as updatable
         from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
         where c.relnamespace = 'cvault'::regnamespace and c.relkind in ('r', 'p')
         group by c.oid, c.relname, c.relispartition order by c.relname",
    )
    .fetch_all(&mut *superuser)
    .await
    .unwrap();
    let mut tables = Vec::new();
    for row in rows {
        let name: String = row.get("name");
        let columns = |what| row.get::<Option<Vec<String>>, _>(what).unwrap_or_default();
        let insertable = columns("insertable");
        let victim = victim.tenant.uuid();
        let literals = if insertable.is_empty() { vec!["tenant_id".to_owned()] } else { insertable.clone() };
        let literals: Vec<_> = literals.iter().map(|column| format!("quote_nullable({column}::text)")).collect();
        let sql = format!(
            "select concat_ws(', ', {}) from cvault.{name} where tenant_id = '{victim}' limit 1",
            literals.join(", ")
        );
        let victims: Option<String> =
            sqlx::query_scalar(AssertSqlSafe(sql)).fetch_optional(&mut *superuser).await.unwrap();
        tables.push(Table {
            victims: victims.unwrap_or_else(|| panic!("give seed.sql a row of cvault.{name}")),
            partition: row.get("partition"),
            readable: columns("readable"),
            updatable: columns("updatable"),
            primary_key: row.get("pkey"),
            insertable,
            name,
        });
    }
    tables
}

/// Everything that is not the attacker's, table by table.
async fn digests(superuser: &mut PgConnection, attacker: Person) -> Vec<(String, String)> {
    let all: String = sqlx::query_scalar(
        r#"select string_agg(format(
               'select %L, md5(coalesce(string_agg(t::text, '','' order by t::text), '''')) from %s t %s', c.oid::regclass,
               c.oid::regclass, case when a.attname is null then '' else format('where tenant_id is distinct from %L', $1) end),
               ' union all ' order by c.oid)
           from pg_class c left join pg_attribute a on a.attrelid = c.oid and a.attname = 'tenant_id'
           where c.relnamespace in ('cvault'::regnamespace, 'platform'::regnamespace) and c.relkind in ('r', 'p')
             and not c.relispartition"#,
    )
    .bind(attacker.tenant.uuid().to_string())
    .fetch_one(&mut *superuser)
    .await
    .unwrap();
    sqlx::query_as(AssertSqlSafe(all)).fetch_all(superuser).await.unwrap()
}

fn queries(table: &Table, victim: Uuid) -> Vec<Query> {
    let name = format!("cvault.{}", table.name);
    // a table of which nothing may be read is asked for everything
    let read = if table.readable.is_empty() { "*".to_owned() } else { table.readable.join(", ") };
    let back = if table.readable.is_empty() { "1".to_owned() } else { read.clone() };
    let insertable = if table.insertable.is_empty() { vec!["tenant_id".to_owned()] } else { table.insertable.clone() };
    let columns = insertable.join(", ");
    let moved: Vec<_> = insertable
        .iter()
        .map(|column| if column == "tenant_id" { format!("'{victim}'::uuid") } else { column.clone() })
        .collect();
    let moved = moved.join(", ");
    let update = table.updatable.iter().find(|column| *column != "tenant_id").map_or("tenant_id", String::as_str);
    let victims = &table.victims;
    let mut queries = Vec::new();
    let mut add = |aims_at_victim, reads_only, sql| queries.push(Query { sql, aims_at_victim, reads_only });
    add(false, true, format!("select {read} from {name}"));
    add(true, true, format!("select {read} from {name} where tenant_id = '{victim}'"));
    add(true, true, format!("select {read} from {name} where tenant_id <> (select cvault.tenant_id())"));
    add(true, true, format!("select t::text::integer as number from {name} t where t.tenant_id = '{victim}'"));
    add(
        true,
        true,
        format!("select 1 / (length(tenant_id::text) - 36) as found from {name} where tenant_id = '{victim}'"),
    );
    add(true, true, format!("select {read} from {name} where tenant_id = '{victim}' for update"));
    add(false, false, format!("update {name} set {update} = {update} returning {back}"));
    add(true, false, format!("update {name} set {update} = {update} where tenant_id = '{victim}' returning {back}"));
    add(true, false, format!("update {name} set tenant_id = '{victim}' returning {back}"));
    add(false, false, format!("delete from {name} returning {back}"));
    add(true, false, format!("delete from {name} where tenant_id = '{victim}' returning {back}"));
    add(
        true,
        false,
        format!("insert into {name} ({columns}) select {moved} from {name} on conflict do nothing returning {back}"),
    );
    add(
        true,
        false,
        format!("insert into {name} ({columns}) values ({victims}) on conflict do nothing returning {back}"),
    );
    add(
        true,
        false,
        format!(
            "insert into {name} ({columns}) values ({victims}) on conflict on constraint {} do update
             set {update} = excluded.{update} returning {back}",
            table.primary_key
        ),
    );
    add(
        true,
        false,
        format!("merge into {name} t using (select 1) x on t.tenant_id = '{victim}' when matched then delete"),
    );
    queries
}

/// The attacker's session.
struct Attacker {
    conn: PgConnection,
    key: ContextKey,
    tenant: TenantId,
    statements: usize,
    /// How the open transaction is to end.
    end: &'static str,
}

impl Attacker {
    /// Begins a transaction in the attacker's own context, then takes another one if there is one.
    async fn enter(&mut self, end: &'static str, context: Option<&str>) {
        let end = std::mem::replace(&mut self.end, end);
        let begin = format!("{end}; begin; select pg_backend_pid() as pid");
        let row = self.conn.fetch_all(sqlx::raw_sql(AssertSqlSafe(begin))).await.unwrap().pop().unwrap();
        let own = self.key.sign(self.tenant, Binding::now(row.get("pid")));
        let set = format!("set local app.ctx = '{}'", context.unwrap_or(&own));
        sqlx::raw_sql(AssertSqlSafe(set)).execute(&mut self.conn).await.unwrap();
    }

    /// The rows or the error that a statement gave, as text.
    async fn run(&mut self, form: Form, sql: String) -> Result<String, String> {
        self.statements += 1;
        let rows = match form {
            Form::Copy => {
                return match self.conn.copy_out_raw(&sql).await {
                    Ok(stream) => match stream.try_collect::<Vec<_>>().await {
                        Ok(parts) => Ok(String::from_utf8_lossy(&parts.concat()).into_owned()),
                        Err(error) => Err(error.to_string()),
                    },
                    Err(error) => Err(error.to_string()),
                };
            }
            Form::Extended => sqlx::query(AssertSqlSafe(sql)).persistent(false).fetch_all(&mut self.conn).await,
            Form::Simple | Form::Prepared | Form::Cursor | Form::Cte | Form::Do | Form::View | Form::Aggregate => {
                self.conn.fetch_all(sqlx::raw_sql(AssertSqlSafe(sql))).await
            }
        };
        rows.map(|rows| rows.iter().map(shown).collect()).map_err(|error| error.to_string())
    }
}

/// Every column as text and in hex; nothing for a row of nulls.
fn shown(row: &PgRow) -> String {
    (0..row.len())
        .filter_map(|column| row.try_get_raw(column).ok()?.as_bytes().ok().map(<[u8]>::to_vec))
        .map(|bytes| format!("{}|{}|", String::from_utf8_lossy(&bytes), hex::encode(&bytes)))
        .collect()
}

#[tokio::test]
async fn no_statement_in_any_form_and_context_reaches_any_table_of_another_tenant() {
    let (world, server) = World::with_server().await;
    let (victim, attacker) = (world.person().await, world.person().await);
    let mut superuser = world.superuser().await;
    for (person, marks) in [(victim, [MARK, WORD, NUMBER]), (attacker, ["facade00", "own", "11"])] {
        let device = world.register(person, marks[1]).await.unwrap().id.uuid();
        seed(&mut superuser, person, device, server.uuid(), marks).await;
    }
    let tables = tables(&mut superuser, victim).await;
    assert!(tables.len() > 20 && tables.iter().any(|table| table.partition), "the catalogue was not read");
    let before = digests(&mut superuser, attacker).await;

    let key = ContextKey::load(&world.app.db.sys).await.unwrap();
    let mut conn = PgConnection::connect_with(&world.database.options("cvault_app")).await.unwrap();
    let backend_pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut conn).await.unwrap();
    let contexts = contexts(&key, victim.tenant, attacker.tenant, backend_pid);
    let mut session = Attacker { conn, key, tenant: attacker.tenant, statements: 0, end: "rollback" };
    for table in &tables {
        for query in queries(table, victim.tenant.uuid()) {
            for context in std::iter::once(None).chain(contexts.iter().map(Some)) {
                for form in FORMS {
                    if !query.reads_only && matches!(form, Form::Cursor | Form::View) {
                        continue;
                    }
                    attack(&mut session, &query, context.map(String::as_str), form).await;
                }
            }
        }
        session.enter("rollback", None).await;
        assert_eq!(digests(&mut superuser, attacker).await, before, "attacks on cvault.{}", table.name);
    }
    for query in tables.iter().flat_map(|table| queries(table, victim.tenant.uuid())) {
        attack(&mut session, &query, None, Form::Copy).await;
        // sqlx loses count of the answers when a COPY is refused
        session.conn = PgConnection::connect_with(&world.database.options("cvault_app")).await.unwrap();
    }
    assert_eq!(digests(&mut superuser, attacker).await, before, "COPY");
    assert!(session.statements > 15_000, "{} statements", session.statements);

    // the detectors work: without the policies the same statement shows the row, and changes it
    sqlx::raw_sql("alter table cvault.users disable row level security").execute(&mut superuser).await.unwrap();
    session.enter("commit", None).await;
    let seen = session.run(Form::Simple, "select * from cvault.users".to_owned()).await.unwrap();
    assert!(seen.contains(WORD), "{seen}");
    session.run(Form::Simple, "update cvault.users set status = 'disabled'".to_owned()).await.unwrap();
    session.enter("rollback", None).await;
    assert_ne!(digests(&mut superuser, attacker).await, before);
}

/// Contexts that must be worth nothing in this session.
fn contexts(key: &ContextKey, victim: TenantId, attacker: TenantId, backend_pid: i32) -> Vec<String> {
    let past = Binding { backend_pid, signed_us: 1_000_000_000_000_000 };
    let expired = key.sign(victim, past).to_string();
    vec![
        String::new(),
        victim.uuid().to_string(),
        format!("{}.{backend_pid}.1000000000000000.{}", victim.uuid(), "ab".repeat(32)),
        expired.replace("1000000000000000", "9999999999999999"),
        key.sign(attacker, past).replace(&attacker.uuid().to_string(), &victim.uuid().to_string()),
        // of another session, as long as this may take
        key.sign(victim, Binding::now(backend_pid + 1)).to_string(),
        expired,
    ]
}

async fn attack(session: &mut Attacker, query: &Query, context: Option<&str>, form: Form) {
    // what aims at the victim is committed; the rest is undone, so that the attacker keeps rows to attack with
    let end = if query.aims_at_victim || context.is_some() { "commit" } else { "rollback" };
    session.enter(end, context).await;
    let sql = form.of(&query.sql);
    let outcome = session.run(form, sql.clone()).await;
    if let Ok(rows) = &outcome {
        assert!(rows.is_empty() || !(query.aims_at_victim || context.is_some()), "{context:?}: {sql}\nshowed: {rows}");
    }
    let (Ok(text) | Err(text)) = outcome;
    let text = text.to_lowercase();
    for canary in [MARK, WORD, NUMBER, "found (", "division by zero"] {
        // an attacker may be told again what they said themselves, and shown their own rows
        let own = canary == "found (" && context.is_none() && !query.aims_at_victim;
        assert!(own || sql.contains(canary) || !text.contains(canary), "{context:?}: {sql}\nshowed: {text}");
    }
}
