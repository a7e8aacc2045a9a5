-- Schemas, and the tenant context that SQL run as the application's own role cannot forge.
create schema cvault;    -- tenant tables: every one has tenant_id and row-level security
create schema platform;  -- shared infrastructure: servers, pools, peers, metering; no grant to cvault_app

grant usage on schema cvault to cvault_app, cvault_sys, cvault_fn;
grant usage on schema platform to cvault_app, cvault_sys, cvault_fn;
-- needed while ownership of functions is handed over; taken back by the last statement of each migration that does so
grant create on schema cvault, platform to cvault_fn;

-- Keys of the tenant context. Two may be active while one replaces the other.
create table platform.context_keys (
    key_id smallint not null,
    key bytea not null,
    active boolean not null default true,
    created_at timestamptz not null default now(),
    constraint context_keys_pkey primary key (key_id),
    constraint context_keys_key_length check (octet_length(key) = 32)
);
grant select on platform.context_keys to cvault_fn, cvault_sys;

-- app.ctx = '<tenant uuid>.<backend pid>.<transaction start, unix microseconds>.<hex mac>',
-- mac = H(k || H(k || tenant || '.' || pid || '.' || start)), H = SHA-256.
-- Anything missing, malformed or forged, or of another session or transaction, gives NULL: no row is visible.
create function cvault.tenant_id() returns uuid
language plpgsql stable security definer parallel restricted
set search_path = pg_catalog, pg_temp
as $$
declare
    ctx constant text := current_setting('app.ctx', true);
    body text;
    k bytea;
begin
    -- after COMMIT a local setting is '' and not NULL; the pattern refuses both
    if ctx is null or ctx !~ '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\.[0-9]{1,10}\.[0-9]{1,18}\.[0-9a-f]{64}$' then
        return null;
    end if;
    -- so a context that was overheard is worth nothing anywhere else
    if split_part(ctx, '.', 2)::bigint <> pg_backend_pid()
       or split_part(ctx, '.', 3)::bigint <> (extract(epoch from transaction_timestamp()) * 1000000)::bigint then
        return null;
    end if;
    body := split_part(ctx, '.', 1) || '.' || split_part(ctx, '.', 2) || '.' || split_part(ctx, '.', 3);
    for k in select c.key from platform.context_keys c where c.active loop
        if encode(sha256(k || sha256(k || convert_to(body, 'UTF8'))), 'hex') = split_part(ctx, '.', 4) then
            return split_part(ctx, '.', 1)::uuid;
        end if;
    end loop;
    return null;
end
$$;
alter function cvault.tenant_id() owner to cvault_fn;
revoke all on function cvault.tenant_id() from public;
grant execute on function cvault.tenant_id() to cvault_app, cvault_sys, cvault_fn, cvault_owner;

-- Puts a table of schema cvault under the one policy every tenant table has.
create procedure platform.protect(p_table regclass)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    execute format('alter table %s enable row level security', p_table);
    execute format('alter table %s force row level security', p_table);
    execute format(
        'create policy tenant_isolation on %s as permissive for all to cvault_app, cvault_fn
         using (tenant_id = (select cvault.tenant_id())) with check (tenant_id = (select cvault.tenant_id()))', p_table);
end
$$;
revoke all on procedure platform.protect(regclass) from public;

-- Secrets of the installation that every replica shares (token signing key, TLS identity of the node gateway, pepper),
-- each sealed with the key-encryption key. Drawn once by whichever replica starts first.
create table platform.secrets (
    name text not null,
    kek_version smallint not null,
    sealed bytea not null,
    created_at timestamptz not null default now(),
    constraint secrets_pkey primary key (name)
);
grant select, insert, update on platform.secrets to cvault_sys;

-- One row: identity of this history of the database. A restore from a backup must draw a new one.
create table platform.installation (
    singleton boolean not null default true,
    incarnation uuid not null default gen_random_uuid(),
    created_at timestamptz not null default now(),
    constraint installation_pkey primary key (singleton),
    constraint installation_singleton check (singleton)
);
insert into platform.installation default values;
insert into platform.context_keys (key_id, key)
    values (1, sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())));
grant select on platform.installation to cvault_sys;

revoke create on schema cvault, platform from cvault_fn;
