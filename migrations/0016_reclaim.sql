-- Pools that take an address back when its device disconnects. The device keeps its keys and its place on a server, and
-- gets another address when it connects again.
alter table platform.address_pools add column reclaim boolean not null default false;
grant update (reclaim) on platform.address_pools to cvault_sys;

-- has no address: what its columns say it had last
alter table cvault.devices add column reclaimed boolean not null default false;
grant update (pool_id, ipv4, ipv6, reclaimed) on cvault.devices to cvault_fn;

grant create on schema platform to cvault_fn;

-- Takes the address of a device of the current tenant into quarantine and the device off its server, if its pool says so;
-- false when it does not, or the device has none. The last statement of a disconnect: it locks the server's row.
create function platform.reclaim_address(p_device uuid) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
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

-- Whether a pool does so: tenants do not read pools.
create function platform.pool_reclaims(p_pool uuid) returns boolean
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select coalesce((select p.reclaim from platform.address_pools p where p.pool_id = p_pool), false)
$$;

-- Gives a device of the current tenant that has no address one of the server's pool. No row: the pool is exhausted. The
-- device is placed by platform.place_peer, at the end of the transaction.
create function platform.restore_address(p_device uuid, p_server uuid) returns table (ipv4 inet, ipv6 inet)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
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

-- As before; a device without an address stays off every server until it connects.
create or replace function platform.move_peer(p_device uuid, p_server uuid) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
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

alter function platform.pool_reclaims owner to cvault_fn;
alter function platform.reclaim_address owner to cvault_fn;
alter function platform.restore_address owner to cvault_fn;
revoke all on function platform.pool_reclaims, platform.reclaim_address, platform.restore_address from public;
grant execute on function platform.pool_reclaims, platform.reclaim_address, platform.restore_address to cvault_app;
revoke create on schema platform from cvault_fn;

-- Requests a minute of one user of the tenant, within what the tenant may send.
alter table cvault.tenants add column user_rate_limit_per_minute integer,
    add constraint tenants_user_rate_limit check (user_rate_limit_per_minute > 0);
grant insert (user_rate_limit_per_minute), update (user_rate_limit_per_minute) on cvault.tenants to cvault_app;

-- Tokens of staff that are worth nothing any more, until they would have expired.
create table platform.revoked_admin_tokens (
    token_id uuid not null,
    revoked_at timestamptz not null default now(),
    expires_at timestamptz not null,
    constraint revoked_admin_tokens_pkey primary key (token_id)
);
create index revoked_admin_tokens_expiry on platform.revoked_admin_tokens (expires_at);
grant select, insert, delete on platform.revoked_admin_tokens to cvault_sys;

-- Second proofs of staff: each for one operation on one object, once.
create table platform.admin_approvals (
    token_hash bytea not null,
    action text not null,
    target text not null,
    approved_by text not null,
    created_at timestamptz not null,
    expires_at timestamptz not null,
    used_at timestamptz,
    used_by text,
    constraint admin_approvals_pkey primary key (token_hash),
    constraint admin_approvals_hash_length check (octet_length(token_hash) = 32),
    constraint admin_approvals_used check ((used_at is null) = (used_by is null))
);
create index admin_approvals_expiry on platform.admin_approvals (expires_at);
grant select, insert, update (used_at, used_by), delete on platform.admin_approvals to cvault_sys;
