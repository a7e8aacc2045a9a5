-- A tenant that has used up what it may carry in a month: its devices leave their servers, as in a suspension, until the
-- month ends or the limit is raised.
alter table cvault.tenants add column over_limit_since timestamptz;
create index tenants_limited on cvault.tenants (tenant_id) where bandwidth_limit_bytes is not null or over_limit_since is not null;
drop index cvault.tenants_suspended;
create index tenants_closed on cvault.tenants (tenant_id) where status = 'suspended' or over_limit_since is not null;
-- the platform's word, never the tenant's
revoke insert, update on cvault.tenants from cvault_app;
grant insert (tenant_id, name, status, bandwidth_limit_bytes, user_limit, max_devices_per_user, whitelabel_config,
              rate_limit_per_minute, data_key_version, data_key_sealed, created_at, updated_at),
    update (name, status, bandwidth_limit_bytes, user_limit, max_devices_per_user, whitelabel_config,
            rate_limit_per_minute, data_key_version, data_key_sealed, updated_at, deleted_at) on cvault.tenants to cvault_app;
grant update (over_limit_since) on cvault.tenants to cvault_sys;
create policy platform_limits on cvault.tenants for update to cvault_sys using (true) with check (true);

grant create on schema platform to cvault_fn;

-- As before, with the limit.
create or replace function platform.place_peer(p_device uuid) returns bigint
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

create or replace function platform.suspend_peer(p_device uuid) returns bigint
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
    select platform.withdraw(p_device, t.tenant_id) from cvault.tenants t
    where t.tenant_id = cvault.tenant_id() and (t.status = 'suspended' or t.over_limit_since is not null)
$$;
revoke create on schema platform from cvault_fn;
