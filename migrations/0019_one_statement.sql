-- Requests that are made most often are one statement each: it sets the tenant's context, does its work and commits, in one
-- round trip. See docs/adr/0012.

grant create on schema cvault to cvault_fn;
grant create on schema platform to cvault_fn;

-- app.ctx = '<tenant uuid>.<backend pid>.<signed at, unix microseconds>.<hex mac>', mac as before. The transaction must have begun
-- within 15 s of the signature: the clocks of both machines may differ by 10 s (`Db::ping`).
create or replace function cvault.tenant_id() returns uuid
language plpgsql stable security definer parallel restricted
set search_path = pg_catalog, pg_temp
as $$
declare
    ctx constant text := current_setting('app.ctx', true);
    body text;
    signed bytea;
    k bytea;
begin
    -- after COMMIT a local setting is '' and not NULL
    if ctx is null or octet_length(ctx) not between 66 and 150 then
        return null;
    end if;
    body := left(ctx, -65);
    signed := convert_to(body, 'UTF8');
    select c.key into k from platform.context_keys c where c.active order by c.key_id desc limit 1;
    if body || '.' || encode(sha256(k || sha256(k || signed)), 'hex') is distinct from ctx then
        -- while keys are changed there are two
        select c.key into k from platform.context_keys c where c.active order by c.key_id limit 1;
        if body || '.' || encode(sha256(k || sha256(k || signed)), 'hex') is distinct from ctx then
            return null;
        end if;
    end if;
    -- so a context that was overheard is worth nothing to any other session, and soon nothing at all
    if split_part(body, '.', 2)::integer <> pg_backend_pid()
       or abs(split_part(body, '.', 3)::bigint - date_part('epoch', transaction_timestamp()) * 1000000) > 15000000 then
        return null;
    end if;
    return left(body, 36)::uuid;
end
$$;

-- Begins what a statement does for a tenant: `from cvault.enter($1) as tenant cross join lateral (… where tenant_id = tenant …
-- offset 0)`. What is lateral to its answer and kept apart by `offset 0` is carried out after it. Refused loudly: a context
-- that is not valid would show an empty database.
create function cvault.enter(p_context text) returns uuid
language plpgsql
as $$
declare
    v_tenant uuid;
begin
    perform pg_catalog.set_config('app.ctx', p_context, true);
    v_tenant := cvault.tenant_id();
    if v_tenant is null then
        raise exception using errcode = 'CV001', message = 'the tenant context is not valid';
    end if;
    return v_tenant;
end
$$;
revoke all on function cvault.enter(text) from public;
-- `cvault_sys` too, so that a server that was started with the wrong role says just that
grant execute on function cvault.enter(text) to cvault_app, cvault_sys;

-- PostgreSQL plans a function in SQL anew for every caller; PL/pgSQL keeps the plan.
create or replace function platform.list_servers() returns table (
    server_id uuid, name text, region text, public_ip inet, endpoint_port integer, public_key bytea, pool_id uuid, pool_ipv4 cidr,
    capacity integer, peer_count bigint, status text, enrolled boolean, last_seen_at timestamptz, revision bigint, acked_revision bigint
)
language plpgsql stable security definer rows 20
set search_path = pg_catalog, pg_temp
as $$
begin
    return query
        select s.server_id, s.name, s.region, s.public_ip, s.endpoint_port, s.public_key, s.pool_id, p.ipv4, s.capacity,
               s.peer_count, s.status, s.identity_pin is not null, s.last_seen_at, s.revision, s.acked_revision
        from platform.servers s join platform.address_pools p using (pool_id)
        where s.status <> 'removed'
        order by s.region, s.name;
end
$$;

-- An id as the API writes it: prefix and Crockford's base32 of the 128 bits.
create function platform.id_text(p_prefix text, p_id uuid) returns text
language plpgsql immutable strict parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    bits constant bit(130) := b'00' || ('x' || replace(p_id::text, '-', ''))::bit(128);
    letters text := '';
begin
    for at in 0..25 loop
        letters := letters || substr('0123456789abcdefghjkmnpqrstvwxyz', substring(bits from at * 5 + 1 for 5)::integer + 1, 1);
    end loop;
    return p_prefix || '_' || letters;
end
$$;
revoke all on function platform.id_text from public;
grant execute on function platform.id_text to cvault_app, cvault_fn;

-- The index of free numbers keeps those that were taken until it is vacuumed, and each search would walk through them. So each
-- session remembers where it found its last one. A hint and nothing else: whatever it says, the number
-- is a free one of the pool.
create or replace function platform.take_free_address(p_pool uuid, p_tenant uuid, p_device uuid) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    hint constant text := current_setting('cvault.free_after', true);
    v_free tid;
    v_host bigint;
begin
    -- whatever somebody may have put there
    if hint ~ '^[0-9a-f-]{36}:[0-9]{1,10}$' and left(hint, 36) = p_pool::text then
        select f.ctid into v_free from platform.addresses f
            where f.pool_id = p_pool and f.state = 'free' and f.released_at is null and f.host > substr(hint, 38)::bigint
            -- as the index has them: by another one it would be a walk through all that are taken
            order by f.released_at nulls first, f.host
            limit 1 for update skip locked;
    end if;
    if v_free is null then
        select f.ctid into v_free from platform.addresses f
            where f.pool_id = p_pool and f.state = 'free'
            order by f.released_at nulls first, f.host
            limit 1 for update skip locked;
    end if;
    if v_free is null then
        return null;
    end if;
    -- a row that is locked needs no second search
    update platform.addresses a
        set state = 'allocated', tenant_id = p_tenant, device_id = p_device, released_device_id = null
        where a.ctid = v_free
        returning a.host into v_host;
    perform set_config('cvault.free_after', p_pool || ':' || v_host, false);
    return v_host;
end
$$;

-- A device's pool is that of its server: one key says both, and is checked at COMMIT, when the transaction holds the server's row
-- itself. Checked earlier, each registration would be entered in the list of those that lock the pool's row.
alter table platform.servers add constraint servers_pool_unique unique (server_id, pool_id);
alter table cvault.devices drop constraint devices_server_fkey, drop constraint devices_pool_fkey;
alter table cvault.devices add constraint devices_server_fkey foreign key (server_id, pool_id)
    references platform.servers (server_id, pool_id) deferrable initially deferred;

-- Rows that only functions write which have the server's row locked; none of these rows leads to a server that is not there, as
-- no server is ever deleted.
alter table platform.peers drop constraint peers_server_fkey;
alter table platform.node_changes drop constraint node_changes_server_fkey;
-- implied by those without the server
drop index platform.peers_ipv4_unique;
drop index platform.peers_public_key_unique;

-- In the order in which they are listed: no other index can serve that, however little is known of the table when it is planned.
drop index cvault.devices_user;
create index devices_user on cvault.devices (tenant_id, user_id, device_id) where status = 'active';

-- What `platform.register_device` locks and writes.
grant update (deleted_at) on cvault.users to cvault_fn;
grant update (updated_at) on cvault.tenants to cvault_fn;
grant insert on cvault.devices to cvault_fn;

-- The whole of a registration: limits under lock, the least loaded server that was seen since p_seen_since (in p_region, or any),
-- address, device, peer, and the server's revision and digest. The server's row is locked last, and until the statement's end.
-- `outcome`: registered; or user_gone, tenant_closed, over_limit, device_limit, no_server, pool_exhausted: then nothing was changed.
create function platform.register_device(
    p_tenant uuid, p_device uuid, p_user uuid, p_name text, p_platform text, p_public_key bytea, p_private_key_sealed bytea,
    p_preshared_key_sealed bytea, p_preshared_key_hash bytea, p_region text, p_seen_since timestamptz, p_at timestamptz
) returns table (
    outcome text, max_devices integer, devices bigint, client_dns inet[], client_allowed_ips cidr[], client_mtu integer,
    server_id uuid, server_name text, region text, public_ip inet, endpoint_port integer, server_public_key bytea, pool_id uuid,
    capacity integer, peer_count bigint, last_seen_at timestamptz, acked_revision bigint, ipv4 inet, ipv6 inet, revision bigint
)
language plpgsql security definer rows 1
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_tenant record;
    v_candidate record;
    v_exhausted uuid[] := '{}';
    v_host bigint;
    v_server platform.servers;
begin
    -- Nothing is found of a tenant that is not the context's. It is locked against its suspension and deletion; then the user, so
    -- that racing registrations count one after the other.
    select t.max_devices_per_user, t.status, t.over_limit_since, t.client_dns, t.client_allowed_ips, t.client_mtu into v_tenant
        from cvault.tenants t where t.tenant_id = p_tenant for share;
    perform from cvault.users u
        where u.tenant_id = p_tenant and u.user_id = p_user and u.status = 'active' for no key update;
    if not found then
        outcome := 'user_gone';
        return next;
        return;
    end if;
    if v_tenant.status not in ('active', 'trial') then
        outcome := 'tenant_closed';
        return next;
        return;
    end if;
    if v_tenant.over_limit_since is not null then
        outcome := 'over_limit';
        return next;
        return;
    end if;
    max_devices := v_tenant.max_devices_per_user;
    -- a statement of its own: it sees what was committed while the first one waited for the lock
    select count(*) into devices from (
        select from cvault.devices d
        where d.tenant_id = p_tenant and d.user_id = p_user and d.status = 'active'
        order by d.device_id limit max_devices) as own;
    if devices >= max_devices then
        outcome := 'device_limit';
        return next;
        return;
    end if;
    for v_candidate in
        select s.server_id, s.pool_id, p.ipv4, p.ipv6
        from platform.servers s join platform.address_pools p on p.pool_id = s.pool_id
        where s.status = 'active' and s.identity_pin is not null and s.public_key is not null
          and s.peer_count < s.capacity and s.last_seen_at > p_seen_since and s.region = coalesce(p_region, s.region)
        order by s.peer_count * 1000000 / s.capacity, s.server_id
    loop
        continue when v_candidate.pool_id = any (v_exhausted);
        v_host := platform.take_address(v_candidate.pool_id, p_tenant, p_device);
        exit when v_host is not null;
        v_exhausted := v_exhausted || v_candidate.pool_id;
    end loop;
    if v_host is null then
        outcome := case when v_exhausted = '{}' then 'no_server' else 'pool_exhausted' end;
        return next;
        return;
    end if;
    ipv4 := host(v_candidate.ipv4::inet + v_host)::inet;
    ipv6 := host(v_candidate.ipv6::inet + v_host)::inet;

    -- from here to the end every other change of this server waits
    select * into v_server from platform.servers s where s.server_id = v_candidate.server_id for no key update;
    if v_server.status <> 'active' or v_server.peer_count >= v_server.capacity then
        raise check_violation using message = 'the server takes no more peers', constraint = 'servers_open_for_peers';
    end if;
    revision := v_server.revision + 1;
    insert into cvault.devices (tenant_id, device_id, user_id, name, platform, public_key, private_key_sealed, preshared_key_sealed,
                                preshared_key_hash, pool_id, ipv4, ipv6, server_id, placed_revision, created_at)
        values (p_tenant, p_device, p_user, p_name, p_platform, p_public_key, p_private_key_sealed, p_preshared_key_sealed,
                p_preshared_key_hash, v_server.pool_id, ipv4, ipv6, v_server.server_id, revision, p_at);
    insert into platform.peers (server_id, device_id, tenant_id, user_id, public_key, preshared_key_sealed, preshared_key_hash,
                                ipv4, ipv6, generation)
        values (v_server.server_id, p_device, p_tenant, p_user, p_public_key, p_preshared_key_sealed, p_preshared_key_hash,
                ipv4, ipv6, revision);
    update platform.servers s
        set revision = v_server.revision + 1, peer_count = s.peer_count + 1,
            digest = (s.digest + platform.peer_record_digest(s.digest_key, p_device, p_tenant, p_public_key,
                p_preshared_key_hash, ipv4, ipv6, v_server.revision + 1)) % 340282366920938463463374607431768211456
        where s.server_id = v_server.server_id;
    insert into platform.node_changes (server_id, revision, op, device_id, public_key)
        values (v_server.server_id, revision, 'upsert', p_device, p_public_key);
    outcome := 'registered';
    client_dns := v_tenant.client_dns;
    client_allowed_ips := v_tenant.client_allowed_ips;
    client_mtu := v_tenant.client_mtu;
    server_id := v_server.server_id;
    server_name := v_server.name;
    region := v_server.region;
    public_ip := v_server.public_ip;
    endpoint_port := v_server.endpoint_port;
    server_public_key := v_server.public_key;
    pool_id := v_server.pool_id;
    capacity := v_server.capacity;
    peer_count := v_server.peer_count + 1;
    last_seen_at := v_server.last_seen_at;
    acked_revision := v_server.acked_revision;
    return next;
end
$$;
alter function platform.register_device owner to cvault_fn;
revoke all on function platform.register_device from public;
grant execute on function platform.register_device to cvault_app;

-- As many free numbers of the pool as there are devices, or fewer, in the order of the devices.
create function platform.take_free_addresses(p_pool uuid, p_tenant uuid, p_devices uuid[]) returns bigint[]
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    hint constant text := current_setting('cvault.free_after', true);
    v_after bigint := -1;
    v_hosts bigint[];
begin
    -- whatever somebody may have put there
    if hint ~ '^[0-9a-f-]{36}:[0-9]{1,10}$' and left(hint, 36) = p_pool::text then
        v_after := substr(hint, 38)::bigint;
        select array_agg(free.host) into v_hosts from (
            select f.host from platform.addresses f
            where f.pool_id = p_pool and f.state = 'free' and f.released_at is null and f.host > v_after
            order by f.released_at nulls first, f.host
            limit cardinality(p_devices) for update skip locked) as free;
    end if;
    if v_hosts is null or cardinality(v_hosts) < cardinality(p_devices) then
        select array_agg(free.host) into v_hosts from (
            select f.host from platform.addresses f
            where f.pool_id = p_pool and f.state = 'free'
            order by f.released_at nulls first, f.host
            limit cardinality(p_devices) for update skip locked) as free;
    end if;
    if v_hosts is null then
        return '{}';
    end if;
    update platform.addresses a
        set state = 'allocated', tenant_id = p_tenant, device_id = w.device_id, released_device_id = null
        from unnest(v_hosts, p_devices) as w (host, device_id)
        where a.pool_id = p_pool and a.host = w.host;
    perform set_config('cvault.free_after', p_pool || ':' || v_hosts[cardinality(v_hosts)], false);
    return v_hosts;
end
$$;
alter function platform.take_free_addresses owner to cvault_fn;
revoke all on function platform.take_free_addresses from public;

-- Registrations of one tenant that arrive together, in one transaction: what each costs alone is mostly what all share. Registers
-- those that nothing stands against, on the least loaded server that has room for all of them, and says nothing of the others:
-- `platform.register_device` judges them one by one.
create function platform.register_devices(
    p_tenant uuid, p_region text, p_seen_since timestamptz, p_at timestamptz, p_devices uuid[], p_users uuid[], p_names text[],
    p_platforms text[], p_public_keys bytea[], p_private_keys_sealed bytea[], p_preshared_keys_sealed bytea[],
    p_preshared_key_hashes bytea[]
) returns table (
    device_id uuid, client_dns inet[], client_allowed_ips cidr[], client_mtu integer, server_id uuid, server_name text, region text,
    public_ip inet, endpoint_port integer, server_public_key bytea, pool_id uuid, capacity integer, peer_count bigint,
    last_seen_at timestamptz, acked_revision bigint, ipv4 inet, ipv6 inet, revision bigint
)
language plpgsql security definer rows 10
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_tenant record;
    v_users uuid[];
    v_places integer[];
    v_hosts bigint[];
    v_server platform.servers;
    v_pool platform.address_pools;
    v_devices uuid[];
    v_count integer;
begin
    -- nothing is found of a tenant that is not the context's
    select t.max_devices_per_user, t.client_dns, t.client_allowed_ips, t.client_mtu into v_tenant
        from cvault.tenants t
        where t.tenant_id = p_tenant and t.status in ('active', 'trial') and t.over_limit_since is null
        for share;
    if not found then
        return;
    end if;
    -- in one order, whoever else locks several; who is locked by somebody else keeps nobody waiting
    select array_agg(present.user_id) into v_users from (
        select u.user_id from cvault.users u
        where u.tenant_id = p_tenant and u.user_id = any (p_users) and u.status = 'active'
        order by u.user_id for no key update skip locked) as present;
    -- A statement of its own: it sees what was committed while that one waited for the locks. Planned each time: a plan that was
    -- made when there was no device yet would go through all of them.
    execute 'select array_agg(w.place::integer order by w.place)
        from (select w.user_id, w.place, row_number() over (partition by w.user_id order by w.place) as nth
              from unnest($2) with ordinality as w (user_id, place)) as w
        cross join lateral (
            select count(*) as devices from (
                select from cvault.devices d
                where d.tenant_id = $1 and d.user_id = w.user_id and d.status = ''active''
                order by d.device_id limit $3) as one) as own
        where w.user_id = any ($4) and own.devices + w.nth <= $3'
        into v_places using p_tenant, p_users, v_tenant.max_devices_per_user, v_users;
    v_count := coalesce(cardinality(v_places), 0);
    if v_count = 0 then
        return;
    end if;
    select * into v_server from platform.servers s
        where s.status = 'active' and s.identity_pin is not null and s.public_key is not null
          and s.peer_count + v_count <= s.capacity and s.last_seen_at > p_seen_since and s.region = coalesce(p_region, s.region)
        order by s.peer_count * 1000000 / s.capacity, s.server_id
        limit 1;
    if not found then
        return;
    end if;
    select * into v_pool from platform.address_pools p where p.pool_id = v_server.pool_id;
    select array_agg(p_devices[w.place] order by w.nth) into v_devices from unnest(v_places) with ordinality as w (place, nth);
    v_hosts := platform.take_free_addresses(v_server.pool_id, p_tenant, v_devices);
    v_count := cardinality(v_hosts);
    if v_count = 0 then
        return;
    end if;
    v_places := v_places[1:v_count];

    -- from here to the end every other change of this server waits
    select * into v_server from platform.servers s where s.server_id = v_server.server_id for no key update;
    if v_server.status <> 'active' or v_server.peer_count + v_count > v_server.capacity then
        raise check_violation using message = 'the server takes no more peers', constraint = 'servers_open_for_peers';
    end if;
    insert into cvault.devices (tenant_id, device_id, user_id, name, platform, public_key, private_key_sealed, preshared_key_sealed,
                                preshared_key_hash, pool_id, ipv4, ipv6, server_id, placed_revision, created_at)
        select p_tenant, p_devices[w.place], p_users[w.place], p_names[w.place], p_platforms[w.place], p_public_keys[w.place],
               p_private_keys_sealed[w.place], p_preshared_keys_sealed[w.place], p_preshared_key_hashes[w.place], v_server.pool_id,
               host(v_pool.ipv4::inet + w.host)::inet, host(v_pool.ipv6::inet + w.host)::inet, v_server.server_id,
               v_server.revision + w.nth, p_at
        from unnest(v_places, v_hosts) with ordinality as w (place, host, nth);
    insert into platform.peers (server_id, device_id, tenant_id, user_id, public_key, preshared_key_sealed, preshared_key_hash,
                                ipv4, ipv6, generation)
        select v_server.server_id, p_devices[w.place], p_tenant, p_users[w.place], p_public_keys[w.place],
               p_preshared_keys_sealed[w.place], p_preshared_key_hashes[w.place], host(v_pool.ipv4::inet + w.host)::inet,
               host(v_pool.ipv6::inet + w.host)::inet, v_server.revision + w.nth
        from unnest(v_places, v_hosts) with ordinality as w (place, host, nth);
    insert into platform.node_changes (server_id, revision, op, device_id, public_key)
        select v_server.server_id, v_server.revision + w.nth, 'upsert', p_devices[w.place], p_public_keys[w.place]
        from unnest(v_places) with ordinality as w (place, nth);
    update platform.servers s
        set revision = s.revision + v_count, peer_count = s.peer_count + v_count,
            digest = (s.digest + (
                select sum(platform.peer_record_digest(v_server.digest_key, p_devices[w.place], p_tenant, p_public_keys[w.place],
                    p_preshared_key_hashes[w.place], host(v_pool.ipv4::inet + w.host)::inet, host(v_pool.ipv6::inet + w.host)::inet,
                    v_server.revision + w.nth))
                from unnest(v_places, v_hosts) with ordinality as w (place, host, nth)
            )) % 340282366920938463463374607431768211456
        where s.server_id = v_server.server_id;
    return query
        select p_devices[w.place], v_tenant.client_dns, v_tenant.client_allowed_ips, v_tenant.client_mtu, v_server.server_id,
               v_server.name, v_server.region, v_server.public_ip, v_server.endpoint_port, v_server.public_key, v_server.pool_id,
               v_server.capacity, v_server.peer_count + w.nth, v_server.last_seen_at, v_server.acked_revision,
               host(v_pool.ipv4::inet + w.host)::inet, host(v_pool.ipv6::inet + w.host)::inet, v_server.revision + w.nth
        from unnest(v_places, v_hosts) with ordinality as w (place, host, nth);
end
$$;
alter function platform.register_devices owner to cvault_fn;
revoke all on function platform.register_devices from public;
grant execute on function platform.register_devices to cvault_app;

-- A free number of the pool, or, when nobody has opened any ahead of need, of a block that is opened now.
create function platform.take_address(p_pool uuid, p_tenant uuid, p_device uuid) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_pool platform.address_pools;
    v_host bigint;
    v_last bigint;
begin
    v_host := platform.take_free_address(p_pool, p_tenant, p_device);
    if v_host is null then
        select * into v_pool from platform.address_pools p where p.pool_id = p_pool for no key update;
        -- whoever held the lock before may have opened a block meanwhile
        v_host := platform.take_free_address(p_pool, p_tenant, p_device);
        v_last := (1::bigint << (32 - masklen(v_pool.ipv4))) - 2;
        if v_host is null and v_pool.next_host <= v_last then
            insert into platform.addresses (pool_id, host, state)
                select p_pool, h, 'free' from generate_series(v_pool.next_host, least(v_pool.next_host + 63, v_last)) as h;
            update platform.address_pools p set next_host = least(v_pool.next_host + 64, v_last + 1)
                where p.pool_id = p_pool;
            v_host := platform.take_free_address(p_pool, p_tenant, p_device);
        end if;
    end if;
    return v_host;
end
$$;
alter function platform.take_address owner to cvault_fn;
revoke all on function platform.take_address from public;

create or replace function platform.allocate_address(p_pool uuid, p_device uuid) returns table (ipv4 inet, ipv6 inet)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_tenant constant uuid := cvault.tenant_id();
    v_pool platform.address_pools;
    v_host bigint;
begin
    if v_tenant is null then
        raise insufficient_privilege using message = 'no tenant context';
    end if;
    v_host := platform.take_address(p_pool, v_tenant, p_device);
    if v_host is null then
        return;
    end if;
    select * into v_pool from platform.address_pools p where p.pool_id = p_pool;
    return query select host(v_pool.ipv4::inet + v_host)::inet, host(v_pool.ipv6::inet + v_host)::inet;
end
$$;

revoke create on schema platform from cvault_fn;
revoke create on schema cvault from cvault_fn;
