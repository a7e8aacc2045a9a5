-- Every function and every grant in the schemas of CVault, one line each: what `surface.txt` must be. Owners' rights to
-- what they own are left out, and so are the partitions of usage_hourly, which come and go.
select line collate "C" from (
    select 'function ' || p.oid::regprocedure || ' ' || md5(p.prosrc) || ' ' || l.lanname || ' owner ' || o.rolname
           || case when p.prosecdef then ' definer' else '' end
           || coalesce(' set ' || array_to_string(p.proconfig, '; '), '')
           || coalesce(' execute ' || (
                  select string_agg(coalesce(r.rolname, 'PUBLIC'), ',' order by r.rolname collate "C")
                  from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a left join pg_roles r on r.oid = a.grantee
                  where a.grantee <> p.proowner), '') as line
    from pg_proc p
    join pg_namespace n on n.oid = p.pronamespace
    join pg_language l on l.oid = p.prolang
    join pg_roles o on o.oid = p.proowner
    where n.nspname in ('cvault', 'platform')
    union all
    select 'relation ' || c.oid::regclass || ' ' || coalesce(r.rolname, 'PUBLIC') || ' '
           || string_agg(a.privilege_type || case when a.is_grantable then '*' else '' end, ',' order by a.privilege_type)
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    cross join lateral aclexplode(c.relacl) a
    left join pg_roles r on r.oid = a.grantee
    where n.nspname in ('cvault', 'platform') and a.grantee <> c.relowner
    group by c.oid, r.rolname
    union all
    select 'column ' || c.oid::regclass || '.' || t.attname || ' ' || coalesce(r.rolname, 'PUBLIC') || ' '
           || string_agg(a.privilege_type || case when a.is_grantable then '*' else '' end, ',' order by a.privilege_type)
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    join pg_attribute t on t.attrelid = c.oid
    cross join lateral aclexplode(t.attacl) a
    left join pg_roles r on r.oid = a.grantee
    where n.nspname in ('cvault', 'platform') and a.grantee <> c.relowner
    group by c.oid, t.attname, r.rolname
    union all
    select 'schema ' || n.nspname || ' ' || coalesce(r.rolname, 'PUBLIC') || ' ' || string_agg(a.privilege_type, ',' order by a.privilege_type)
    from pg_namespace n cross join lateral aclexplode(n.nspacl) a left join pg_roles r on r.oid = a.grantee
    where n.nspname in ('cvault', 'platform') and a.grantee <> n.nspowner
    group by n.nspname, r.rolname
) as surface
order by 1
