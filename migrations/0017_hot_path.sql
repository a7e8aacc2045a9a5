-- What a registration costs. Measured with 64 clients: two thirds of the database's time went into the three things below.

-- The server's row changes with every registration, and the foreign key locked it from the insertion of the device to COMMIT in
-- every transaction at once: each version of the row carried the list of all of them, and every reader of the row walked through
-- the lists. Checked at COMMIT, the key finds the row locked by its own transaction (`place_peer`) and no list is made.
alter table cvault.devices alter constraint devices_server_fkey deferrable initially deferred;

grant create on schema cvault to cvault_fn;
grant create on schema platform to cvault_fn;

-- The signature first: what it covers was written by us and needs no pattern.
create or replace function cvault.tenant_id() returns uuid
language plpgsql stable security definer parallel restricted
set search_path = pg_catalog, pg_temp
as $$
declare
    ctx constant text := current_setting('app.ctx', true);
    body text;
    k bytea;
begin
    -- after COMMIT a local setting is '' and not NULL
    if ctx is null or octet_length(ctx) not between 66 and 150 then
        return null;
    end if;
    body := left(ctx, -65);
    for k in select c.key from platform.context_keys c where c.active loop
        if body || '.' || encode(sha256(k || sha256(k || convert_to(body, 'UTF8'))), 'hex') = ctx then
            -- so a context that was overheard is worth nothing anywhere else
            if split_part(body, '.', 2)::bigint <> pg_backend_pid()
               or split_part(body, '.', 3)::bigint <> (extract(epoch from transaction_timestamp()) * 1000000)::bigint then
                return null;
            end if;
            return split_part(body, '.', 1)::uuid;
        end if;
    end loop;
    return null;
end
$$;

-- These two are called once in each registration, and PostgreSQL plans a function in SQL anew for every caller. PL/pgSQL keeps
-- the plan.
create or replace function platform.peer_record_digest(
    p_key bytea, p_device uuid, p_tenant uuid, p_public_key bytea, p_preshared_key_hash bytea,
    p_ipv4 inet, p_ipv6 inet, p_generation bigint
) returns numeric
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    h constant text := encode(sha256(p_key || sha256(p_key || uuid_send(p_device) || uuid_send(p_tenant) || p_public_key
        || p_preshared_key_hash || substring(inet_send(p_ipv4) from 5) || substring(inet_send(p_ipv6) from 5)
        || int8send(p_generation))), 'hex');
begin
    return ('x' || substr(h, 1, 8))::bit(32)::bigint::numeric * 79228162514264337593543950336
         + ('x' || substr(h, 9, 8))::bit(32)::bigint::numeric * 18446744073709551616
         + ('x' || substr(h, 17, 8))::bit(32)::bigint::numeric * 4294967296
         + ('x' || substr(h, 25, 8))::bit(32)::bigint::numeric;
end
$$;

create or replace function platform.take_free_address(p_pool uuid, p_tenant uuid, p_device uuid) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    v_host bigint;
begin
    update platform.addresses a
        set state = 'allocated', tenant_id = p_tenant, device_id = p_device,
            released_device_id = null
        where (a.pool_id, a.host) = (
            select f.pool_id, f.host from platform.addresses f
            where f.pool_id = p_pool and f.state = 'free'
            order by f.released_at nulls first, f.host
            limit 1 for update skip locked)
        returning a.host into v_host;
    return v_host;
end
$$;

-- A registration that finds nothing free opens a block itself, and every other one waits for it to COMMIT. So numbers are made
-- free ahead of need, in a transaction that does nothing else: up to p_ahead of a pool; returns how many.
create function platform.open_addresses(p_pool uuid, p_ahead integer) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_pool platform.address_pools;
    v_free bigint;
    v_last bigint;
    v_to bigint;
begin
    select count(*) into v_free from (
        select from platform.addresses a where a.pool_id = p_pool and a.state = 'free' limit p_ahead) as free;
    -- not for every number that was taken
    if v_free > p_ahead / 2 then
        return 0;
    end if;
    select * into v_pool from platform.address_pools p where p.pool_id = p_pool for no key update;
    v_last := (1::bigint << (32 - masklen(v_pool.ipv4))) - 2;
    v_to := least(v_pool.next_host + (p_ahead - v_free) - 1, v_last);
    insert into platform.addresses (pool_id, host, state)
        select p_pool, h, 'free' from generate_series(v_pool.next_host, v_to) as h;
    update platform.address_pools p set next_host = v_to + 1 where p.pool_id = p_pool and v_to >= v_pool.next_host;
    return greatest(v_to - v_pool.next_host + 1, 0);
end
$$;
alter function platform.open_addresses owner to cvault_fn;
revoke all on function platform.open_addresses from public;
grant execute on function platform.open_addresses to cvault_sys;

revoke create on schema platform from cvault_fn;
revoke create on schema cvault from cvault_fn;
