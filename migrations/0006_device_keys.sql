-- Preshared keys on request, and new keys for a device.
grant insert (preshared_key_sealed, preshared_key_hash),
    update (public_key, preshared_key_sealed, preshared_key_hash) on cvault.devices to cvault_app;
-- a hash without a key would keep the server's digest from ever agreeing
alter table cvault.devices add constraint devices_preshared_key_hashed
    check (status <> 'active' or (preshared_key_sealed is null) = (preshared_key_hash = decode(repeat('00', 32), 'hex')));

grant create on schema platform to cvault_fn;

-- Takes a device off the server it is on, whoever's it is: for the functions below. NULL when it is on none.
create function platform.withdraw(p_device uuid, p_tenant uuid) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    v_peer platform.peers;
    v_revision bigint;
begin
    select p.* into v_peer from platform.peers p
        where p.device_id = p_device and p.tenant_id = p_tenant and p.removed_revision is null
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
revoke all on function platform.withdraw from public;
alter function platform.withdraw owner to cvault_fn;

create or replace function platform.withdraw_peer(p_device uuid) returns bigint
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
    select platform.withdraw(p_device, cvault.tenant_id())
$$;

-- A preshared key that does not open, or is not the one its hash tells, would keep every change from its server: the
-- device goes instead. Its next key rotation brings it back. The tenant is named so that the row cannot have been reused.
create function platform.withdraw_unreadable_peer(p_device uuid, p_tenant uuid) returns bigint
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
    select platform.withdraw(p_device, p_tenant)
$$;
revoke all on function platform.withdraw_unreadable_peer from public;
alter function platform.withdraw_unreadable_peer owner to cvault_fn;
grant execute on function platform.withdraw_unreadable_peer to cvault_sys;

revoke create on schema platform from cvault_fn;
