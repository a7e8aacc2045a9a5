-- Written by `cargo xtask schema` from the migrations; compared in CI. Do not edit.
SELECT pg_catalog.set_config('search_path', '', false);
CREATE SCHEMA cvault;
ALTER SCHEMA cvault OWNER TO cvault_owner;
CREATE SCHEMA platform;
ALTER SCHEMA platform OWNER TO cvault_owner;
CREATE FUNCTION cvault.enter(p_context text) RETURNS uuid
    LANGUAGE plpgsql
    AS $$
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
ALTER FUNCTION cvault.enter(p_context text) OWNER TO cvault_owner;
CREATE FUNCTION cvault.tenant_id() RETURNS uuid
    LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL RESTRICTED
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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
ALTER FUNCTION cvault.tenant_id() OWNER TO cvault_fn;
CREATE FUNCTION platform.allocate_address(p_pool uuid, p_device uuid) RETURNS TABLE(ipv4 inet, ipv6 inet)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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
ALTER FUNCTION platform.allocate_address(p_pool uuid, p_device uuid) OWNER TO cvault_fn;
CREATE FUNCTION platform.ensure_usage_partitions(p_months integer) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
    v_month timestamp := date_trunc('month', now() at time zone 'UTC');
    v_name text;
    v_made integer := 0;
begin
    perform pg_advisory_xact_lock(731992415);
    for i in 0..least(p_months, 24) loop
        v_name := 'usage_hourly_' || to_char(v_month, 'YYYY_MM');
        if to_regclass('cvault.' || v_name) is null then
            -- without a lock on the parent: attached only when complete
            execute format('create table cvault.%I (like cvault.usage_hourly including defaults including constraints)', v_name);
            call platform.protect(('cvault.' || v_name)::regclass);
            execute format('alter table cvault.usage_hourly attach partition cvault.%I for values from (%L) to (%L)',
                v_name, v_month at time zone 'UTC', (v_month + interval '1 month') at time zone 'UTC');
            v_made := v_made + 1;
        end if;
        v_month := v_month + interval '1 month';
    end loop;
    return v_made;
end
$$;
ALTER FUNCTION platform.ensure_usage_partitions(p_months integer) OWNER TO cvault_owner;
CREATE FUNCTION platform.forget_peers(p_devices uuid[]) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
    v_gone integer;
begin
    delete from platform.peers p
        using platform.servers s
        where p.device_id = any (p_devices) and p.removed_revision is not null
          and s.server_id = p.server_id and (s.status = 'removed' or p.removed_revision <= s.acked_revision);
    get diagnostics v_gone = row_count;
    return v_gone;
end
$$;
ALTER FUNCTION platform.forget_peers(p_devices uuid[]) OWNER TO cvault_fn;
CREATE FUNCTION platform.id_text(p_prefix text, p_id uuid) RETURNS text
    LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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
ALTER FUNCTION platform.id_text(p_prefix text, p_id uuid) OWNER TO cvault_owner;
CREATE FUNCTION platform.list_servers() RETURNS TABLE(server_id uuid, name text, region text, public_ip inet, endpoint_port integer, public_key bytea, pool_id uuid, capacity integer, peer_count bigint, status text, enrolled boolean, last_seen_at timestamp with time zone, acked_revision bigint)
    LANGUAGE plpgsql STABLE SECURITY DEFINER ROWS 20
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
    return query
        select s.server_id, s.name, s.region, s.public_ip, s.endpoint_port, s.public_key, s.pool_id, s.capacity, s.peer_count,
               s.status, s.identity_pin is not null, s.last_seen_at, s.acked_revision
        from platform.servers s
        where s.status <> 'removed';
end
$$;
ALTER FUNCTION platform.list_servers() OWNER TO cvault_fn;
CREATE FUNCTION platform.move_peer(p_device uuid, p_server uuid) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
    v_placed bigint;
begin
    select d.placed_revision into v_placed from cvault.devices d
        where d.tenant_id = cvault.tenant_id() and d.device_id = p_device and d.status = 'active' and d.reclaimed;
    if found then
        return v_placed;
    end if;
    -- both servers in id order, so that two devices that change places cannot wait for each other
    perform from platform.servers s
        where s.server_id = p_server or s.server_id = (
            select p.server_id from platform.peers p where p.device_id = p_device and p.removed_revision is null)
        order by s.server_id for no key update;
    perform platform.withdraw_peer(p_device);
    update cvault.devices d set server_id = p_server
        where d.tenant_id = cvault.tenant_id() and d.device_id = p_device and d.status = 'active'
          and d.pool_id = (select s.pool_id from platform.servers s where s.server_id = p_server);
    if not found then
        raise no_data_found using message = 'no such active device, or a server of another pool';
    end if;
    return platform.place_peer(p_device);
end
$$;
ALTER FUNCTION platform.move_peer(p_device uuid, p_server uuid) OWNER TO cvault_fn;
CREATE FUNCTION platform.open_addresses(p_pool uuid, p_ahead integer) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
    c_portion constant bigint := 1024;
    v_pool platform.address_pools;
    v_missing bigint;
    v_last bigint;
    v_to bigint;
begin
    for locked in 0..1 loop
        if locked = 0 then
            select * into v_pool from platform.address_pools p where p.pool_id = p_pool and p.deleted_at is null;
        else
            select * into v_pool from platform.address_pools p where p.pool_id = p_pool and p.deleted_at is null
                for no key update;
        end if;
        v_last := (1::bigint << (32 - masklen(v_pool.ipv4))) - 2;
        if v_last is null or v_pool.next_host > v_last then
            return 0;
        end if;
        select p_ahead - count(*) into v_missing from (
            select from platform.addresses a where a.pool_id = p_pool and a.state = 'free' limit p_ahead) as free;
        -- not for every number that was taken
        if v_missing < least(p_ahead / 2, c_portion) then
            return 0;
        end if;
    end loop;
    v_to := least(v_pool.next_host + least(v_missing, c_portion) - 1, v_last);
    insert into platform.addresses (pool_id, host, state)
        select p_pool, h, 'free' from generate_series(v_pool.next_host, v_to) as h;
    update platform.address_pools p set next_host = v_to + 1 where p.pool_id = p_pool;
    return v_to - v_pool.next_host + 1;
end
$$;
ALTER FUNCTION platform.open_addresses(p_pool uuid, p_ahead integer) OWNER TO cvault_fn;
CREATE FUNCTION platform.peer_record_digest(p_key bytea, p_device uuid, p_tenant uuid, p_public_key bytea, p_preshared_key_hash bytea, p_ipv4 inet, p_ipv6 inet, p_generation bigint) RETURNS numeric
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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
ALTER FUNCTION platform.peer_record_digest(p_key bytea, p_device uuid, p_tenant uuid, p_public_key bytea, p_preshared_key_hash bytea, p_ipv4 inet, p_ipv6 inet, p_generation bigint) OWNER TO cvault_fn;
CREATE FUNCTION platform.place_peer(p_device uuid) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
    v_device cvault.devices;
    v_server platform.servers;
    v_ipv4 inet;
    v_ipv6 inet;
    v_revision bigint;
begin
    select * into v_device from cvault.devices d
        where d.tenant_id = cvault.tenant_id() and d.device_id = p_device and d.status = 'active';
    if not found then
        raise no_data_found using message = 'no such active device';
    end if;
    if not exists (select from cvault.tenants t where t.tenant_id = v_device.tenant_id and t.status in ('active', 'trial') and t.over_limit_since is null) then
        raise check_violation using message = 'the tenant is suspended, over its limit or being deleted', constraint = 'peers_tenant_open';
    end if;
    select * into v_server from platform.servers s where s.server_id = v_device.server_id
        -- not `for update`: that would wait for every transaction that has inserted a device of this server
        for no key update;
    if v_server.status <> 'active' or v_server.peer_count >= v_server.capacity then
        raise check_violation using message = 'the server takes no more peers', constraint = 'servers_open_for_peers';
    end if;
    select host(p.ipv4::inet + a.host)::inet, host(p.ipv6::inet + a.host)::inet into v_ipv4, v_ipv6
        from platform.addresses a join platform.address_pools p on p.pool_id = a.pool_id
        where a.device_id = p_device and a.tenant_id = v_device.tenant_id and a.state = 'allocated'
          and a.pool_id = v_server.pool_id;
    if not found or (v_device.ipv4, v_device.ipv6) is distinct from (v_ipv4, v_ipv6) then
        raise check_violation using message = 'the device has addresses that were not allocated to it',
            constraint = 'devices_addresses_allocated';
    end if;
    v_revision := v_server.revision + 1;
    insert into platform.peers (server_id, device_id, tenant_id, user_id, public_key, preshared_key_sealed,
                                preshared_key_hash, ipv4, ipv6, generation)
        values (v_server.server_id, p_device, v_device.tenant_id, v_device.user_id, v_device.public_key,
                v_device.preshared_key_sealed, v_device.preshared_key_hash, v_ipv4, v_ipv6, v_revision)
        on conflict on constraint peers_pkey do update
            set public_key = excluded.public_key, preshared_key_sealed = excluded.preshared_key_sealed,
                preshared_key_hash = excluded.preshared_key_hash, ipv4 = excluded.ipv4, ipv6 = excluded.ipv6,
                generation = excluded.generation, removed_revision = null
            where peers.removed_revision is not null;
    if not found then
        raise unique_violation using message = 'the device is on its server already', constraint = 'peers_pkey';
    end if;
    update platform.servers s
        set revision = v_revision, peer_count = s.peer_count + 1,
            digest = (s.digest + platform.peer_record_digest(s.digest_key, p_device, v_device.tenant_id,
                v_device.public_key, v_device.preshared_key_hash, v_ipv4, v_ipv6, v_revision))
                % 340282366920938463463374607431768211456
        where s.server_id = v_server.server_id;
    insert into platform.node_changes (server_id, revision, op, device_id, public_key)
        values (v_server.server_id, v_revision, 'upsert', p_device, v_device.public_key);
    update cvault.devices d set placed_revision = v_revision
        where d.tenant_id = v_device.tenant_id and d.device_id = p_device;
    return v_revision;
end
$$;
ALTER FUNCTION platform.place_peer(p_device uuid) OWNER TO cvault_fn;
CREATE FUNCTION platform.pool_reclaims(p_pool uuid) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    select coalesce((select p.reclaim from platform.address_pools p where p.pool_id = p_pool), false)
$$;
ALTER FUNCTION platform.pool_reclaims(p_pool uuid) OWNER TO cvault_fn;
CREATE PROCEDURE platform.protect(IN p_table regclass)
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
    execute format('alter table %s enable row level security', p_table);
    execute format('alter table %s force row level security', p_table);
    execute format(
        'create policy tenant_isolation on %s as permissive for all to cvault_app, cvault_fn
         using (tenant_id = (select cvault.tenant_id())) with check (tenant_id = (select cvault.tenant_id()))', p_table);
end
$$;
ALTER PROCEDURE platform.protect(IN p_table regclass) OWNER TO cvault_owner;
CREATE FUNCTION platform.reclaim_address(p_device uuid) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
    update cvault.devices d set reclaimed = true
        from platform.address_pools p
        where d.tenant_id = cvault.tenant_id() and d.device_id = p_device and d.status = 'active' and not d.reclaimed
          and p.pool_id = d.pool_id and p.reclaim;
    if not found then
        return false;
    end if;
    update platform.addresses a
        set state = 'quarantine', tenant_id = null, device_id = null, released_device_id = p_device,
            released_at = now()
        where a.device_id = p_device and a.tenant_id = cvault.tenant_id();
    perform platform.withdraw_peer(p_device);
    return true;
end
$$;
ALTER FUNCTION platform.reclaim_address(p_device uuid) OWNER TO cvault_fn;
CREATE FUNCTION platform.register_device(p_tenant uuid, p_device uuid, p_user uuid, p_name text, p_platform text, p_public_key bytea, p_private_key_sealed bytea, p_preshared_key_sealed bytea, p_preshared_key_hash bytea, p_region text, p_seen_since timestamp with time zone, p_at timestamp with time zone) RETURNS TABLE(outcome text, max_devices integer, devices bigint, client_dns inet[], client_allowed_ips cidr[], client_mtu integer, server_id uuid, server_name text, region text, public_ip inet, endpoint_port integer, server_public_key bytea, pool_id uuid, capacity integer, peer_count bigint, last_seen_at timestamp with time zone, acked_revision bigint, ipv4 inet, ipv6 inet, revision bigint)
    LANGUAGE plpgsql SECURITY DEFINER ROWS 1
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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
ALTER FUNCTION platform.register_device(p_tenant uuid, p_device uuid, p_user uuid, p_name text, p_platform text, p_public_key bytea, p_private_key_sealed bytea, p_preshared_key_sealed bytea, p_preshared_key_hash bytea, p_region text, p_seen_since timestamp with time zone, p_at timestamp with time zone) OWNER TO cvault_fn;
CREATE FUNCTION platform.register_devices(p_tenant uuid, p_region text, p_seen_since timestamp with time zone, p_at timestamp with time zone, p_devices uuid[], p_users uuid[], p_names text[], p_platforms text[], p_public_keys bytea[], p_private_keys_sealed bytea[], p_preshared_keys_sealed bytea[], p_preshared_key_hashes bytea[]) RETURNS TABLE(device_id uuid, client_dns inet[], client_allowed_ips cidr[], client_mtu integer, server_id uuid, server_name text, region text, public_ip inet, endpoint_port integer, server_public_key bytea, pool_id uuid, capacity integer, peer_count bigint, last_seen_at timestamp with time zone, acked_revision bigint, ipv4 inet, ipv6 inet, revision bigint)
    LANGUAGE plpgsql SECURITY DEFINER ROWS 10
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
#variable_conflict use_column
declare
    v_tenant record;
    v_users uuid[];
    v_places integer[];
    v_taken bigint[] := '{}';
    v_candidate record;
    v_exhausted uuid[] := '{}';
    v_hosts bigint[] := '{}';
    v_server platform.servers;
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
    -- Key pairs of ours are new. One that a client has made may belong to another device, or come twice: the first is judged here.
    -- Each is looked up in the order of the index: no other one can serve that, however little is known of the table.
    if array_position(p_private_keys_sealed, null) is not null then
        execute 'select coalesce(array_agg(w.place), ''{}'')
            from (select w.public_key, w.place, row_number() over (partition by w.public_key order by w.place) as nth
                  from unnest($2, $3) with ordinality as w (public_key, private_key, place)
                  where w.private_key is null) as w
            where w.nth > 1
               or (select d.public_key = w.public_key from cvault.devices d
                   where d.tenant_id = $1 and d.public_key >= w.public_key and d.status = ''active''
                   order by d.public_key limit 1)
               or (select true from platform.peers p
                   where p.public_key = w.public_key and p.removed_revision is null limit 1)'
            into v_taken using p_tenant, p_public_keys, p_private_keys_sealed;
    end if;
    -- A statement of its own: it sees what was committed while that one waited for the locks. Planned each time: a plan that was
    -- made when there was no device yet would go through all of them.
    execute 'select array_agg(w.place::integer order by w.place)
        from (select w.user_id, w.place, row_number() over (partition by w.user_id order by w.place) as nth
              from unnest($2) with ordinality as w (user_id, place) where w.place <> all ($5)) as w
        cross join lateral (
            select count(*) as devices from (
                select from cvault.devices d
                where d.tenant_id = $1 and d.user_id = w.user_id and d.status = ''active''
                order by d.device_id limit $3) as one) as own
        where w.user_id = any ($4) and own.devices + w.nth <= $3'
        into v_places using p_tenant, p_users, v_tenant.max_devices_per_user, v_users, v_taken;
    v_count := coalesce(cardinality(v_places), 0);
    if v_count = 0 then
        return;
    end if;
    select array_agg(p_devices[w.place] order by w.nth) into v_devices from unnest(v_places) with ordinality as w (place, nth);
    for v_candidate in
        select s.server_id, s.pool_id, p.ipv4, p.ipv6, p.next_host
        from platform.servers s join platform.address_pools p on p.pool_id = s.pool_id
        where s.status = 'active' and s.identity_pin is not null and s.public_key is not null
          and s.peer_count + v_count <= s.capacity and s.last_seen_at > p_seen_since and s.region = coalesce(p_region, s.region)
        order by s.peer_count * 1000000 / s.capacity, s.server_id
    loop
        continue when v_candidate.pool_id = any (v_exhausted);
        v_hosts := platform.take_free_addresses(v_candidate.pool_id, p_tenant, v_devices);
        exit when v_hosts <> '{}';
        -- not exhausted: a block is to be opened, and whoever does that keeps others waiting
        if v_candidate.next_host <= (1::bigint << (32 - masklen(v_candidate.ipv4))) - 2 then
            return;
        end if;
        v_exhausted := v_exhausted || v_candidate.pool_id;
    end loop;
    v_count := cardinality(v_hosts);
    if v_count = 0 then
        return;
    end if;
    v_places := v_places[1:v_count];
    -- from here to the end every other change of this server waits
    select * into v_server from platform.servers s where s.server_id = v_candidate.server_id for no key update;
    if v_server.status <> 'active' or v_server.peer_count + v_count > v_server.capacity then
        raise check_violation using message = 'the server takes no more peers', constraint = 'servers_open_for_peers';
    end if;
    insert into cvault.devices (tenant_id, device_id, user_id, name, platform, public_key, private_key_sealed, preshared_key_sealed,
                                preshared_key_hash, pool_id, ipv4, ipv6, server_id, placed_revision, created_at)
        select p_tenant, p_devices[w.place], p_users[w.place], p_names[w.place], p_platforms[w.place], p_public_keys[w.place],
               p_private_keys_sealed[w.place], p_preshared_keys_sealed[w.place], p_preshared_key_hashes[w.place], v_server.pool_id,
               host(v_candidate.ipv4::inet + w.host)::inet, host(v_candidate.ipv6::inet + w.host)::inet, v_server.server_id,
               v_server.revision + w.nth, p_at
        from unnest(v_places, v_hosts) with ordinality as w (place, host, nth);
    insert into platform.peers (server_id, device_id, tenant_id, user_id, public_key, preshared_key_sealed, preshared_key_hash,
                                ipv4, ipv6, generation)
        select v_server.server_id, p_devices[w.place], p_tenant, p_users[w.place], p_public_keys[w.place],
               p_preshared_keys_sealed[w.place], p_preshared_key_hashes[w.place], host(v_candidate.ipv4::inet + w.host)::inet,
               host(v_candidate.ipv6::inet + w.host)::inet, v_server.revision + w.nth
        from unnest(v_places, v_hosts) with ordinality as w (place, host, nth);
    insert into platform.node_changes (server_id, revision, op, device_id, public_key)
        select v_server.server_id, v_server.revision + w.nth, 'upsert', p_devices[w.place], p_public_keys[w.place]
        from unnest(v_places) with ordinality as w (place, nth);
    update platform.servers s
        set revision = s.revision + v_count, peer_count = s.peer_count + v_count,
            digest = (s.digest + (
                select sum(platform.peer_record_digest(v_server.digest_key, p_devices[w.place], p_tenant, p_public_keys[w.place],
                    p_preshared_key_hashes[w.place], host(v_candidate.ipv4::inet + w.host)::inet,
                    host(v_candidate.ipv6::inet + w.host)::inet, v_server.revision + w.nth))
                from unnest(v_places, v_hosts) with ordinality as w (place, host, nth)
            )) % 340282366920938463463374607431768211456
        where s.server_id = v_server.server_id;
    return query
        select p_devices[w.place], v_tenant.client_dns, v_tenant.client_allowed_ips, v_tenant.client_mtu, v_server.server_id,
               v_server.name, v_server.region, v_server.public_ip, v_server.endpoint_port, v_server.public_key, v_server.pool_id,
               v_server.capacity, v_server.peer_count + w.nth, v_server.last_seen_at, v_server.acked_revision,
               host(v_candidate.ipv4::inet + w.host)::inet, host(v_candidate.ipv6::inet + w.host)::inet, v_server.revision + w.nth
        from unnest(v_places, v_hosts) with ordinality as w (place, host, nth);
end
$_$;
ALTER FUNCTION platform.register_devices(p_tenant uuid, p_region text, p_seen_since timestamp with time zone, p_at timestamp with time zone, p_devices uuid[], p_users uuid[], p_names text[], p_platforms text[], p_public_keys bytea[], p_private_keys_sealed bytea[], p_preshared_keys_sealed bytea[], p_preshared_key_hashes bytea[]) OWNER TO cvault_fn;
CREATE FUNCTION platform.restore_address(p_device uuid, p_server uuid) RETURNS TABLE(ipv4 inet, ipv6 inet)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
    v_pool uuid;
    v_ipv4 inet;
    v_ipv6 inet;
begin
    perform from cvault.devices d
        where d.tenant_id = cvault.tenant_id() and d.device_id = p_device and d.status = 'active' and d.reclaimed
        for no key update;
    if not found then
        raise no_data_found using message = 'no such device without an address';
    end if;
    select s.pool_id into v_pool from platform.servers s where s.server_id = p_server and s.status <> 'removed';
    if not found then
        raise no_data_found using message = 'no such server';
    end if;
    select a.ipv4, a.ipv6 into v_ipv4, v_ipv6 from platform.allocate_address(v_pool, p_device) a;
    if v_ipv4 is null then
        return;
    end if;
    update cvault.devices d
        set reclaimed = false, pool_id = v_pool, server_id = p_server, ipv4 = v_ipv4, ipv6 = v_ipv6
        where d.tenant_id = cvault.tenant_id() and d.device_id = p_device;
    return query select v_ipv4, v_ipv6;
end
$$;
ALTER FUNCTION platform.restore_address(p_device uuid, p_server uuid) OWNER TO cvault_fn;
CREATE FUNCTION platform.retire_peer(p_device uuid) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
    v_device cvault.devices;
begin
    select * into v_device from cvault.devices d
        where d.tenant_id = cvault.tenant_id() and d.device_id = p_device and d.status = 'revoked';
    if not found then
        raise no_data_found using message = 'no such revoked device';
    end if;
    update platform.addresses a
        set state = 'quarantine', tenant_id = null, device_id = null, released_device_id = p_device,
            released_at = now()
        where a.device_id = p_device and a.tenant_id = v_device.tenant_id;
    return platform.withdraw_peer(p_device);
end
$$;
ALTER FUNCTION platform.retire_peer(p_device uuid) OWNER TO cvault_fn;
CREATE FUNCTION platform.suspend_peer(p_device uuid) RETURNS bigint
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    select platform.withdraw(p_device, t.tenant_id) from cvault.tenants t
    where t.tenant_id = cvault.tenant_id() and (t.status = 'suspended' or t.over_limit_since is not null)
$$;
ALTER FUNCTION platform.suspend_peer(p_device uuid) OWNER TO cvault_fn;
CREATE FUNCTION platform.suspend_user_peer(p_device uuid) RETURNS bigint
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    select platform.withdraw(p_device, d.tenant_id)
    from cvault.devices d join cvault.users u on u.tenant_id = d.tenant_id and u.user_id = d.user_id
    where d.tenant_id = cvault.tenant_id() and d.device_id = p_device and u.status = 'disabled'
$$;
ALTER FUNCTION platform.suspend_user_peer(p_device uuid) OWNER TO cvault_fn;
CREATE FUNCTION platform.take_address(p_pool uuid, p_tenant uuid, p_device uuid) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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
ALTER FUNCTION platform.take_address(p_pool uuid, p_tenant uuid, p_device uuid) OWNER TO cvault_fn;
CREATE FUNCTION platform.take_free_address(p_pool uuid, p_tenant uuid, p_device uuid) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
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
$_$;
ALTER FUNCTION platform.take_free_address(p_pool uuid, p_tenant uuid, p_device uuid) OWNER TO cvault_fn;
CREATE FUNCTION platform.take_free_addresses(p_pool uuid, p_tenant uuid, p_devices uuid[]) RETURNS bigint[]
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
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
$_$;
ALTER FUNCTION platform.take_free_addresses(p_pool uuid, p_tenant uuid, p_devices uuid[]) OWNER TO cvault_fn;
CREATE FUNCTION platform.withdraw(p_device uuid, p_tenant uuid) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
    v_peer platform.peers;
    v_server uuid;
    v_revision bigint;
begin
    select p.server_id into v_server from platform.peers p
        where p.device_id = p_device and p.tenant_id = p_tenant and p.removed_revision is null;
    if not found then
        return null;
    end if;
    select s.revision + 1 into v_revision from platform.servers s where s.server_id = v_server for no key update;
    select p.* into v_peer from platform.peers p
        where p.server_id = v_server and p.device_id = p_device and p.tenant_id = p_tenant and p.removed_revision is null
        for update;
    -- it has left while the server was waited for
    if not found then
        return null;
    end if;
    update platform.peers p set removed_revision = v_revision, preshared_key_sealed = null
        where p.server_id = v_server and p.device_id = p_device;
    update platform.servers s
        set revision = v_revision, peer_count = s.peer_count - 1,
            digest = (s.digest - platform.peer_record_digest(s.digest_key, p_device, v_peer.tenant_id, v_peer.public_key,
                v_peer.preshared_key_hash, v_peer.ipv4, v_peer.ipv6, v_peer.generation)
                + 340282366920938463463374607431768211456) % 340282366920938463463374607431768211456
        where s.server_id = v_server;
    insert into platform.node_changes (server_id, revision, op, device_id, public_key)
        values (v_server, v_revision, 'remove', p_device, v_peer.public_key);
    return v_revision;
end
$$;
ALTER FUNCTION platform.withdraw(p_device uuid, p_tenant uuid) OWNER TO cvault_fn;
CREATE FUNCTION platform.withdraw_peer(p_device uuid) RETURNS bigint
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    select platform.withdraw(p_device, cvault.tenant_id())
$$;
ALTER FUNCTION platform.withdraw_peer(p_device uuid) OWNER TO cvault_fn;
CREATE FUNCTION platform.withdraw_unreadable_peer(p_device uuid, p_tenant uuid) RETURNS bigint
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    select platform.withdraw(p_device, p_tenant)
$$;
ALTER FUNCTION platform.withdraw_unreadable_peer(p_device uuid, p_tenant uuid) OWNER TO cvault_fn;
CREATE TABLE cvault.api_keys (
    tenant_id uuid NOT NULL,
    api_key_id uuid NOT NULL,
    name text DEFAULT 'default'::text NOT NULL,
    key_text text NOT NULL,
    secret_hash bytea NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    expires_at timestamp with time zone,
    revoked_at timestamp with time zone,
    last_used_at timestamp with time zone,
    scopes text[] DEFAULT '{auth,users,usage,devices}'::text[] NOT NULL,
    previous_secret_hash bytea,
    previous_valid_until timestamp with time zone,
    regenerated_at timestamp with time zone,
    CONSTRAINT api_keys_name_length CHECK (((char_length(name) >= 1) AND (char_length(name) <= 255))),
    CONSTRAINT api_keys_previous_secret CHECK ((((previous_secret_hash IS NULL) = (previous_valid_until IS NULL)) AND (octet_length(previous_secret_hash) = 32))),
    CONSTRAINT api_keys_scopes CHECK (((scopes <@ '{auth,users,usage,devices}'::text[]) AND ((cardinality(scopes) >= 1) AND (cardinality(scopes) <= 4)))),
    CONSTRAINT api_keys_secret_hash_length CHECK ((octet_length(secret_hash) = 32))
);
ALTER TABLE ONLY cvault.api_keys FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.api_keys OWNER TO cvault_owner;
CREATE TABLE cvault.audit_log (
    tenant_id uuid NOT NULL,
    audit_id uuid NOT NULL,
    at timestamp with time zone DEFAULT now() NOT NULL,
    actor text NOT NULL,
    action text NOT NULL,
    target text NOT NULL,
    details jsonb DEFAULT '{}'::jsonb NOT NULL,
    request_id uuid,
    chain_sequence bigint,
    chain_hash bytea,
    CONSTRAINT audit_log_chained CHECK (((chain_sequence IS NULL) = (chain_hash IS NULL)))
);
ALTER TABLE ONLY cvault.audit_log FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.audit_log OWNER TO cvault_owner;
CREATE TABLE cvault.auth_events (
    tenant_id uuid NOT NULL,
    event_id uuid NOT NULL,
    at timestamp with time zone DEFAULT now() NOT NULL,
    kind text NOT NULL,
    outcome text NOT NULL,
    user_id uuid,
    client_ip inet,
    request_id uuid,
    admin_id uuid,
    CONSTRAINT auth_events_kind CHECK ((kind = ANY (ARRAY['register'::text, 'login'::text, 'refresh'::text, 'logout'::text, 'portal_signup'::text, 'portal_login'::text, 'portal_refresh'::text, 'portal_logout'::text, 'portal_email_verify'::text, 'portal_email_change'::text, 'portal_password_reset'::text, 'portal_password_change'::text, 'portal_step_up'::text, 'portal_risk'::text]))),
    CONSTRAINT auth_events_outcome CHECK ((outcome = ANY (ARRAY['success'::text, 'failure'::text, 'reuse'::text, 'limited'::text])))
);
ALTER TABLE ONLY cvault.auth_events FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.auth_events OWNER TO cvault_owner;
CREATE TABLE cvault.devices (
    tenant_id uuid NOT NULL,
    device_id uuid NOT NULL,
    user_id uuid NOT NULL,
    name text NOT NULL,
    platform text,
    public_key bytea NOT NULL,
    private_key_sealed bytea,
    preshared_key_sealed bytea,
    preshared_key_hash bytea DEFAULT decode(repeat('00'::text, 32), 'hex'::text) NOT NULL,
    pool_id uuid NOT NULL,
    ipv4 inet NOT NULL,
    ipv6 inet NOT NULL,
    server_id uuid NOT NULL,
    placed_revision bigint DEFAULT 0 NOT NULL,
    status text DEFAULT 'active'::text NOT NULL,
    last_connected_at timestamp with time zone,
    last_handshake_at timestamp with time zone,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    revoked_at timestamp with time zone,
    suspended boolean DEFAULT false NOT NULL,
    reclaimed boolean DEFAULT false NOT NULL,
    CONSTRAINT devices_families CHECK (((family(ipv4) = 4) AND (family(ipv6) = 6))),
    CONSTRAINT devices_keys_destroyed CHECK (((status = 'active'::text) OR ((private_key_sealed IS NULL) AND (preshared_key_sealed IS NULL)))),
    CONSTRAINT devices_name_length CHECK (((char_length(name) >= 1) AND (char_length(name) <= 255))),
    CONSTRAINT devices_platform_length CHECK (((char_length(platform) >= 1) AND (char_length(platform) <= 32))),
    CONSTRAINT devices_preshared_key_hash_length CHECK ((octet_length(preshared_key_hash) = 32)),
    CONSTRAINT devices_preshared_key_hashed CHECK (((status <> 'active'::text) OR ((preshared_key_sealed IS NULL) = (preshared_key_hash = decode(repeat('00'::text, 32), 'hex'::text))))),
    CONSTRAINT devices_public_key_length CHECK ((octet_length(public_key) = 32)),
    CONSTRAINT devices_revoked CHECK (((status = 'revoked'::text) = (revoked_at IS NOT NULL))),
    CONSTRAINT devices_status CHECK ((status = ANY (ARRAY['active'::text, 'revoked'::text])))
);
ALTER TABLE ONLY cvault.devices FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.devices OWNER TO cvault_owner;
CREATE TABLE cvault.idempotency_keys (
    tenant_id uuid NOT NULL,
    principal text NOT NULL,
    key text NOT NULL,
    fingerprint bytea NOT NULL,
    status smallint,
    response_sealed bytea,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT idempotency_keys_key_length CHECK (((char_length(key) >= 1) AND (char_length(key) <= 255)))
);
ALTER TABLE ONLY cvault.idempotency_keys FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.idempotency_keys OWNER TO cvault_owner;
CREATE TABLE cvault.outbox (
    tenant_id uuid NOT NULL,
    mail_id uuid NOT NULL,
    kind text NOT NULL,
    payload_sealed bytea,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    attempts integer DEFAULT 0 NOT NULL,
    next_attempt_at timestamp with time zone DEFAULT now() NOT NULL,
    delivered_at timestamp with time zone,
    dead_at timestamp with time zone,
    last_error text,
    CONSTRAINT outbox_attempts CHECK ((attempts >= 0)),
    CONSTRAINT outbox_kind CHECK ((kind = ANY (ARRAY['verify_email'::text, 'reset_password'::text, 'password_changed'::text, 'change_email'::text, 'email_change_asked'::text, 'email_changed'::text]))),
    CONSTRAINT outbox_last_error_length CHECK ((char_length(last_error) <= 500)),
    CONSTRAINT outbox_one_end CHECK (((delivered_at IS NULL) OR (dead_at IS NULL))),
    CONSTRAINT outbox_payload_destroyed CHECK (((delivered_at IS NULL) OR (payload_sealed IS NULL)))
);
ALTER TABLE ONLY cvault.outbox FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.outbox OWNER TO cvault_owner;
CREATE TABLE cvault.portal_links (
    tenant_id uuid NOT NULL,
    token_hash bytea NOT NULL,
    admin_id uuid NOT NULL,
    purpose text NOT NULL,
    email text NOT NULL,
    created_at timestamp with time zone NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    used_at timestamp with time zone,
    session_id uuid,
    CONSTRAINT portal_links_hash_length CHECK ((octet_length(token_hash) = 32)),
    CONSTRAINT portal_links_purpose CHECK ((purpose = ANY (ARRAY['verify_email'::text, 'reset_password'::text, 'change_email'::text]))),
    CONSTRAINT portal_links_session CHECK (((session_id IS NOT NULL) = (purpose = 'change_email'::text)))
);
ALTER TABLE ONLY cvault.portal_links FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.portal_links OWNER TO cvault_owner;
CREATE TABLE cvault.portal_networks (
    tenant_id uuid NOT NULL,
    admin_id uuid NOT NULL,
    network inet NOT NULL,
    last_seen_at timestamp with time zone NOT NULL
);
ALTER TABLE ONLY cvault.portal_networks FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.portal_networks OWNER TO cvault_owner;
CREATE TABLE cvault.portal_refresh_tokens (
    tenant_id uuid NOT NULL,
    token_hash bytea NOT NULL,
    session_id uuid NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    used_at timestamp with time zone,
    CONSTRAINT portal_refresh_tokens_hash_length CHECK ((octet_length(token_hash) = 32))
);
ALTER TABLE ONLY cvault.portal_refresh_tokens FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.portal_refresh_tokens OWNER TO cvault_owner;
CREATE TABLE cvault.portal_sessions (
    tenant_id uuid NOT NULL,
    session_id uuid NOT NULL,
    admin_id uuid NOT NULL,
    cookie_hash bytea,
    created_at timestamp with time zone NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    last_seen_at timestamp with time zone NOT NULL,
    last_ip inet,
    user_agent text DEFAULT ''::text NOT NULL,
    ended_at timestamp with time zone,
    end_reason text,
    counted_from timestamp with time zone NOT NULL,
    sensitive_requests integer DEFAULT 0 NOT NULL,
    challenge_failures integer DEFAULT 0 NOT NULL,
    CONSTRAINT portal_sessions_cookie_length CHECK ((octet_length(cookie_hash) = 32)),
    CONSTRAINT portal_sessions_end_reason CHECK ((end_reason = ANY (ARRAY['logout'::text, 'revoked'::text, 'password_changed'::text, 'email_changed'::text, 'token_reused'::text, 'risk'::text]))),
    CONSTRAINT portal_sessions_ended CHECK (((ended_at IS NULL) = (end_reason IS NULL))),
    CONSTRAINT portal_sessions_user_agent_length CHECK ((char_length(user_agent) <= 255))
);
ALTER TABLE ONLY cvault.portal_sessions FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.portal_sessions OWNER TO cvault_owner;
CREATE TABLE cvault.refresh_tokens (
    tenant_id uuid NOT NULL,
    token_hash bytea NOT NULL,
    family_id uuid NOT NULL,
    user_id uuid NOT NULL,
    issued_at timestamp with time zone DEFAULT now() NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    used_at timestamp with time zone,
    revoked_at timestamp with time zone,
    CONSTRAINT refresh_tokens_hash_length CHECK ((octet_length(token_hash) = 32))
);
ALTER TABLE ONLY cvault.refresh_tokens FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.refresh_tokens OWNER TO cvault_owner;
CREATE TABLE cvault.request_logs (
    tenant_id uuid NOT NULL,
    request_id uuid NOT NULL,
    at timestamp with time zone NOT NULL,
    method text NOT NULL,
    route text NOT NULL,
    status smallint NOT NULL,
    code text,
    duration_us integer NOT NULL,
    api_key_id uuid NOT NULL,
    user_id uuid,
    client_ip inet,
    CONSTRAINT request_logs_lengths CHECK (((char_length(method) <= 10) AND (char_length(route) <= 200) AND (char_length(code) <= 50))),
    CONSTRAINT request_logs_status CHECK (((status >= 100) AND (status <= 599)))
);
ALTER TABLE ONLY cvault.request_logs FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.request_logs OWNER TO cvault_owner;
CREATE TABLE cvault.sessions (
    tenant_id uuid NOT NULL,
    session_id uuid NOT NULL,
    device_id uuid NOT NULL,
    user_id uuid NOT NULL,
    server_id uuid NOT NULL,
    opened_by text NOT NULL,
    status text DEFAULT 'active'::text NOT NULL,
    connected_at timestamp with time zone DEFAULT now() NOT NULL,
    disconnected_at timestamp with time zone,
    last_handshake_at timestamp with time zone,
    rx_bytes bigint DEFAULT 0 NOT NULL,
    tx_bytes bigint DEFAULT 0 NOT NULL,
    CONSTRAINT sessions_bytes CHECK (((rx_bytes >= 0) AND (tx_bytes >= 0))),
    CONSTRAINT sessions_closed CHECK (((status = 'disconnected'::text) = (disconnected_at IS NOT NULL))),
    CONSTRAINT sessions_opened_by CHECK ((opened_by = ANY (ARRAY['connect'::text, 'handshake'::text]))),
    CONSTRAINT sessions_status CHECK ((status = ANY (ARRAY['active'::text, 'disconnected'::text])))
);
ALTER TABLE ONLY cvault.sessions FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.sessions OWNER TO cvault_owner;
CREATE TABLE cvault.step_up_challenges (
    tenant_id uuid NOT NULL,
    challenge_id uuid NOT NULL,
    session_id uuid NOT NULL,
    action text NOT NULL,
    request_digest bytea NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    token_hash bytea,
    token_expires_at timestamp with time zone,
    used_at timestamp with time zone,
    CONSTRAINT step_up_challenges_digest_length CHECK ((octet_length(request_digest) = 32)),
    CONSTRAINT step_up_challenges_token CHECK (((token_hash IS NULL) = (token_expires_at IS NULL)))
);
ALTER TABLE ONLY cvault.step_up_challenges FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.step_up_challenges OWNER TO cvault_owner;
CREATE TABLE cvault.tenant_admins (
    tenant_id uuid NOT NULL,
    admin_id uuid NOT NULL,
    email text NOT NULL,
    password_hash text,
    role text NOT NULL,
    status text DEFAULT 'active'::text NOT NULL,
    email_verified_at timestamp with time zone,
    password_changed_at timestamp with time zone,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT tenant_admins_email_lower CHECK (((email = lower(email)) AND (char_length(email) <= 254))),
    CONSTRAINT tenant_admins_role CHECK ((role = ANY (ARRAY['owner'::text, 'admin'::text, 'developer'::text, 'billing'::text, 'viewer'::text]))),
    CONSTRAINT tenant_admins_status CHECK ((status = ANY (ARRAY['active'::text, 'disabled'::text])))
);
ALTER TABLE ONLY cvault.tenant_admins FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.tenant_admins OWNER TO cvault_owner;
CREATE TABLE cvault.tenants (
    tenant_id uuid NOT NULL,
    name text NOT NULL,
    status text DEFAULT 'active'::text NOT NULL,
    bandwidth_limit_bytes bigint,
    user_limit integer,
    max_devices_per_user integer DEFAULT 5 NOT NULL,
    whitelabel_config jsonb DEFAULT '{}'::jsonb NOT NULL,
    public_clients boolean DEFAULT false NOT NULL,
    rate_limit_per_minute integer,
    data_key_version smallint NOT NULL,
    data_key_sealed bytea,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    deleted_at timestamp with time zone,
    over_limit_since timestamp with time zone,
    allowed_origins text[] DEFAULT '{}'::text[] NOT NULL,
    client_dns inet[],
    client_allowed_ips cidr[],
    client_mtu integer,
    rate_up_bps bigint,
    rate_down_bps bigint,
    device_rate_up_bps bigint,
    device_rate_down_bps bigint,
    allow_intra_tenant boolean DEFAULT false NOT NULL,
    allow_private_destinations text[] DEFAULT '{}'::text[] NOT NULL,
    allow_smtp boolean DEFAULT false NOT NULL,
    over_quota text DEFAULT 'block'::text NOT NULL,
    throttle_bps bigint DEFAULT 1000000 NOT NULL,
    policy_revision bigint DEFAULT 1 NOT NULL,
    deleting_since timestamp with time zone,
    user_rate_limit_per_minute integer,
    CONSTRAINT tenants_allowed_origins CHECK ((cardinality(allowed_origins) <= 100)),
    CONSTRAINT tenants_bandwidth_limit CHECK ((bandwidth_limit_bytes >= 0)),
    CONSTRAINT tenants_client_allowed_ips CHECK (((cardinality(client_allowed_ips) >= 1) AND (cardinality(client_allowed_ips) <= 32))),
    CONSTRAINT tenants_client_dns CHECK (((cardinality(client_dns) >= 1) AND (cardinality(client_dns) <= 4))),
    CONSTRAINT tenants_client_mtu CHECK (((client_mtu >= 1280) AND (client_mtu <= 1500))),
    CONSTRAINT tenants_data_key CHECK (((data_key_sealed IS NULL) = (status = 'deleted'::text))),
    CONSTRAINT tenants_deleting CHECK (((deleting_since IS NULL) OR (status = ANY (ARRAY['suspended'::text, 'deleted'::text])))),
    CONSTRAINT tenants_device_rate_down CHECK ((device_rate_down_bps > 0)),
    CONSTRAINT tenants_device_rate_up CHECK ((device_rate_up_bps > 0)),
    CONSTRAINT tenants_max_devices CHECK (((max_devices_per_user >= 0) AND (max_devices_per_user <= 1000))),
    CONSTRAINT tenants_name_length CHECK (((char_length(name) >= 1) AND (char_length(name) <= 255))),
    CONSTRAINT tenants_over_quota CHECK ((over_quota = ANY (ARRAY['block'::text, 'throttle'::text]))),
    CONSTRAINT tenants_private_destinations CHECK ((cardinality(allow_private_destinations) <= 64)),
    CONSTRAINT tenants_rate_down CHECK ((rate_down_bps > 0)),
    CONSTRAINT tenants_rate_limit CHECK ((rate_limit_per_minute > 0)),
    CONSTRAINT tenants_rate_up CHECK ((rate_up_bps > 0)),
    CONSTRAINT tenants_status CHECK ((status = ANY (ARRAY['active'::text, 'suspended'::text, 'trial'::text, 'deleted'::text]))),
    CONSTRAINT tenants_throttle CHECK ((throttle_bps > 0)),
    CONSTRAINT tenants_user_limit CHECK ((user_limit >= 0)),
    CONSTRAINT tenants_user_rate_limit CHECK ((user_rate_limit_per_minute > 0))
);
ALTER TABLE ONLY cvault.tenants FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.tenants OWNER TO cvault_owner;
CREATE TABLE cvault.usage_daily (
    tenant_id uuid NOT NULL,
    day date NOT NULL,
    rx_bytes bigint DEFAULT 0 NOT NULL,
    tx_bytes bigint DEFAULT 0 NOT NULL,
    connection_seconds bigint DEFAULT 0 NOT NULL,
    active_users integer DEFAULT 0 NOT NULL,
    api_calls bigint DEFAULT 0 NOT NULL
);
ALTER TABLE ONLY cvault.usage_daily FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.usage_daily OWNER TO cvault_owner;
CREATE TABLE cvault.usage_hourly (
    tenant_id uuid NOT NULL,
    hour timestamp with time zone NOT NULL,
    device_id uuid NOT NULL,
    user_id uuid NOT NULL,
    server_id uuid NOT NULL,
    rx_bytes bigint NOT NULL,
    tx_bytes bigint NOT NULL,
    CONSTRAINT usage_hourly_bytes CHECK (((rx_bytes >= 0) AND (tx_bytes >= 0))),
    CONSTRAINT usage_hourly_hour CHECK ((hour = date_trunc('hour'::text, hour, 'UTC'::text)))
)
PARTITION BY RANGE (hour);
ALTER TABLE ONLY cvault.usage_hourly FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.usage_hourly OWNER TO cvault_owner;
CREATE TABLE cvault.usage_hourly_2026_11 (
    tenant_id uuid NOT NULL,
    hour timestamp with time zone NOT NULL,
    device_id uuid NOT NULL,
    user_id uuid NOT NULL,
    server_id uuid NOT NULL,
    rx_bytes bigint NOT NULL,
    tx_bytes bigint NOT NULL,
    CONSTRAINT usage_hourly_bytes CHECK (((rx_bytes >= 0) AND (tx_bytes >= 0))),
    CONSTRAINT usage_hourly_hour CHECK ((hour = date_trunc('hour'::text, hour, 'UTC'::text)))
);
ALTER TABLE ONLY cvault.usage_hourly_2026_11 FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.usage_hourly_2026_11 OWNER TO cvault_owner;
CREATE TABLE cvault.usage_hourly_2026_12 (
    tenant_id uuid NOT NULL,
    hour timestamp with time zone NOT NULL,
    device_id uuid NOT NULL,
    user_id uuid NOT NULL,
    server_id uuid NOT NULL,
    rx_bytes bigint NOT NULL,
    tx_bytes bigint NOT NULL,
    CONSTRAINT usage_hourly_bytes CHECK (((rx_bytes >= 0) AND (tx_bytes >= 0))),
    CONSTRAINT usage_hourly_hour CHECK ((hour = date_trunc('hour'::text, hour, 'UTC'::text)))
);
ALTER TABLE ONLY cvault.usage_hourly_2026_12 FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.usage_hourly_2026_12 OWNER TO cvault_owner;
CREATE TABLE cvault.usage_hourly_2027_01 (
    tenant_id uuid NOT NULL,
    hour timestamp with time zone NOT NULL,
    device_id uuid NOT NULL,
    user_id uuid NOT NULL,
    server_id uuid NOT NULL,
    rx_bytes bigint NOT NULL,
    tx_bytes bigint NOT NULL,
    CONSTRAINT usage_hourly_bytes CHECK (((rx_bytes >= 0) AND (tx_bytes >= 0))),
    CONSTRAINT usage_hourly_hour CHECK ((hour = date_trunc('hour'::text, hour, 'UTC'::text)))
);
ALTER TABLE ONLY cvault.usage_hourly_2027_01 FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.usage_hourly_2027_01 OWNER TO cvault_owner;
CREATE TABLE cvault.usage_hourly_2027_02 (
    tenant_id uuid NOT NULL,
    hour timestamp with time zone NOT NULL,
    device_id uuid NOT NULL,
    user_id uuid NOT NULL,
    server_id uuid NOT NULL,
    rx_bytes bigint NOT NULL,
    tx_bytes bigint NOT NULL,
    CONSTRAINT usage_hourly_bytes CHECK (((rx_bytes >= 0) AND (tx_bytes >= 0))),
    CONSTRAINT usage_hourly_hour CHECK ((hour = date_trunc('hour'::text, hour, 'UTC'::text)))
);
ALTER TABLE ONLY cvault.usage_hourly_2027_02 FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.usage_hourly_2027_02 OWNER TO cvault_owner;
CREATE TABLE cvault.usage_hourly_default (
    tenant_id uuid NOT NULL,
    hour timestamp with time zone NOT NULL,
    device_id uuid NOT NULL,
    user_id uuid NOT NULL,
    server_id uuid NOT NULL,
    rx_bytes bigint NOT NULL,
    tx_bytes bigint NOT NULL,
    CONSTRAINT usage_hourly_bytes CHECK (((rx_bytes >= 0) AND (tx_bytes >= 0))),
    CONSTRAINT usage_hourly_hour CHECK ((hour = date_trunc('hour'::text, hour, 'UTC'::text)))
);
ALTER TABLE ONLY cvault.usage_hourly_default FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.usage_hourly_default OWNER TO cvault_owner;
CREATE TABLE cvault.users (
    tenant_id uuid NOT NULL,
    user_id uuid NOT NULL,
    external_user_id text,
    email text,
    password_hash text,
    status text DEFAULT 'active'::text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    deleted_at timestamp with time zone,
    deleting_since timestamp with time zone,
    CONSTRAINT users_deleted CHECK (((status = 'deleted'::text) = (deleted_at IS NOT NULL))),
    CONSTRAINT users_deleting CHECK (((deleting_since IS NULL) OR (status = ANY (ARRAY['disabled'::text, 'deleted'::text])))),
    CONSTRAINT users_email_lower CHECK (((email = lower(email)) AND (char_length(email) <= 255))),
    CONSTRAINT users_external_id_length CHECK (((char_length(external_user_id) >= 1) AND (char_length(external_user_id) <= 255))),
    CONSTRAINT users_identified CHECK (
CASE
    WHEN ((status = 'deleted'::text) OR (deleting_since IS NOT NULL)) THEN ((email IS NULL) AND (external_user_id IS NULL) AND (password_hash IS NULL))
    ELSE ((email IS NOT NULL) OR (external_user_id IS NOT NULL))
END),
    CONSTRAINT users_status CHECK ((status = ANY (ARRAY['active'::text, 'disabled'::text, 'deleted'::text])))
);
ALTER TABLE ONLY cvault.users FORCE ROW LEVEL SECURITY;
ALTER TABLE cvault.users OWNER TO cvault_owner;
CREATE TABLE platform.address_pools (
    pool_id uuid NOT NULL,
    name text NOT NULL,
    ipv4 cidr NOT NULL,
    ipv6 cidr NOT NULL,
    next_host bigint DEFAULT 2 NOT NULL,
    quarantine_seconds integer DEFAULT 60 NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    deleted_at timestamp with time zone,
    reclaim boolean DEFAULT false NOT NULL,
    CONSTRAINT address_pools_families CHECK (((family((ipv4)::inet) = 4) AND (family((ipv6)::inet) = 6))),
    CONSTRAINT address_pools_ipv4_size CHECK (((masklen((ipv4)::inet) >= 8) AND (masklen((ipv4)::inet) <= 29))),
    CONSTRAINT address_pools_ipv6_size CHECK (((masklen((ipv6)::inet) >= 48) AND (masklen((ipv6)::inet) <= 96))),
    CONSTRAINT address_pools_name_length CHECK (((char_length(name) >= 1) AND (char_length(name) <= 64))),
    CONSTRAINT address_pools_quarantine CHECK (((quarantine_seconds >= 0) AND (quarantine_seconds <= 604800)))
);
ALTER TABLE platform.address_pools OWNER TO cvault_owner;
CREATE TABLE platform.addresses (
    pool_id uuid NOT NULL,
    host bigint NOT NULL,
    state text NOT NULL,
    tenant_id uuid,
    device_id uuid,
    released_device_id uuid,
    released_at timestamp with time zone,
    CONSTRAINT addresses_owner CHECK ((((state = 'allocated'::text) = (device_id IS NOT NULL)) AND ((device_id IS NULL) = (tenant_id IS NULL)))),
    CONSTRAINT addresses_state CHECK ((state = ANY (ARRAY['free'::text, 'allocated'::text, 'quarantine'::text])))
);
ALTER TABLE platform.addresses OWNER TO cvault_owner;
CREATE TABLE platform.admin_approvals (
    token_hash bytea NOT NULL,
    action text NOT NULL,
    target text NOT NULL,
    approved_by text NOT NULL,
    created_at timestamp with time zone NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    used_at timestamp with time zone,
    used_by text,
    CONSTRAINT admin_approvals_hash_length CHECK ((octet_length(token_hash) = 32)),
    CONSTRAINT admin_approvals_used CHECK (((used_at IS NULL) = (used_by IS NULL)))
);
ALTER TABLE platform.admin_approvals OWNER TO cvault_owner;
CREATE TABLE platform.context_keys (
    key_id smallint NOT NULL,
    key bytea NOT NULL,
    active boolean DEFAULT true NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT context_keys_key_length CHECK ((octet_length(key) = 32))
);
ALTER TABLE platform.context_keys OWNER TO cvault_owner;
CREATE TABLE platform.device_drops (
    server_id uuid NOT NULL,
    device_id uuid NOT NULL,
    generation bigint NOT NULL,
    drops jsonb NOT NULL,
    reported_at timestamp with time zone NOT NULL
);
ALTER TABLE platform.device_drops OWNER TO cvault_owner;
CREATE TABLE platform.enrol_tokens (
    token_id uuid NOT NULL,
    server_id uuid NOT NULL,
    secret_hash bytea NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    used_at timestamp with time zone,
    used_pin bytea,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT enrol_tokens_pin_length CHECK ((octet_length(used_pin) = 32)),
    CONSTRAINT enrol_tokens_secret_length CHECK ((octet_length(secret_hash) = 32)),
    CONSTRAINT enrol_tokens_used CHECK (((used_at IS NULL) = (used_pin IS NULL)))
);
ALTER TABLE platform.enrol_tokens OWNER TO cvault_owner;
CREATE TABLE platform.idempotency_keys (
    principal text NOT NULL,
    key text NOT NULL,
    fingerprint bytea NOT NULL,
    status smallint,
    response_sealed bytea,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    kek_version smallint,
    CONSTRAINT idempotency_keys_kek_version CHECK (((response_sealed IS NULL) = (kek_version IS NULL))),
    CONSTRAINT idempotency_keys_key_length CHECK (((char_length(key) >= 1) AND (char_length(key) <= 255)))
);
ALTER TABLE platform.idempotency_keys OWNER TO cvault_owner;
CREATE TABLE platform.installation (
    singleton boolean DEFAULT true NOT NULL,
    incarnation uuid DEFAULT gen_random_uuid() NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT installation_singleton CHECK (singleton)
);
ALTER TABLE platform.installation OWNER TO cvault_owner;
CREATE TABLE platform.node_changes (
    server_id uuid NOT NULL,
    revision bigint NOT NULL,
    op text NOT NULL,
    device_id uuid NOT NULL,
    public_key bytea NOT NULL,
    at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT node_changes_op CHECK ((op = ANY (ARRAY['upsert'::text, 'remove'::text])))
);
ALTER TABLE platform.node_changes OWNER TO cvault_owner;
CREATE TABLE platform.peers (
    server_id uuid NOT NULL,
    device_id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    user_id uuid NOT NULL,
    public_key bytea NOT NULL,
    preshared_key_sealed bytea,
    preshared_key_hash bytea NOT NULL,
    ipv4 inet NOT NULL,
    ipv6 inet NOT NULL,
    generation bigint NOT NULL,
    removed_revision bigint,
    CONSTRAINT peers_families CHECK (((family(ipv4) = 4) AND (family(ipv6) = 6))),
    CONSTRAINT peers_public_key_length CHECK ((octet_length(public_key) = 32))
);
ALTER TABLE platform.peers OWNER TO cvault_owner;
CREATE TABLE platform.portal_attempts (
    attempt_id uuid NOT NULL,
    at timestamp with time zone NOT NULL,
    account bytea NOT NULL,
    kind text NOT NULL,
    outcome text NOT NULL,
    client_ip inet,
    request_id uuid NOT NULL,
    CONSTRAINT portal_attempts_kind CHECK ((kind = ANY (ARRAY['signup'::text, 'login'::text, 'password_reset'::text]))),
    CONSTRAINT portal_attempts_outcome CHECK ((outcome = ANY (ARRAY['success'::text, 'failure'::text, 'limited'::text])))
);
ALTER TABLE platform.portal_attempts OWNER TO cvault_owner;
CREATE TABLE platform.quota_leases (
    tenant_id uuid NOT NULL,
    server_id uuid NOT NULL,
    counter_epoch uuid NOT NULL,
    device_id uuid NOT NULL,
    generation bigint NOT NULL,
    until_bytes bigint NOT NULL,
    sequence bigint DEFAULT 1 NOT NULL,
    granted_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT quota_leases_until CHECK ((until_bytes >= 0))
);
ALTER TABLE platform.quota_leases OWNER TO cvault_owner;
CREATE TABLE platform.quota_months (
    tenant_id uuid NOT NULL,
    month date NOT NULL,
    bytes bigint NOT NULL,
    CONSTRAINT quota_months_bytes CHECK ((bytes >= 0)),
    CONSTRAINT quota_months_month CHECK ((month = (date_trunc('month'::text, (month)::timestamp without time zone))::date))
);
ALTER TABLE platform.quota_months OWNER TO cvault_owner;
CREATE TABLE platform.revoked_admin_tokens (
    token_id uuid NOT NULL,
    revoked_at timestamp with time zone DEFAULT now() NOT NULL,
    expires_at timestamp with time zone NOT NULL
);
ALTER TABLE platform.revoked_admin_tokens OWNER TO cvault_owner;
CREATE TABLE platform.secrets (
    name text NOT NULL,
    kek_version smallint NOT NULL,
    sealed bytea NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    signs_from timestamp with time zone,
    CONSTRAINT secrets_signs_from CHECK (((signs_from IS NOT NULL) = (name ~ '^token_key(:[0-9a-f]{16})?$'::text)))
);
ALTER TABLE platform.secrets OWNER TO cvault_owner;
CREATE TABLE platform.servers (
    server_id uuid NOT NULL,
    name text NOT NULL,
    region text NOT NULL,
    transport text DEFAULT 'agent'::text NOT NULL,
    public_ip inet NOT NULL,
    endpoint_port integer DEFAULT 51820 NOT NULL,
    pool_id uuid NOT NULL,
    capacity integer DEFAULT 65000 NOT NULL,
    status text DEFAULT 'active'::text NOT NULL,
    public_key bytea,
    identity_pin bytea,
    revision bigint DEFAULT 0 NOT NULL,
    peer_count bigint DEFAULT 0 NOT NULL,
    digest numeric(39,0) DEFAULT 0 NOT NULL,
    digest_key bytea NOT NULL,
    acked_revision bigint DEFAULT 0 NOT NULL,
    acked_digest numeric(39,0),
    acked_at timestamp with time zone,
    acked_session bigint,
    session_epoch bigint DEFAULT 0 NOT NULL,
    instance_id uuid,
    replaced_instance_id uuid,
    last_seen_at timestamp with time zone,
    health jsonb DEFAULT '{}'::jsonb NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT servers_capacity CHECK (((capacity >= 1) AND (capacity <= 65533))),
    CONSTRAINT servers_digest_key_length CHECK ((octet_length(digest_key) = 32)),
    CONSTRAINT servers_digest_range CHECK (((digest >= (0)::numeric) AND (digest < '340282366920938463463374607431768211456'::numeric))),
    CONSTRAINT servers_endpoint_port CHECK (((endpoint_port >= 1) AND (endpoint_port <= 65535))),
    CONSTRAINT servers_identity_pin_length CHECK ((octet_length(identity_pin) = 32)),
    CONSTRAINT servers_name_length CHECK (((char_length(name) >= 1) AND (char_length(name) <= 64))),
    CONSTRAINT servers_public_key_length CHECK ((octet_length(public_key) = 32)),
    CONSTRAINT servers_region_form CHECK ((region ~ '^[a-z0-9][a-z0-9-]{0,49}$'::text)),
    CONSTRAINT servers_removed CHECK (((status <> 'removed'::text) OR (identity_pin IS NULL))),
    CONSTRAINT servers_status CHECK ((status = ANY (ARRAY['active'::text, 'draining'::text, 'maintenance'::text, 'offline'::text, 'removed'::text]))),
    CONSTRAINT servers_transport CHECK ((transport = ANY (ARRAY['agent'::text, 'ssh'::text])))
);
ALTER TABLE platform.servers OWNER TO cvault_owner;
CREATE TABLE platform.usage_counters (
    server_id uuid NOT NULL,
    counter_epoch uuid NOT NULL,
    device_id uuid NOT NULL,
    generation bigint NOT NULL,
    rx_bytes bigint NOT NULL,
    tx_bytes bigint NOT NULL,
    rx_packets bigint NOT NULL,
    tx_packets bigint NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT usage_counters_bytes CHECK (((rx_bytes >= 0) AND (tx_bytes >= 0)))
);
ALTER TABLE platform.usage_counters OWNER TO cvault_owner;
CREATE TABLE platform.usage_orphans (
    server_id uuid NOT NULL,
    device_id uuid NOT NULL,
    hour timestamp with time zone NOT NULL,
    rx_bytes bigint NOT NULL,
    tx_bytes bigint NOT NULL
);
ALTER TABLE platform.usage_orphans OWNER TO cvault_owner;
CREATE TABLE platform.usage_settled (
    device_id uuid NOT NULL,
    rx_bytes numeric NOT NULL,
    tx_bytes numeric NOT NULL
);
ALTER TABLE platform.usage_settled OWNER TO cvault_owner;
CREATE TABLE platform.usage_windows (
    server_id uuid NOT NULL,
    counter_epoch uuid NOT NULL,
    sequence bigint NOT NULL,
    received_at timestamp with time zone DEFAULT now() NOT NULL
);
ALTER TABLE platform.usage_windows OWNER TO cvault_owner;
ALTER TABLE ONLY cvault.usage_hourly ATTACH PARTITION cvault.usage_hourly_2026_11 FOR VALUES FROM ('2026-11-01 00:00:00+00') TO ('2026-12-01 00:00:00+00');
ALTER TABLE ONLY cvault.usage_hourly ATTACH PARTITION cvault.usage_hourly_2026_12 FOR VALUES FROM ('2026-12-01 00:00:00+00') TO ('2027-01-01 00:00:00+00');
ALTER TABLE ONLY cvault.usage_hourly ATTACH PARTITION cvault.usage_hourly_2027_01 FOR VALUES FROM ('2027-01-01 00:00:00+00') TO ('2027-02-01 00:00:00+00');
ALTER TABLE ONLY cvault.usage_hourly ATTACH PARTITION cvault.usage_hourly_2027_02 FOR VALUES FROM ('2027-02-01 00:00:00+00') TO ('2027-03-01 00:00:00+00');
ALTER TABLE ONLY cvault.usage_hourly ATTACH PARTITION cvault.usage_hourly_default DEFAULT;
ALTER TABLE ONLY cvault.api_keys
    ADD CONSTRAINT api_keys_pkey PRIMARY KEY (tenant_id, api_key_id);
ALTER TABLE ONLY cvault.api_keys
    ADD CONSTRAINT api_keys_tenant_key_text UNIQUE (tenant_id, key_text);
ALTER TABLE ONLY cvault.audit_log
    ADD CONSTRAINT audit_log_chain_unique UNIQUE (tenant_id, chain_sequence);
ALTER TABLE ONLY cvault.audit_log
    ADD CONSTRAINT audit_log_pkey PRIMARY KEY (tenant_id, audit_id);
ALTER TABLE ONLY cvault.auth_events
    ADD CONSTRAINT auth_events_pkey PRIMARY KEY (tenant_id, event_id);
ALTER TABLE ONLY cvault.devices
    ADD CONSTRAINT devices_pkey PRIMARY KEY (tenant_id, device_id);
ALTER TABLE ONLY cvault.idempotency_keys
    ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (tenant_id, principal, key);
ALTER TABLE ONLY cvault.outbox
    ADD CONSTRAINT outbox_pkey PRIMARY KEY (tenant_id, mail_id);
ALTER TABLE ONLY cvault.portal_links
    ADD CONSTRAINT portal_links_pkey PRIMARY KEY (tenant_id, token_hash);
ALTER TABLE ONLY cvault.portal_networks
    ADD CONSTRAINT portal_networks_pkey PRIMARY KEY (tenant_id, admin_id, network);
ALTER TABLE ONLY cvault.portal_refresh_tokens
    ADD CONSTRAINT portal_refresh_tokens_pkey PRIMARY KEY (tenant_id, token_hash);
ALTER TABLE ONLY cvault.portal_sessions
    ADD CONSTRAINT portal_sessions_pkey PRIMARY KEY (tenant_id, session_id);
ALTER TABLE ONLY cvault.refresh_tokens
    ADD CONSTRAINT refresh_tokens_pkey PRIMARY KEY (tenant_id, token_hash);
ALTER TABLE ONLY cvault.request_logs
    ADD CONSTRAINT request_logs_pkey PRIMARY KEY (tenant_id, request_id);
ALTER TABLE ONLY cvault.sessions
    ADD CONSTRAINT sessions_pkey PRIMARY KEY (tenant_id, session_id);
ALTER TABLE ONLY cvault.step_up_challenges
    ADD CONSTRAINT step_up_challenges_pkey PRIMARY KEY (tenant_id, challenge_id);
ALTER TABLE ONLY cvault.tenant_admins
    ADD CONSTRAINT tenant_admins_pkey PRIMARY KEY (tenant_id, admin_id);
ALTER TABLE ONLY cvault.tenants
    ADD CONSTRAINT tenants_pkey PRIMARY KEY (tenant_id);
ALTER TABLE ONLY cvault.usage_daily
    ADD CONSTRAINT usage_daily_pkey PRIMARY KEY (tenant_id, day);
ALTER TABLE ONLY cvault.usage_hourly
    ADD CONSTRAINT usage_hourly_pkey PRIMARY KEY (tenant_id, hour, device_id, server_id);
ALTER TABLE ONLY cvault.usage_hourly_2026_11
    ADD CONSTRAINT usage_hourly_2026_11_pkey PRIMARY KEY (tenant_id, hour, device_id, server_id);
ALTER TABLE ONLY cvault.usage_hourly_2026_12
    ADD CONSTRAINT usage_hourly_2026_12_pkey PRIMARY KEY (tenant_id, hour, device_id, server_id);
ALTER TABLE ONLY cvault.usage_hourly_2027_01
    ADD CONSTRAINT usage_hourly_2027_01_pkey PRIMARY KEY (tenant_id, hour, device_id, server_id);
ALTER TABLE ONLY cvault.usage_hourly_2027_02
    ADD CONSTRAINT usage_hourly_2027_02_pkey PRIMARY KEY (tenant_id, hour, device_id, server_id);
ALTER TABLE ONLY cvault.usage_hourly_default
    ADD CONSTRAINT usage_hourly_default_pkey PRIMARY KEY (tenant_id, hour, device_id, server_id);
ALTER TABLE ONLY cvault.users
    ADD CONSTRAINT users_email_unique UNIQUE (tenant_id, email);
ALTER TABLE ONLY cvault.users
    ADD CONSTRAINT users_external_id_unique UNIQUE (tenant_id, external_user_id);
ALTER TABLE ONLY cvault.users
    ADD CONSTRAINT users_pkey PRIMARY KEY (tenant_id, user_id);
ALTER TABLE ONLY platform.address_pools
    ADD CONSTRAINT address_pools_ipv4_overlap EXCLUDE USING gist (ipv4 inet_ops WITH &&) WHERE ((deleted_at IS NULL));
ALTER TABLE ONLY platform.address_pools
    ADD CONSTRAINT address_pools_ipv6_overlap EXCLUDE USING gist (ipv6 inet_ops WITH &&) WHERE ((deleted_at IS NULL));
ALTER TABLE ONLY platform.address_pools
    ADD CONSTRAINT address_pools_pkey PRIMARY KEY (pool_id);
ALTER TABLE ONLY platform.addresses
    ADD CONSTRAINT addresses_device_unique UNIQUE (device_id);
ALTER TABLE ONLY platform.addresses
    ADD CONSTRAINT addresses_pkey PRIMARY KEY (pool_id, host);
ALTER TABLE ONLY platform.admin_approvals
    ADD CONSTRAINT admin_approvals_pkey PRIMARY KEY (token_hash);
ALTER TABLE ONLY platform.context_keys
    ADD CONSTRAINT context_keys_pkey PRIMARY KEY (key_id);
ALTER TABLE ONLY platform.device_drops
    ADD CONSTRAINT device_drops_pkey PRIMARY KEY (server_id, device_id);
ALTER TABLE ONLY platform.enrol_tokens
    ADD CONSTRAINT enrol_tokens_pkey PRIMARY KEY (token_id);
ALTER TABLE ONLY platform.idempotency_keys
    ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (principal, key);
ALTER TABLE ONLY platform.installation
    ADD CONSTRAINT installation_pkey PRIMARY KEY (singleton);
ALTER TABLE ONLY platform.node_changes
    ADD CONSTRAINT node_changes_pkey PRIMARY KEY (server_id, revision);
ALTER TABLE ONLY platform.peers
    ADD CONSTRAINT peers_pkey PRIMARY KEY (server_id, device_id);
ALTER TABLE ONLY platform.portal_attempts
    ADD CONSTRAINT portal_attempts_pkey PRIMARY KEY (attempt_id);
ALTER TABLE ONLY platform.quota_leases
    ADD CONSTRAINT quota_leases_pkey PRIMARY KEY (tenant_id, server_id, counter_epoch, device_id, generation);
ALTER TABLE ONLY platform.quota_months
    ADD CONSTRAINT quota_months_pkey PRIMARY KEY (tenant_id, month);
ALTER TABLE ONLY platform.revoked_admin_tokens
    ADD CONSTRAINT revoked_admin_tokens_pkey PRIMARY KEY (token_id);
ALTER TABLE ONLY platform.secrets
    ADD CONSTRAINT secrets_pkey PRIMARY KEY (name);
ALTER TABLE ONLY platform.servers
    ADD CONSTRAINT servers_identity_pin_unique UNIQUE (identity_pin);
ALTER TABLE ONLY platform.servers
    ADD CONSTRAINT servers_pkey PRIMARY KEY (server_id);
ALTER TABLE ONLY platform.servers
    ADD CONSTRAINT servers_pool_unique UNIQUE (server_id, pool_id);
ALTER TABLE ONLY platform.usage_counters
    ADD CONSTRAINT usage_counters_pkey PRIMARY KEY (server_id, counter_epoch, device_id, generation);
ALTER TABLE ONLY platform.usage_orphans
    ADD CONSTRAINT usage_orphans_pkey PRIMARY KEY (server_id, device_id, hour);
ALTER TABLE ONLY platform.usage_settled
    ADD CONSTRAINT usage_settled_pkey PRIMARY KEY (device_id);
ALTER TABLE ONLY platform.usage_windows
    ADD CONSTRAINT usage_windows_pkey PRIMARY KEY (server_id, counter_epoch, sequence);
CREATE UNIQUE INDEX api_keys_key_text ON cvault.api_keys USING btree (key_text);
CREATE INDEX api_keys_revoked ON cvault.api_keys USING btree (revoked_at) WHERE (revoked_at IS NOT NULL);
CREATE INDEX audit_log_id ON cvault.audit_log USING btree (audit_id);
CREATE INDEX audit_log_unchained ON cvault.audit_log USING btree (tenant_id, at, audit_id) WHERE (chain_sequence IS NULL);
CREATE INDEX auth_events_at ON cvault.auth_events USING btree (at);
CREATE INDEX devices_revoked ON cvault.devices USING btree (revoked_at) WHERE (status = 'revoked'::text);
CREATE INDEX devices_suspended ON cvault.devices USING btree (tenant_id) WHERE (suspended AND (status = 'active'::text));
CREATE UNIQUE INDEX devices_tenant_public_key ON cvault.devices USING btree (tenant_id, public_key) WHERE (status = 'active'::text);
CREATE INDEX devices_user ON cvault.devices USING btree (tenant_id, user_id, device_id) WHERE (status = 'active'::text);
CREATE INDEX idempotency_keys_created ON cvault.idempotency_keys USING btree (created_at);
CREATE UNIQUE INDEX idempotency_keys_staff ON cvault.idempotency_keys USING btree (principal, key) WHERE (principal ~~ 'admin:%'::text);
CREATE INDEX outbox_due ON cvault.outbox USING btree (next_attempt_at) WHERE ((delivered_at IS NULL) AND (dead_at IS NULL));
CREATE INDEX outbox_ended ON cvault.outbox USING btree (created_at) WHERE ((delivered_at IS NOT NULL) OR (dead_at IS NOT NULL));
CREATE INDEX outbox_waiting ON cvault.outbox USING btree (tenant_id) WHERE ((delivered_at IS NULL) AND (dead_at IS NULL));
CREATE INDEX portal_links_admin ON cvault.portal_links USING btree (tenant_id, admin_id);
CREATE INDEX portal_links_hash ON cvault.portal_links USING btree (token_hash);
CREATE INDEX portal_refresh_tokens_hash ON cvault.portal_refresh_tokens USING btree (token_hash);
CREATE INDEX portal_refresh_tokens_session ON cvault.portal_refresh_tokens USING btree (tenant_id, session_id);
CREATE INDEX portal_sessions_admin ON cvault.portal_sessions USING btree (tenant_id, admin_id) WHERE (ended_at IS NULL);
CREATE INDEX portal_sessions_cookie ON cvault.portal_sessions USING btree (cookie_hash) WHERE (cookie_hash IS NOT NULL);
CREATE INDEX refresh_tokens_expires ON cvault.refresh_tokens USING btree (expires_at);
CREATE INDEX refresh_tokens_family ON cvault.refresh_tokens USING btree (tenant_id, family_id);
CREATE INDEX refresh_tokens_user ON cvault.refresh_tokens USING btree (tenant_id, user_id);
CREATE INDEX sessions_closed_at ON cvault.sessions USING btree (disconnected_at) WHERE (status = 'disconnected'::text);
CREATE INDEX sessions_device ON cvault.sessions USING btree (tenant_id, device_id, connected_at);
CREATE INDEX sessions_ended ON cvault.sessions USING btree (tenant_id, COALESCE(disconnected_at, 'infinity'::timestamp with time zone));
CREATE UNIQUE INDEX sessions_one_active ON cvault.sessions USING btree (tenant_id, device_id) WHERE (status = 'active'::text);
CREATE INDEX sessions_open ON cvault.sessions USING btree (connected_at) WHERE (status = 'active'::text);
CREATE INDEX sessions_user ON cvault.sessions USING btree (tenant_id, user_id, COALESCE(disconnected_at, 'infinity'::timestamp with time zone));
CREATE INDEX step_up_challenges_session ON cvault.step_up_challenges USING btree (tenant_id, session_id);
CREATE UNIQUE INDEX tenant_admins_email ON cvault.tenant_admins USING btree (email);
CREATE INDEX tenants_closed ON cvault.tenants USING btree (tenant_id) WHERE ((status = 'suspended'::text) OR (over_limit_since IS NOT NULL));
CREATE INDEX tenants_deleting ON cvault.tenants USING btree (deleting_since) WHERE ((deleting_since IS NOT NULL) AND (status <> 'deleted'::text));
CREATE INDEX tenants_limited ON cvault.tenants USING btree (tenant_id) WHERE ((bandwidth_limit_bytes IS NOT NULL) OR (over_limit_since IS NOT NULL));
CREATE INDEX usage_hourly_hour ON ONLY cvault.usage_hourly USING btree (hour);
CREATE INDEX usage_hourly_2026_11_hour_idx ON cvault.usage_hourly_2026_11 USING btree (hour);
CREATE INDEX usage_hourly_user ON ONLY cvault.usage_hourly USING btree (tenant_id, user_id, hour);
CREATE INDEX usage_hourly_2026_11_tenant_id_user_id_hour_idx ON cvault.usage_hourly_2026_11 USING btree (tenant_id, user_id, hour);
CREATE INDEX usage_hourly_2026_12_hour_idx ON cvault.usage_hourly_2026_12 USING btree (hour);
CREATE INDEX usage_hourly_2026_12_tenant_id_user_id_hour_idx ON cvault.usage_hourly_2026_12 USING btree (tenant_id, user_id, hour);
CREATE INDEX usage_hourly_2027_01_hour_idx ON cvault.usage_hourly_2027_01 USING btree (hour);
CREATE INDEX usage_hourly_2027_01_tenant_id_user_id_hour_idx ON cvault.usage_hourly_2027_01 USING btree (tenant_id, user_id, hour);
CREATE INDEX usage_hourly_2027_02_hour_idx ON cvault.usage_hourly_2027_02 USING btree (hour);
CREATE INDEX usage_hourly_2027_02_tenant_id_user_id_hour_idx ON cvault.usage_hourly_2027_02 USING btree (tenant_id, user_id, hour);
CREATE INDEX usage_hourly_default_hour_idx ON cvault.usage_hourly_default USING btree (hour);
CREATE INDEX usage_hourly_default_tenant_id_user_id_hour_idx ON cvault.usage_hourly_default USING btree (tenant_id, user_id, hour);
CREATE INDEX users_deleting ON cvault.users USING btree (deleting_since) WHERE ((deleting_since IS NOT NULL) AND (status <> 'deleted'::text));
CREATE INDEX users_disabled ON cvault.users USING btree (tenant_id, user_id) WHERE (status = 'disabled'::text);
CREATE INDEX users_present ON cvault.users USING btree (tenant_id, user_id) WHERE (status <> 'deleted'::text);
CREATE UNIQUE INDEX address_pools_name_unique ON platform.address_pools USING btree (name) WHERE (deleted_at IS NULL);
CREATE INDEX addresses_free ON platform.addresses USING btree (pool_id, released_at NULLS FIRST, host) WHERE (state = 'free'::text);
CREATE INDEX addresses_quarantine ON platform.addresses USING btree (pool_id, released_at) WHERE (state = 'quarantine'::text);
CREATE INDEX admin_approvals_expiry ON platform.admin_approvals USING btree (expires_at);
CREATE INDEX device_drops_reported ON platform.device_drops USING btree (reported_at);
CREATE INDEX enrol_tokens_expires ON platform.enrol_tokens USING btree (expires_at);
CREATE INDEX peers_device ON platform.peers USING btree (device_id);
CREATE INDEX peers_generation ON platform.peers USING btree (server_id, generation) WHERE (removed_revision IS NULL);
CREATE UNIQUE INDEX peers_ipv4_device_unique ON platform.peers USING btree (ipv4) WHERE (removed_revision IS NULL);
CREATE UNIQUE INDEX peers_ipv6_unique ON platform.peers USING btree (server_id, ipv6) WHERE (removed_revision IS NULL);
CREATE UNIQUE INDEX peers_public_key_device_unique ON platform.peers USING btree (public_key) WHERE (removed_revision IS NULL);
CREATE INDEX peers_removed ON platform.peers USING btree (server_id, removed_revision) WHERE (removed_revision IS NOT NULL);
CREATE INDEX portal_attempts_account ON platform.portal_attempts USING btree (account, at);
CREATE INDEX portal_attempts_at ON platform.portal_attempts USING btree (at);
CREATE INDEX quota_leases_server ON platform.quota_leases USING btree (server_id);
CREATE INDEX revoked_admin_tokens_expiry ON platform.revoked_admin_tokens USING btree (expires_at);
CREATE UNIQUE INDEX servers_endpoint_unique ON platform.servers USING btree (public_ip, endpoint_port) WHERE (status <> 'removed'::text);
CREATE UNIQUE INDEX servers_name_unique ON platform.servers USING btree (name) WHERE (status <> 'removed'::text);
CREATE INDEX servers_pool ON platform.servers USING btree (pool_id) WHERE (status <> 'removed'::text);
CREATE INDEX usage_counters_device ON platform.usage_counters USING btree (device_id);
CREATE INDEX usage_counters_updated ON platform.usage_counters USING btree (updated_at);
CREATE INDEX usage_orphans_hour ON platform.usage_orphans USING btree (hour);
CREATE INDEX usage_settled_nothing ON platform.usage_settled USING btree (device_id) WHERE ((rx_bytes = (0)::numeric) AND (tx_bytes = (0)::numeric));
ALTER INDEX cvault.usage_hourly_hour ATTACH PARTITION cvault.usage_hourly_2026_11_hour_idx;
ALTER INDEX cvault.usage_hourly_pkey ATTACH PARTITION cvault.usage_hourly_2026_11_pkey;
ALTER INDEX cvault.usage_hourly_user ATTACH PARTITION cvault.usage_hourly_2026_11_tenant_id_user_id_hour_idx;
ALTER INDEX cvault.usage_hourly_hour ATTACH PARTITION cvault.usage_hourly_2026_12_hour_idx;
ALTER INDEX cvault.usage_hourly_pkey ATTACH PARTITION cvault.usage_hourly_2026_12_pkey;
ALTER INDEX cvault.usage_hourly_user ATTACH PARTITION cvault.usage_hourly_2026_12_tenant_id_user_id_hour_idx;
ALTER INDEX cvault.usage_hourly_hour ATTACH PARTITION cvault.usage_hourly_2027_01_hour_idx;
ALTER INDEX cvault.usage_hourly_pkey ATTACH PARTITION cvault.usage_hourly_2027_01_pkey;
ALTER INDEX cvault.usage_hourly_user ATTACH PARTITION cvault.usage_hourly_2027_01_tenant_id_user_id_hour_idx;
ALTER INDEX cvault.usage_hourly_hour ATTACH PARTITION cvault.usage_hourly_2027_02_hour_idx;
ALTER INDEX cvault.usage_hourly_pkey ATTACH PARTITION cvault.usage_hourly_2027_02_pkey;
ALTER INDEX cvault.usage_hourly_user ATTACH PARTITION cvault.usage_hourly_2027_02_tenant_id_user_id_hour_idx;
ALTER INDEX cvault.usage_hourly_hour ATTACH PARTITION cvault.usage_hourly_default_hour_idx;
ALTER INDEX cvault.usage_hourly_pkey ATTACH PARTITION cvault.usage_hourly_default_pkey;
ALTER INDEX cvault.usage_hourly_user ATTACH PARTITION cvault.usage_hourly_default_tenant_id_user_id_hour_idx;
ALTER TABLE ONLY cvault.api_keys
    ADD CONSTRAINT api_keys_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES cvault.tenants(tenant_id);
ALTER TABLE ONLY cvault.auth_events
    ADD CONSTRAINT auth_events_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES cvault.tenants(tenant_id);
ALTER TABLE ONLY cvault.devices
    ADD CONSTRAINT devices_server_fkey FOREIGN KEY (server_id, pool_id) REFERENCES platform.servers(server_id, pool_id) DEFERRABLE INITIALLY DEFERRED;
ALTER TABLE ONLY cvault.devices
    ADD CONSTRAINT devices_user_fkey FOREIGN KEY (tenant_id, user_id) REFERENCES cvault.users(tenant_id, user_id);
ALTER TABLE ONLY cvault.idempotency_keys
    ADD CONSTRAINT idempotency_keys_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES cvault.tenants(tenant_id);
ALTER TABLE ONLY cvault.outbox
    ADD CONSTRAINT outbox_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES cvault.tenants(tenant_id);
ALTER TABLE ONLY cvault.portal_links
    ADD CONSTRAINT portal_links_admin_fkey FOREIGN KEY (tenant_id, admin_id) REFERENCES cvault.tenant_admins(tenant_id, admin_id) ON DELETE CASCADE;
ALTER TABLE ONLY cvault.portal_networks
    ADD CONSTRAINT portal_networks_admin_fkey FOREIGN KEY (tenant_id, admin_id) REFERENCES cvault.tenant_admins(tenant_id, admin_id) ON DELETE CASCADE;
ALTER TABLE ONLY cvault.portal_refresh_tokens
    ADD CONSTRAINT portal_refresh_tokens_session_fkey FOREIGN KEY (tenant_id, session_id) REFERENCES cvault.portal_sessions(tenant_id, session_id) ON DELETE CASCADE;
ALTER TABLE ONLY cvault.portal_sessions
    ADD CONSTRAINT portal_sessions_admin_fkey FOREIGN KEY (tenant_id, admin_id) REFERENCES cvault.tenant_admins(tenant_id, admin_id) ON DELETE CASCADE;
ALTER TABLE ONLY cvault.refresh_tokens
    ADD CONSTRAINT refresh_tokens_user_fkey FOREIGN KEY (tenant_id, user_id) REFERENCES cvault.users(tenant_id, user_id) ON DELETE CASCADE;
ALTER TABLE ONLY cvault.sessions
    ADD CONSTRAINT sessions_device_fkey FOREIGN KEY (tenant_id, device_id) REFERENCES cvault.devices(tenant_id, device_id);
ALTER TABLE ONLY cvault.step_up_challenges
    ADD CONSTRAINT step_up_challenges_session_fkey FOREIGN KEY (tenant_id, session_id) REFERENCES cvault.portal_sessions(tenant_id, session_id) ON DELETE CASCADE;
ALTER TABLE ONLY cvault.tenant_admins
    ADD CONSTRAINT tenant_admins_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES cvault.tenants(tenant_id);
ALTER TABLE ONLY cvault.usage_daily
    ADD CONSTRAINT usage_daily_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES cvault.tenants(tenant_id);
ALTER TABLE ONLY cvault.users
    ADD CONSTRAINT users_tenant_fkey FOREIGN KEY (tenant_id) REFERENCES cvault.tenants(tenant_id);
ALTER TABLE ONLY platform.addresses
    ADD CONSTRAINT addresses_pool_fkey FOREIGN KEY (pool_id) REFERENCES platform.address_pools(pool_id);
ALTER TABLE ONLY platform.device_drops
    ADD CONSTRAINT device_drops_server_fkey FOREIGN KEY (server_id) REFERENCES platform.servers(server_id);
ALTER TABLE ONLY platform.enrol_tokens
    ADD CONSTRAINT enrol_tokens_server_fkey FOREIGN KEY (server_id) REFERENCES platform.servers(server_id);
ALTER TABLE ONLY platform.quota_leases
    ADD CONSTRAINT quota_leases_server_fkey FOREIGN KEY (server_id) REFERENCES platform.servers(server_id);
ALTER TABLE ONLY platform.servers
    ADD CONSTRAINT servers_pool_fkey FOREIGN KEY (pool_id) REFERENCES platform.address_pools(pool_id);
ALTER TABLE ONLY platform.usage_counters
    ADD CONSTRAINT usage_counters_server_fkey FOREIGN KEY (server_id) REFERENCES platform.servers(server_id);
ALTER TABLE ONLY platform.usage_windows
    ADD CONSTRAINT usage_windows_server_fkey FOREIGN KEY (server_id) REFERENCES platform.servers(server_id);
ALTER TABLE cvault.api_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.audit_log ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.auth_events ENABLE ROW LEVEL SECURITY;
CREATE POLICY closed_only ON cvault.sessions AS RESTRICTIVE FOR DELETE TO cvault_sys USING ((status = 'disconnected'::text));
ALTER TABLE cvault.devices ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.idempotency_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.outbox ENABLE ROW LEVEL SECURITY;
CREATE POLICY platform_access ON cvault.api_keys TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.audit_log TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.auth_events TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.devices TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.idempotency_keys TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.outbox TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.portal_links TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.portal_networks TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.portal_refresh_tokens TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.portal_sessions TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.refresh_tokens TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.request_logs TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.sessions TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.step_up_challenges TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.tenant_admins FOR SELECT TO cvault_sys USING (true);
CREATE POLICY platform_access ON cvault.tenants FOR SELECT TO cvault_sys USING (true);
CREATE POLICY platform_access ON cvault.usage_daily TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.usage_hourly TO cvault_sys USING (true) WITH CHECK (true);
CREATE POLICY platform_access ON cvault.users FOR SELECT TO cvault_sys USING (true);
CREATE POLICY platform_limits ON cvault.tenants FOR UPDATE TO cvault_sys USING (true) WITH CHECK (true);
ALTER TABLE cvault.portal_links ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.portal_networks ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.portal_refresh_tokens ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.portal_sessions ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.refresh_tokens ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.request_logs ENABLE ROW LEVEL SECURITY;
CREATE POLICY revoked_only ON cvault.api_keys AS RESTRICTIVE FOR DELETE TO cvault_sys USING ((revoked_at IS NOT NULL));
CREATE POLICY revoked_only ON cvault.devices AS RESTRICTIVE FOR DELETE TO cvault_sys USING ((status = 'revoked'::text));
ALTER TABLE cvault.sessions ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.step_up_challenges ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.tenant_admins ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenant_isolation ON cvault.api_keys TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.audit_log TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.auth_events TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.devices TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.idempotency_keys TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.outbox TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.portal_links TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.portal_networks TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.portal_refresh_tokens TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.portal_sessions TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.refresh_tokens TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.request_logs TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.sessions TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.step_up_challenges TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.tenant_admins TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.tenants TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.usage_daily TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.usage_hourly TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.usage_hourly_2026_11 TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.usage_hourly_2026_12 TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.usage_hourly_2027_01 TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.usage_hourly_2027_02 TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.usage_hourly_default TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
CREATE POLICY tenant_isolation ON cvault.users TO cvault_app, cvault_fn USING ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id))) WITH CHECK ((tenant_id = ( SELECT cvault.tenant_id() AS tenant_id)));
ALTER TABLE cvault.tenants ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.usage_daily ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.usage_hourly ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.usage_hourly_2026_11 ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.usage_hourly_2026_12 ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.usage_hourly_2027_01 ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.usage_hourly_2027_02 ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.usage_hourly_default ENABLE ROW LEVEL SECURITY;
ALTER TABLE cvault.users ENABLE ROW LEVEL SECURITY;
GRANT USAGE ON SCHEMA cvault TO cvault_app;
GRANT USAGE ON SCHEMA cvault TO cvault_sys;
GRANT USAGE ON SCHEMA cvault TO cvault_fn;
GRANT USAGE ON SCHEMA platform TO cvault_app;
GRANT USAGE ON SCHEMA platform TO cvault_sys;
GRANT USAGE ON SCHEMA platform TO cvault_fn;
GRANT ALL ON SCHEMA public TO cvault_owner;
REVOKE ALL ON FUNCTION cvault.enter(p_context text) FROM PUBLIC;
GRANT ALL ON FUNCTION cvault.enter(p_context text) TO cvault_app;
GRANT ALL ON FUNCTION cvault.enter(p_context text) TO cvault_sys;
REVOKE ALL ON FUNCTION cvault.tenant_id() FROM PUBLIC;
GRANT ALL ON FUNCTION cvault.tenant_id() TO cvault_app;
GRANT ALL ON FUNCTION cvault.tenant_id() TO cvault_sys;
GRANT ALL ON FUNCTION cvault.tenant_id() TO cvault_owner;
REVOKE ALL ON FUNCTION platform.allocate_address(p_pool uuid, p_device uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.allocate_address(p_pool uuid, p_device uuid) TO cvault_app;
REVOKE ALL ON FUNCTION platform.ensure_usage_partitions(p_months integer) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.ensure_usage_partitions(p_months integer) TO cvault_sys;
REVOKE ALL ON FUNCTION platform.forget_peers(p_devices uuid[]) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.forget_peers(p_devices uuid[]) TO cvault_sys;
REVOKE ALL ON FUNCTION platform.id_text(p_prefix text, p_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.id_text(p_prefix text, p_id uuid) TO cvault_app;
GRANT ALL ON FUNCTION platform.id_text(p_prefix text, p_id uuid) TO cvault_fn;
REVOKE ALL ON FUNCTION platform.list_servers() FROM PUBLIC;
GRANT ALL ON FUNCTION platform.list_servers() TO cvault_app;
GRANT ALL ON FUNCTION platform.list_servers() TO cvault_sys;
REVOKE ALL ON FUNCTION platform.move_peer(p_device uuid, p_server uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.move_peer(p_device uuid, p_server uuid) TO cvault_app;
REVOKE ALL ON FUNCTION platform.open_addresses(p_pool uuid, p_ahead integer) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.open_addresses(p_pool uuid, p_ahead integer) TO cvault_sys;
REVOKE ALL ON FUNCTION platform.peer_record_digest(p_key bytea, p_device uuid, p_tenant uuid, p_public_key bytea, p_preshared_key_hash bytea, p_ipv4 inet, p_ipv6 inet, p_generation bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.peer_record_digest(p_key bytea, p_device uuid, p_tenant uuid, p_public_key bytea, p_preshared_key_hash bytea, p_ipv4 inet, p_ipv6 inet, p_generation bigint) TO cvault_sys;
REVOKE ALL ON FUNCTION platform.place_peer(p_device uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.place_peer(p_device uuid) TO cvault_app;
REVOKE ALL ON FUNCTION platform.pool_reclaims(p_pool uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.pool_reclaims(p_pool uuid) TO cvault_app;
REVOKE ALL ON PROCEDURE platform.protect(IN p_table regclass) FROM PUBLIC;
REVOKE ALL ON FUNCTION platform.reclaim_address(p_device uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.reclaim_address(p_device uuid) TO cvault_app;
REVOKE ALL ON FUNCTION platform.register_device(p_tenant uuid, p_device uuid, p_user uuid, p_name text, p_platform text, p_public_key bytea, p_private_key_sealed bytea, p_preshared_key_sealed bytea, p_preshared_key_hash bytea, p_region text, p_seen_since timestamp with time zone, p_at timestamp with time zone) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.register_device(p_tenant uuid, p_device uuid, p_user uuid, p_name text, p_platform text, p_public_key bytea, p_private_key_sealed bytea, p_preshared_key_sealed bytea, p_preshared_key_hash bytea, p_region text, p_seen_since timestamp with time zone, p_at timestamp with time zone) TO cvault_app;
REVOKE ALL ON FUNCTION platform.register_devices(p_tenant uuid, p_region text, p_seen_since timestamp with time zone, p_at timestamp with time zone, p_devices uuid[], p_users uuid[], p_names text[], p_platforms text[], p_public_keys bytea[], p_private_keys_sealed bytea[], p_preshared_keys_sealed bytea[], p_preshared_key_hashes bytea[]) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.register_devices(p_tenant uuid, p_region text, p_seen_since timestamp with time zone, p_at timestamp with time zone, p_devices uuid[], p_users uuid[], p_names text[], p_platforms text[], p_public_keys bytea[], p_private_keys_sealed bytea[], p_preshared_keys_sealed bytea[], p_preshared_key_hashes bytea[]) TO cvault_app;
REVOKE ALL ON FUNCTION platform.restore_address(p_device uuid, p_server uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.restore_address(p_device uuid, p_server uuid) TO cvault_app;
REVOKE ALL ON FUNCTION platform.retire_peer(p_device uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.retire_peer(p_device uuid) TO cvault_app;
REVOKE ALL ON FUNCTION platform.suspend_peer(p_device uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.suspend_peer(p_device uuid) TO cvault_app;
REVOKE ALL ON FUNCTION platform.suspend_user_peer(p_device uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.suspend_user_peer(p_device uuid) TO cvault_app;
REVOKE ALL ON FUNCTION platform.take_address(p_pool uuid, p_tenant uuid, p_device uuid) FROM PUBLIC;
REVOKE ALL ON FUNCTION platform.take_free_address(p_pool uuid, p_tenant uuid, p_device uuid) FROM PUBLIC;
REVOKE ALL ON FUNCTION platform.take_free_addresses(p_pool uuid, p_tenant uuid, p_devices uuid[]) FROM PUBLIC;
REVOKE ALL ON FUNCTION platform.withdraw(p_device uuid, p_tenant uuid) FROM PUBLIC;
REVOKE ALL ON FUNCTION platform.withdraw_peer(p_device uuid) FROM PUBLIC;
REVOKE ALL ON FUNCTION platform.withdraw_unreadable_peer(p_device uuid, p_tenant uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION platform.withdraw_unreadable_peer(p_device uuid, p_tenant uuid) TO cvault_sys;
GRANT SELECT,INSERT,UPDATE ON TABLE cvault.api_keys TO cvault_app;
GRANT SELECT,DELETE ON TABLE cvault.api_keys TO cvault_sys;
GRANT UPDATE(last_used_at) ON TABLE cvault.api_keys TO cvault_sys;
GRANT SELECT,INSERT ON TABLE cvault.audit_log TO cvault_app;
GRANT SELECT,INSERT ON TABLE cvault.audit_log TO cvault_sys;
GRANT UPDATE(chain_sequence) ON TABLE cvault.audit_log TO cvault_sys;
GRANT UPDATE(chain_hash) ON TABLE cvault.audit_log TO cvault_sys;
GRANT SELECT,INSERT ON TABLE cvault.auth_events TO cvault_app;
GRANT DELETE ON TABLE cvault.auth_events TO cvault_sys;
GRANT SELECT(tenant_id) ON TABLE cvault.auth_events TO cvault_sys;
GRANT SELECT(event_id) ON TABLE cvault.auth_events TO cvault_sys;
GRANT SELECT(at) ON TABLE cvault.auth_events TO cvault_sys;
GRANT SELECT ON TABLE cvault.devices TO cvault_app;
GRANT SELECT,INSERT ON TABLE cvault.devices TO cvault_fn;
GRANT DELETE ON TABLE cvault.devices TO cvault_sys;
GRANT INSERT(tenant_id) ON TABLE cvault.devices TO cvault_app;
GRANT SELECT(tenant_id) ON TABLE cvault.devices TO cvault_sys;
GRANT INSERT(device_id) ON TABLE cvault.devices TO cvault_app;
GRANT SELECT(device_id) ON TABLE cvault.devices TO cvault_sys;
GRANT INSERT(user_id) ON TABLE cvault.devices TO cvault_app;
GRANT SELECT(user_id) ON TABLE cvault.devices TO cvault_sys;
GRANT INSERT(name),UPDATE(name) ON TABLE cvault.devices TO cvault_app;
GRANT INSERT(platform) ON TABLE cvault.devices TO cvault_app;
GRANT INSERT(public_key),UPDATE(public_key) ON TABLE cvault.devices TO cvault_app;
GRANT INSERT(private_key_sealed),UPDATE(private_key_sealed) ON TABLE cvault.devices TO cvault_app;
GRANT INSERT(preshared_key_sealed),UPDATE(preshared_key_sealed) ON TABLE cvault.devices TO cvault_app;
GRANT INSERT(preshared_key_hash),UPDATE(preshared_key_hash) ON TABLE cvault.devices TO cvault_app;
GRANT INSERT(pool_id) ON TABLE cvault.devices TO cvault_app;
GRANT UPDATE(pool_id) ON TABLE cvault.devices TO cvault_fn;
GRANT INSERT(ipv4) ON TABLE cvault.devices TO cvault_app;
GRANT UPDATE(ipv4) ON TABLE cvault.devices TO cvault_fn;
GRANT INSERT(ipv6) ON TABLE cvault.devices TO cvault_app;
GRANT UPDATE(ipv6) ON TABLE cvault.devices TO cvault_fn;
GRANT INSERT(server_id) ON TABLE cvault.devices TO cvault_app;
GRANT UPDATE(server_id) ON TABLE cvault.devices TO cvault_fn;
GRANT SELECT(server_id) ON TABLE cvault.devices TO cvault_sys;
GRANT UPDATE(placed_revision) ON TABLE cvault.devices TO cvault_fn;
GRANT UPDATE(status) ON TABLE cvault.devices TO cvault_app;
GRANT SELECT(status) ON TABLE cvault.devices TO cvault_sys;
GRANT UPDATE(last_connected_at) ON TABLE cvault.devices TO cvault_app;
GRANT SELECT(last_connected_at),UPDATE(last_connected_at) ON TABLE cvault.devices TO cvault_sys;
GRANT SELECT(last_handshake_at),UPDATE(last_handshake_at) ON TABLE cvault.devices TO cvault_sys;
GRANT INSERT(created_at) ON TABLE cvault.devices TO cvault_app;
GRANT SELECT(created_at) ON TABLE cvault.devices TO cvault_sys;
GRANT UPDATE(revoked_at) ON TABLE cvault.devices TO cvault_app;
GRANT SELECT(revoked_at) ON TABLE cvault.devices TO cvault_sys;
GRANT UPDATE(suspended) ON TABLE cvault.devices TO cvault_app;
GRANT SELECT(suspended) ON TABLE cvault.devices TO cvault_sys;
GRANT UPDATE(reclaimed) ON TABLE cvault.devices TO cvault_fn;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE cvault.idempotency_keys TO cvault_app;
GRANT DELETE ON TABLE cvault.idempotency_keys TO cvault_sys;
GRANT SELECT(tenant_id) ON TABLE cvault.idempotency_keys TO cvault_sys;
GRANT SELECT(principal) ON TABLE cvault.idempotency_keys TO cvault_sys;
GRANT SELECT(key) ON TABLE cvault.idempotency_keys TO cvault_sys;
GRANT SELECT(fingerprint) ON TABLE cvault.idempotency_keys TO cvault_sys;
GRANT SELECT(status) ON TABLE cvault.idempotency_keys TO cvault_sys;
GRANT SELECT(response_sealed) ON TABLE cvault.idempotency_keys TO cvault_sys;
GRANT SELECT(created_at) ON TABLE cvault.idempotency_keys TO cvault_sys;
GRANT SELECT,DELETE ON TABLE cvault.outbox TO cvault_sys;
GRANT DELETE ON TABLE cvault.outbox TO cvault_app;
GRANT SELECT(tenant_id),INSERT(tenant_id) ON TABLE cvault.outbox TO cvault_app;
GRANT SELECT(mail_id),INSERT(mail_id) ON TABLE cvault.outbox TO cvault_app;
GRANT INSERT(kind) ON TABLE cvault.outbox TO cvault_app;
GRANT INSERT(payload_sealed) ON TABLE cvault.outbox TO cvault_app;
GRANT UPDATE(payload_sealed) ON TABLE cvault.outbox TO cvault_sys;
GRANT INSERT(created_at) ON TABLE cvault.outbox TO cvault_app;
GRANT INSERT(expires_at) ON TABLE cvault.outbox TO cvault_app;
GRANT UPDATE(attempts) ON TABLE cvault.outbox TO cvault_sys;
GRANT INSERT(next_attempt_at) ON TABLE cvault.outbox TO cvault_app;
GRANT UPDATE(next_attempt_at) ON TABLE cvault.outbox TO cvault_sys;
GRANT SELECT(delivered_at) ON TABLE cvault.outbox TO cvault_app;
GRANT UPDATE(delivered_at) ON TABLE cvault.outbox TO cvault_sys;
GRANT SELECT(dead_at) ON TABLE cvault.outbox TO cvault_app;
GRANT UPDATE(dead_at) ON TABLE cvault.outbox TO cvault_sys;
GRANT UPDATE(last_error) ON TABLE cvault.outbox TO cvault_sys;
GRANT SELECT,INSERT,UPDATE ON TABLE cvault.portal_links TO cvault_app;
GRANT DELETE ON TABLE cvault.portal_links TO cvault_sys;
GRANT SELECT(tenant_id) ON TABLE cvault.portal_links TO cvault_sys;
GRANT SELECT(token_hash) ON TABLE cvault.portal_links TO cvault_sys;
GRANT SELECT(expires_at) ON TABLE cvault.portal_links TO cvault_sys;
GRANT SELECT,INSERT,UPDATE ON TABLE cvault.portal_networks TO cvault_app;
GRANT DELETE ON TABLE cvault.portal_networks TO cvault_sys;
GRANT SELECT(tenant_id) ON TABLE cvault.portal_networks TO cvault_sys;
GRANT SELECT(admin_id) ON TABLE cvault.portal_networks TO cvault_sys;
GRANT SELECT(network) ON TABLE cvault.portal_networks TO cvault_sys;
GRANT SELECT(last_seen_at) ON TABLE cvault.portal_networks TO cvault_sys;
GRANT SELECT,INSERT,UPDATE ON TABLE cvault.portal_refresh_tokens TO cvault_app;
GRANT DELETE ON TABLE cvault.portal_refresh_tokens TO cvault_sys;
GRANT SELECT(tenant_id) ON TABLE cvault.portal_refresh_tokens TO cvault_sys;
GRANT SELECT(token_hash) ON TABLE cvault.portal_refresh_tokens TO cvault_sys;
GRANT SELECT(expires_at) ON TABLE cvault.portal_refresh_tokens TO cvault_sys;
GRANT SELECT,INSERT,UPDATE ON TABLE cvault.portal_sessions TO cvault_app;
GRANT DELETE ON TABLE cvault.portal_sessions TO cvault_sys;
GRANT SELECT(tenant_id) ON TABLE cvault.portal_sessions TO cvault_sys;
GRANT SELECT(session_id) ON TABLE cvault.portal_sessions TO cvault_sys;
GRANT SELECT(admin_id) ON TABLE cvault.portal_sessions TO cvault_sys;
GRANT SELECT(cookie_hash) ON TABLE cvault.portal_sessions TO cvault_sys;
GRANT SELECT(created_at) ON TABLE cvault.portal_sessions TO cvault_sys;
GRANT SELECT(expires_at) ON TABLE cvault.portal_sessions TO cvault_sys;
GRANT SELECT(last_seen_at) ON TABLE cvault.portal_sessions TO cvault_sys;
GRANT SELECT(last_ip) ON TABLE cvault.portal_sessions TO cvault_sys;
GRANT SELECT(ended_at) ON TABLE cvault.portal_sessions TO cvault_sys;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE cvault.refresh_tokens TO cvault_app;
GRANT DELETE ON TABLE cvault.refresh_tokens TO cvault_sys;
GRANT SELECT(tenant_id) ON TABLE cvault.refresh_tokens TO cvault_sys;
GRANT SELECT(token_hash) ON TABLE cvault.refresh_tokens TO cvault_sys;
GRANT SELECT(expires_at) ON TABLE cvault.refresh_tokens TO cvault_sys;
GRANT SELECT,DELETE ON TABLE cvault.request_logs TO cvault_app;
GRANT INSERT,DELETE ON TABLE cvault.request_logs TO cvault_sys;
GRANT SELECT(tenant_id) ON TABLE cvault.request_logs TO cvault_sys;
GRANT SELECT(request_id) ON TABLE cvault.request_logs TO cvault_sys;
GRANT SELECT,INSERT,UPDATE ON TABLE cvault.sessions TO cvault_app;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE cvault.sessions TO cvault_sys;
GRANT SELECT,INSERT,UPDATE ON TABLE cvault.step_up_challenges TO cvault_app;
GRANT DELETE ON TABLE cvault.step_up_challenges TO cvault_sys;
GRANT SELECT(tenant_id) ON TABLE cvault.step_up_challenges TO cvault_sys;
GRANT SELECT(challenge_id) ON TABLE cvault.step_up_challenges TO cvault_sys;
GRANT SELECT(expires_at) ON TABLE cvault.step_up_challenges TO cvault_sys;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE cvault.tenant_admins TO cvault_app;
GRANT SELECT(tenant_id) ON TABLE cvault.tenant_admins TO cvault_sys;
GRANT SELECT(admin_id) ON TABLE cvault.tenant_admins TO cvault_sys;
GRANT SELECT(email) ON TABLE cvault.tenant_admins TO cvault_sys;
GRANT SELECT(role) ON TABLE cvault.tenant_admins TO cvault_sys;
GRANT SELECT(status) ON TABLE cvault.tenant_admins TO cvault_sys;
GRANT SELECT ON TABLE cvault.tenants TO cvault_app;
GRANT SELECT ON TABLE cvault.tenants TO cvault_sys;
GRANT SELECT ON TABLE cvault.tenants TO cvault_fn;
GRANT INSERT(tenant_id) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(name),UPDATE(name) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(status),UPDATE(status) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(bandwidth_limit_bytes),UPDATE(bandwidth_limit_bytes) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(user_limit),UPDATE(user_limit) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(max_devices_per_user),UPDATE(max_devices_per_user) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(whitelabel_config),UPDATE(whitelabel_config) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(public_clients),UPDATE(public_clients) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(rate_limit_per_minute),UPDATE(rate_limit_per_minute) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(data_key_version),UPDATE(data_key_version) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(data_key_sealed),UPDATE(data_key_sealed) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(created_at) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(updated_at),UPDATE(updated_at) ON TABLE cvault.tenants TO cvault_app;
GRANT UPDATE(updated_at) ON TABLE cvault.tenants TO cvault_fn;
GRANT UPDATE(deleted_at) ON TABLE cvault.tenants TO cvault_app;
GRANT UPDATE(over_limit_since) ON TABLE cvault.tenants TO cvault_sys;
GRANT INSERT(allowed_origins),UPDATE(allowed_origins) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(client_dns),UPDATE(client_dns) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(client_allowed_ips),UPDATE(client_allowed_ips) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(client_mtu),UPDATE(client_mtu) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(rate_up_bps),UPDATE(rate_up_bps) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(rate_down_bps),UPDATE(rate_down_bps) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(device_rate_up_bps),UPDATE(device_rate_up_bps) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(device_rate_down_bps),UPDATE(device_rate_down_bps) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(allow_intra_tenant),UPDATE(allow_intra_tenant) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(allow_private_destinations),UPDATE(allow_private_destinations) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(allow_smtp),UPDATE(allow_smtp) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(over_quota),UPDATE(over_quota) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(throttle_bps),UPDATE(throttle_bps) ON TABLE cvault.tenants TO cvault_app;
GRANT UPDATE(policy_revision) ON TABLE cvault.tenants TO cvault_app;
GRANT UPDATE(deleting_since) ON TABLE cvault.tenants TO cvault_app;
GRANT INSERT(user_rate_limit_per_minute),UPDATE(user_rate_limit_per_minute) ON TABLE cvault.tenants TO cvault_app;
GRANT SELECT ON TABLE cvault.usage_daily TO cvault_app;
GRANT SELECT,INSERT,UPDATE ON TABLE cvault.usage_daily TO cvault_sys;
GRANT SELECT ON TABLE cvault.usage_hourly TO cvault_app;
GRANT SELECT,INSERT,UPDATE ON TABLE cvault.usage_hourly TO cvault_sys;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE cvault.users TO cvault_app;
GRANT SELECT(tenant_id) ON TABLE cvault.users TO cvault_sys;
GRANT SELECT(tenant_id) ON TABLE cvault.users TO cvault_fn;
GRANT SELECT(user_id) ON TABLE cvault.users TO cvault_sys;
GRANT SELECT(user_id) ON TABLE cvault.users TO cvault_fn;
GRANT SELECT(status) ON TABLE cvault.users TO cvault_sys;
GRANT SELECT(status) ON TABLE cvault.users TO cvault_fn;
GRANT UPDATE(deleted_at) ON TABLE cvault.users TO cvault_fn;
GRANT SELECT(deleting_since) ON TABLE cvault.users TO cvault_sys;
GRANT SELECT,INSERT ON TABLE platform.address_pools TO cvault_sys;
GRANT SELECT ON TABLE platform.address_pools TO cvault_fn;
GRANT UPDATE(name) ON TABLE platform.address_pools TO cvault_sys;
GRANT UPDATE(next_host) ON TABLE platform.address_pools TO cvault_fn;
GRANT UPDATE(quarantine_seconds) ON TABLE platform.address_pools TO cvault_sys;
GRANT UPDATE(deleted_at) ON TABLE platform.address_pools TO cvault_sys;
GRANT UPDATE(reclaim) ON TABLE platform.address_pools TO cvault_sys;
GRANT SELECT,DELETE ON TABLE platform.addresses TO cvault_sys;
GRANT SELECT,INSERT,UPDATE ON TABLE platform.addresses TO cvault_fn;
GRANT UPDATE(state) ON TABLE platform.addresses TO cvault_sys;
GRANT UPDATE(tenant_id) ON TABLE platform.addresses TO cvault_sys;
GRANT UPDATE(device_id) ON TABLE platform.addresses TO cvault_sys;
GRANT UPDATE(released_device_id) ON TABLE platform.addresses TO cvault_sys;
GRANT UPDATE(released_at) ON TABLE platform.addresses TO cvault_sys;
GRANT SELECT,INSERT,DELETE ON TABLE platform.admin_approvals TO cvault_sys;
GRANT UPDATE(used_at) ON TABLE platform.admin_approvals TO cvault_sys;
GRANT UPDATE(used_by) ON TABLE platform.admin_approvals TO cvault_sys;
GRANT SELECT ON TABLE platform.context_keys TO cvault_fn;
GRANT SELECT,INSERT,DELETE ON TABLE platform.context_keys TO cvault_sys;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE platform.device_drops TO cvault_sys;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE platform.enrol_tokens TO cvault_sys;
GRANT SELECT,INSERT,DELETE ON TABLE platform.idempotency_keys TO cvault_sys;
GRANT UPDATE(fingerprint) ON TABLE platform.idempotency_keys TO cvault_sys;
GRANT UPDATE(status) ON TABLE platform.idempotency_keys TO cvault_sys;
GRANT UPDATE(response_sealed) ON TABLE platform.idempotency_keys TO cvault_sys;
GRANT UPDATE(created_at) ON TABLE platform.idempotency_keys TO cvault_sys;
GRANT UPDATE(kek_version) ON TABLE platform.idempotency_keys TO cvault_sys;
GRANT SELECT ON TABLE platform.installation TO cvault_sys;
GRANT SELECT,DELETE ON TABLE platform.node_changes TO cvault_sys;
GRANT INSERT ON TABLE platform.node_changes TO cvault_fn;
GRANT SELECT ON TABLE platform.peers TO cvault_sys;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE platform.peers TO cvault_fn;
GRANT SELECT,INSERT,DELETE ON TABLE platform.portal_attempts TO cvault_sys;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE platform.quota_leases TO cvault_sys;
GRANT SELECT,INSERT,UPDATE ON TABLE platform.quota_months TO cvault_sys;
GRANT SELECT,INSERT,DELETE ON TABLE platform.revoked_admin_tokens TO cvault_sys;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE platform.secrets TO cvault_sys;
GRANT SELECT,INSERT,UPDATE ON TABLE platform.servers TO cvault_sys;
GRANT SELECT,INSERT,UPDATE ON TABLE platform.servers TO cvault_fn;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE platform.usage_counters TO cvault_sys;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE platform.usage_orphans TO cvault_sys;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE platform.usage_settled TO cvault_sys;
GRANT SELECT,INSERT,DELETE ON TABLE platform.usage_windows TO cvault_sys;
