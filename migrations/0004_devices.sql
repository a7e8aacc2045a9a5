-- Devices, the peers each server should run, the log of changes, and the functions through which a tenant's transaction
-- touches shared infrastructure. These functions re-check that the device is the tenant's own.
create table cvault.devices (
    tenant_id uuid not null,
    device_id uuid not null,
    user_id uuid not null,
    name text not null,
    platform text,
    public_key bytea not null,
    -- AES-256-GCM under the tenant's data key; NULL when the client made the key pair, or after revocation
    private_key_sealed bytea,
    preshared_key_sealed bytea,
    preshared_key_hash bytea not null default decode(repeat('00', 32), 'hex'),
    pool_id uuid not null,
    ipv4 inet not null,
    ipv6 inet not null,
    server_id uuid not null,
    -- revision of the server at which it was placed there: acknowledged means active
    placed_revision bigint not null default 0,
    status text not null default 'active',
    last_connected_at timestamptz,
    -- by the receiver's clock: when the report that told of it arrived, minus the agent's ages
    last_handshake_at timestamptz,
    created_at timestamptz not null default now(),
    revoked_at timestamptz,
    constraint devices_pkey primary key (tenant_id, device_id),
    constraint devices_user_fkey foreign key (tenant_id, user_id) references cvault.users,
    constraint devices_pool_fkey foreign key (pool_id) references platform.address_pools,
    constraint devices_server_fkey foreign key (server_id) references platform.servers,
    constraint devices_name_length check (char_length(name) between 1 and 255),
    constraint devices_platform_length check (char_length(platform) between 1 and 32),
    constraint devices_families check (family(ipv4) = 4 and family(ipv6) = 6),
    constraint devices_public_key_length check (octet_length(public_key) = 32),
    constraint devices_preshared_key_hash_length check (octet_length(preshared_key_hash) = 32),
    constraint devices_status check (status in ('active', 'revoked')),
    constraint devices_revoked check ((status = 'revoked') = (revoked_at is not null)),
    constraint devices_keys_destroyed check (status = 'active' or (private_key_sealed is null and preshared_key_sealed is null))
);
create index devices_user on cvault.devices (tenant_id, user_id, created_at) where status = 'active';
-- across tenants a key is unique by peers_public_key_device_unique, which no tenant can see
create unique index devices_tenant_public_key on cvault.devices (tenant_id, public_key) where status = 'active';

call platform.protect('cvault.devices');
-- Nobody may write a preshared key yet: one that does not open would keep everything from its server. Whoever makes
-- them has to check the seal before the peer is placed.
grant select, insert (tenant_id, device_id, user_id, name, platform, public_key, private_key_sealed, pool_id, ipv4, ipv6,
                      server_id, created_at),
    update (name, private_key_sealed, status, last_connected_at, revoked_at) on cvault.devices to cvault_app;
grant select, update (server_id, placed_revision) on cvault.devices to cvault_fn;
create policy platform_access on cvault.devices for all to cvault_sys using (true) with check (true);
grant select (tenant_id, device_id, user_id, status, server_id, last_connected_at, last_handshake_at, created_at),
    update (last_connected_at, last_handshake_at) on cvault.devices to cvault_sys;

-- What each server should run (removed_revision is null), and what it once ran (for the last counters).
create table platform.peers (
    server_id uuid not null,
    device_id uuid not null,
    tenant_id uuid not null,
    user_id uuid not null,
    public_key bytea not null,
    preshared_key_sealed bytea,
    preshared_key_hash bytea not null,
    ipv4 inet not null,
    ipv6 inet not null,
    -- the revision that added it: identifies its counters
    generation bigint not null,
    removed_revision bigint,
    constraint peers_pkey primary key (server_id, device_id),
    constraint peers_server_fkey foreign key (server_id) references platform.servers,
    constraint peers_families check (family(ipv4) = 4 and family(ipv6) = 6),
    constraint peers_public_key_length check (octet_length(public_key) = 32)
);
create index peers_device on platform.peers (device_id);
-- what a server must expect to lose
create index peers_removed on platform.peers (server_id, removed_revision) where removed_revision is not null;
-- what a delta from an older revision has to bring
create index peers_generation on platform.peers (server_id, generation) where removed_revision is null;
create unique index peers_public_key_unique on platform.peers (server_id, public_key) where removed_revision is null;
create unique index peers_ipv4_unique on platform.peers (server_id, ipv4) where removed_revision is null;
create unique index peers_ipv6_unique on platform.peers (server_id, ipv6) where removed_revision is null;
-- an address belongs to one device wherever it is
create unique index peers_ipv4_device_unique on platform.peers (ipv4) where removed_revision is null;
-- a key is one device's on the whole platform (guide: public_key unique)
create unique index peers_public_key_device_unique on platform.peers (public_key) where removed_revision is null;

create table platform.node_changes (
    server_id uuid not null,
    revision bigint not null,
    op text not null,
    device_id uuid not null,
    public_key bytea not null,
    at timestamptz not null default now(),
    constraint node_changes_pkey primary key (server_id, revision),
    constraint node_changes_server_fkey foreign key (server_id) references platform.servers,
    constraint node_changes_op check (op in ('upsert', 'remove'))
);
grant select on platform.peers to cvault_sys;
grant select, delete on platform.node_changes to cvault_sys;
grant select, insert, update on platform.peers to cvault_fn;
grant insert on platform.node_changes to cvault_fn;

grant create on schema platform to cvault_fn;

-- The 128-bit value of one peer record: see node-agent/protocol/src/digest.rs, which computes the same.
create function platform.peer_record_digest(
    p_key bytea, p_device uuid, p_tenant uuid, p_public_key bytea, p_preshared_key_hash bytea,
    p_ipv4 inet, p_ipv6 inet, p_generation bigint
) returns numeric
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
    select ('x' || substr(h, 1, 8))::bit(32)::bigint::numeric * 79228162514264337593543950336
         + ('x' || substr(h, 9, 8))::bit(32)::bigint::numeric * 18446744073709551616
         + ('x' || substr(h, 17, 8))::bit(32)::bigint::numeric * 4294967296
         + ('x' || substr(h, 25, 8))::bit(32)::bigint::numeric
    from (
        select encode(sha256(p_key || sha256(p_key || uuid_send(p_device) || uuid_send(p_tenant) || p_public_key
            || p_preshared_key_hash || substring(inet_send(p_ipv4) from 5) || substring(inet_send(p_ipv6) from 5)
            || int8send(p_generation))), 'hex') as h
    ) as record
$$;
revoke all on function platform.peer_record_digest from public;
grant execute on function platform.peer_record_digest to cvault_fn, cvault_sys;

-- Takes a free address of a pool for a device; NULL when none is free. Rows that another transaction holds are skipped.
-- Never-used numbers come first, then the one released longest ago.
create function platform.take_free_address(p_pool uuid, p_tenant uuid, p_device uuid) returns bigint
language sql
set search_path = pg_catalog, pg_temp
as $$
    update platform.addresses a
        set state = 'allocated', tenant_id = p_tenant, device_id = p_device,
            released_device_id = null
        where (a.pool_id, a.host) = (
            select f.pool_id, f.host from platform.addresses f
            where f.pool_id = p_pool and f.state = 'free'
            order by f.released_at nulls first, f.host
            limit 1 for update skip locked)
        returning a.host
$$;

-- Takes an address of the pool for a device of the current tenant. When the free list is empty, a block of 64 never-used
-- host numbers is opened, so that the pool's row is locked once in 64 registrations. No row: the pool is exhausted.
create function platform.allocate_address(p_pool uuid, p_device uuid) returns table (ipv4 inet, ipv6 inet)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_tenant constant uuid := cvault.tenant_id();
    v_pool platform.address_pools;
    v_host bigint;
    v_last bigint;
begin
    if v_tenant is null then
        raise insufficient_privilege using message = 'no tenant context';
    end if;
    v_host := platform.take_free_address(p_pool, v_tenant, p_device);
    if v_host is null then
        select * into v_pool from platform.address_pools p where p.pool_id = p_pool for no key update;
        -- whoever held the lock before may have opened a block meanwhile
        v_host := platform.take_free_address(p_pool, v_tenant, p_device);
        v_last := (1::bigint << (32 - masklen(v_pool.ipv4))) - 2;
        if v_host is null and v_pool.next_host <= v_last then
            insert into platform.addresses (pool_id, host, state)
                select p_pool, h, 'free' from generate_series(v_pool.next_host, least(v_pool.next_host + 63, v_last)) as h;
            update platform.address_pools p set next_host = least(v_pool.next_host + 64, v_last + 1)
                where p.pool_id = p_pool;
            v_host := platform.take_free_address(p_pool, v_tenant, p_device);
        end if;
    end if;
    if v_host is null then
        return;
    end if;
    select * into v_pool from platform.address_pools p where p.pool_id = p_pool;
    return query select host(v_pool.ipv4::inet + v_host)::inet, host(v_pool.ipv6::inet + v_host)::inet;
end
$$;

-- Puts a device of the current tenant on its server: the last statement of a registration, because it locks the server's
-- row until COMMIT. Revision, count, digest, peer and change row move together. The device's row is the tenant's own
-- word: its addresses must be those that were allocated to it in the server's pool.
create function platform.place_peer(p_device uuid) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
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

-- Takes a device of the current tenant off its server. NULL when it was not there.
create function platform.withdraw_peer(p_device uuid) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_peer platform.peers;
    v_revision bigint;
begin
    select p.* into v_peer from platform.peers p
        where p.device_id = p_device and p.tenant_id = cvault.tenant_id() and p.removed_revision is null
        for update;
    if not found then
        return null;
    end if;
    select s.revision + 1 into v_revision from platform.servers s where s.server_id = v_peer.server_id
        for no key update;
    update platform.peers p set removed_revision = v_revision, preshared_key_sealed = null
        where p.server_id = v_peer.server_id and p.device_id = p_device;
    update platform.servers s
        set revision = v_revision, peer_count = s.peer_count - 1,
            digest = (s.digest - platform.peer_record_digest(s.digest_key, p_device, v_peer.tenant_id, v_peer.public_key,
                v_peer.preshared_key_hash, v_peer.ipv4, v_peer.ipv6, v_peer.generation)
                + 340282366920938463463374607431768211456) % 340282366920938463463374607431768211456
        where s.server_id = v_peer.server_id;
    insert into platform.node_changes (server_id, revision, op, device_id, public_key)
        values (v_peer.server_id, v_revision, 'remove', p_device, v_peer.public_key);
    return v_revision;
end
$$;

-- Moves a device of the current tenant to another server of the same pool; it keeps its addresses. Returns the new
-- server's revision.
create function platform.move_peer(p_device uuid, p_server uuid) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
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

-- Takes a revoked device of the current tenant off its server and puts its address into quarantine, until every server
-- it was on has acknowledged. Returns the server's revision; NULL when the device was on no server.
create function platform.retire_peer(p_device uuid) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_device cvault.devices;
    v_revision bigint;
begin
    select * into v_device from cvault.devices d
        where d.tenant_id = cvault.tenant_id() and d.device_id = p_device and d.status = 'revoked';
    if not found then
        raise no_data_found using message = 'no such revoked device';
    end if;
    v_revision := platform.withdraw_peer(p_device);
    update platform.addresses a
        set state = 'quarantine', tenant_id = null, device_id = null, released_device_id = p_device,
            released_at = now()
        where a.device_id = p_device and a.tenant_id = v_device.tenant_id;
    return v_revision;
end
$$;

-- What a tenant may know of the shared servers.
create function platform.list_servers() returns table (
    server_id uuid, name text, region text, public_ip inet, endpoint_port integer, public_key bytea, pool_id uuid,
    pool_ipv4 cidr, capacity integer, peer_count bigint, status text, enrolled boolean, last_seen_at timestamptz,
    revision bigint, acked_revision bigint)
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select s.server_id, s.name, s.region, s.public_ip, s.endpoint_port, s.public_key, s.pool_id, p.ipv4, s.capacity,
           s.peer_count, s.status, s.identity_pin is not null, s.last_seen_at, s.revision, s.acked_revision
    from platform.servers s join platform.address_pools p using (pool_id)
    where s.status <> 'removed'
    order by s.region, s.name
$$;

alter function platform.peer_record_digest owner to cvault_fn;
alter function platform.take_free_address owner to cvault_fn;
alter function platform.allocate_address owner to cvault_fn;
alter function platform.place_peer owner to cvault_fn;
alter function platform.withdraw_peer owner to cvault_fn;
alter function platform.retire_peer owner to cvault_fn;
alter function platform.move_peer owner to cvault_fn;
alter function platform.list_servers owner to cvault_fn;
revoke all on function platform.take_free_address, platform.allocate_address, platform.place_peer, platform.withdraw_peer,
    platform.move_peer, platform.retire_peer, platform.list_servers from public;
grant execute on function platform.allocate_address, platform.place_peer, platform.move_peer,
    platform.retire_peer, platform.list_servers to cvault_app;
grant execute on function platform.list_servers to cvault_sys;
revoke create on schema platform from cvault_fn;
