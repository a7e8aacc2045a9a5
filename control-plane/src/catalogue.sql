-- The start-up and CI gate: every row is a violation, and the server refuses to serve when there is one.
-- These are rules; `catalogue/surface.sql` compares functions and grants with an exact list. Reads the catalogue itself and not information_schema, which shows a role only its own grants. About 5 ms.
with
role_ids as (
    select oid, rolname from pg_roles where rolname in ('cvault_owner', 'cvault_app', 'cvault_sys', 'cvault_fn')
),
tables as (
    select c.oid, c.oid::regclass::text as name, n.nspname as schema, c.relrowsecurity, c.relforcerowsecurity
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname in ('cvault', 'platform') and c.relkind in ('r', 'p')
),
grants as (
    select c.oid, c.oid::regclass::text as name, n.nspname as schema, c.relispartition,
           coalesce(r.rolname, 'PUBLIC') as grantee, a.privilege_type as privilege
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    cross join lateral (
        select * from aclexplode(c.relacl)
        union all
        select x.* from pg_attribute t cross join lateral aclexplode(t.attacl) x where t.attrelid = c.oid
    ) a
    left join pg_roles r on r.oid = a.grantee
    where n.nspname in ('cvault', 'platform')
)
select 'role ' || rolname || ' is missing' as violation
from unnest(array['cvault_owner', 'cvault_app', 'cvault_sys', 'cvault_fn']) as wanted (rolname)
where not exists (select from pg_roles r where r.rolname = wanted.rolname)
union all
select 'role ' || rolname || ' is superuser, BYPASSRLS, CREATEROLE, CREATEDB or REPLICATION'
from pg_roles
where rolname in ('cvault_owner', 'cvault_app', 'cvault_sys', 'cvault_fn')
  and (rolsuper or rolbypassrls or rolcreaterole or rolcreatedb or rolreplication)
union all
select 'role ' || m.rolname || ' is a member of ' || r.rolname
from pg_auth_members am join pg_roles r on r.oid = am.roleid join pg_roles m on m.oid = am.member
where (m.oid in (select oid from role_ids where rolname <> 'cvault_owner') or r.oid in (select oid from role_ids))
  and (m.rolname, r.rolname) <> ('cvault_owner', 'cvault_fn')
union all
select 'role cvault_fn may log in' from pg_roles where rolname = 'cvault_fn' and rolcanlogin
union all
select 'role ' || o.rolname || ' owns ' || c.oid::regclass
from pg_class c join pg_roles o on o.oid = c.relowner
where o.rolname in ('cvault_app', 'cvault_sys', 'cvault_fn')
union all
select 'table ' || name || ' has no row-level security, or not forced'
from tables where schema = 'cvault' and not (relrowsecurity and relforcerowsecurity)
union all
select 'table ' || name || ' has no tenant policy'
from tables t
where schema = 'cvault' and not exists (
    select from pg_policy p
    where p.polrelid = t.oid and p.polname = 'tenant_isolation' and p.polcmd = '*' and p.polpermissive
      and pg_get_expr(p.polqual, p.polrelid) = '(tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))'
      and pg_get_expr(p.polwithcheck, p.polrelid) = '(tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))')
union all
select 'policy ' || p.polname || ' on ' || t.name || ' opens the table to others than cvault_sys'
from pg_policy p join tables t on t.oid = p.polrelid
where p.polname <> 'tenant_isolation' and p.polroles <> array(select oid from role_ids where rolname = 'cvault_sys')
union all
select 'table ' || name || ' has no column tenant_id uuid not null'
from tables t
where schema = 'cvault' and not exists (
    select from pg_attribute a
    where a.attrelid = t.oid and a.attname = 'tenant_id' and a.attnotnull and a.atttypid = 'uuid'::regtype)
union all
select 'unique index ' || i.indexrelid::regclass || ' does not begin with tenant_id'
from pg_index i join tables t on t.oid = i.indrelid
where schema = 'cvault' and i.indisunique
  -- found before the tenant is known; none may claim another's
  and not (i.indexrelid::regclass::text = 'cvault.api_keys_key_text'
           and pg_get_indexdef(i.indexrelid) = 'CREATE UNIQUE INDEX api_keys_key_text ON cvault.api_keys USING btree (key_text)')
  and not (i.indexrelid::regclass::text = 'cvault.tenant_admins_email'
           and pg_get_indexdef(i.indexrelid) = 'CREATE UNIQUE INDEX tenant_admins_email ON cvault.tenant_admins USING btree (email)')
  -- staff's requests, which may make the tenant; no principal of a tenant is called so
  and not (i.indexrelid::regclass::text = 'cvault.idempotency_keys_staff'
           and pg_get_indexdef(i.indexrelid) = 'CREATE UNIQUE INDEX idempotency_keys_staff ON cvault.idempotency_keys USING btree (principal, key) WHERE (principal ~~ ''admin:%''::text)')
  and not exists (
    select from pg_attribute a where a.attrelid = t.oid and a.attnum = i.indkey[0] and a.attname = 'tenant_id')
union all
select 'foreign key ' || k.conname || ' on ' || t.name || ' leaves tenant_id out'
from pg_constraint k join tables t on t.oid = k.conrelid join tables f on f.oid = k.confrelid
where k.contype = 'f' and t.schema = 'cvault' and f.schema = 'cvault' and not exists (
    select from pg_attribute a where a.attrelid = t.oid and a.attname = 'tenant_id' and a.attnum = any (k.conkey))
union all
select 'privilege ' || privilege || ' on ' || name || ' is granted to ' || grantee
from grants
where grantee = 'PUBLIC'
   or grantee = 'cvault_app' and (
       schema = 'platform' or relispartition or privilege in ('TRUNCATE', 'REFERENCES', 'TRIGGER')
       or name in ('cvault.audit_log', 'cvault.auth_events') and privilege in ('UPDATE', 'DELETE'))
   or grantee = 'cvault_sys' and privilege in ('TRUNCATE', 'REFERENCES', 'TRIGGER')
   or grantee not in ('PUBLIC', 'cvault_owner', 'cvault_app', 'cvault_sys', 'cvault_fn')
union all
select 'relation ' || c.oid::regclass || ' outside the schemas of CVault is granted to ' || coalesce(r.rolname, 'PUBLIC')
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
cross join lateral (
    select * from aclexplode(c.relacl)
    union all
    select x.* from pg_attribute t cross join lateral aclexplode(t.attacl) x where t.attrelid = c.oid
) a
left join pg_roles r on r.oid = a.grantee
where n.nspname not in ('cvault', 'platform', 'pg_catalog', 'information_schema')
  and (a.grantee = 0 or r.rolname in ('cvault_app', 'cvault_sys', 'cvault_fn'))
  and not (c.oid::regclass::text = '_sqlx_migrations' and r.rolname = 'cvault_sys' and a.privilege_type = 'SELECT')
  and not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')
union all
select 'rule ' || w.rulename || ' on ' || w.ev_class::regclass || ' rewrites statements'
from pg_rewrite w join tables t on t.oid = w.ev_class
union all
select 'trigger ' || g.tgname || ' on ' || g.tgrelid::regclass || ' runs code'
from pg_trigger g join tables t on t.oid = g.tgrelid
where not g.tgisinternal
union all
select 'view ' || c.oid::regclass || ' runs with its owner''s rights'
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname in ('cvault', 'platform', 'public') and c.relkind = 'v'
  and not coalesce(c.reloptions && array['security_invoker=true', 'security_invoker=on'], false)
  and not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')
union all
select 'materialised view ' || c.oid::regclass || ' cannot have row-level security'
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname in ('cvault', 'platform', 'public') and c.relkind = 'm'
union all
select 'function ' || p.oid::regprocedure || ' outside the schemas of CVault runs with its owner''s rights'
from pg_proc p join pg_namespace n on n.oid = p.pronamespace
where n.nspname not in ('cvault', 'platform', 'pg_catalog', 'information_schema') and p.prosecdef
  and not exists (select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'e')
union all
select 'function ' || p.oid::regprocedure || ' may be executed by everybody'
from pg_proc p join pg_namespace n on n.oid = p.pronamespace
where n.nspname in ('cvault', 'platform') and has_function_privilege('public', p.oid, 'execute')
union all
select 'default privileges of ' || d.defaclrole::regrole || ' give ' || x.privilege_type || ' to ' || coalesce(r.rolname, 'PUBLIC')
from pg_default_acl d cross join lateral aclexplode(d.defaclacl) x left join pg_roles r on r.oid = x.grantee
where x.grantee = 0 or r.rolname in ('cvault_app', 'cvault_sys')
union all
select 'schema ' || n.nspname || ' lets ' || r.rolname || ' create objects'
from pg_namespace n, pg_roles r
where n.nspname in ('cvault', 'platform', 'public') and r.rolname in ('cvault_app', 'cvault_sys', 'cvault_fn')
  and has_schema_privilege(r.oid, n.oid, 'create')
union all
select 'role ' || rolname || ' may create schemas or temporary tables'
from pg_roles
where rolname in ('cvault_app', 'cvault_sys', 'cvault_fn') and has_database_privilege(oid, current_database(), 'create, temp')
union all
select 'the active keys of the tenant context are not one or two'
where (select count(*) from platform.context_keys where active) not in (1, 2)
