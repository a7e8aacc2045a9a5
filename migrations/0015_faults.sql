-- A tenant that is being deleted stays suspended until its last row is erased; nothing opens it again.
alter table cvault.tenants
    add column deleting_since timestamptz,
    add constraint tenants_deleting check (deleting_since is null or status in ('suspended', 'deleted'));
create index tenants_deleting on cvault.tenants (deleting_since) where deleting_since is not null and status <> 'deleted';
grant update (deleting_since) on cvault.tenants to cvault_app;
-- its mails, sent or not
grant delete on cvault.outbox to cvault_app;

-- Trimming of more that would grow without bound.
grant delete on platform.device_drops, platform.enrol_tokens, platform.usage_orphans, platform.usage_settled to cvault_sys;
create index device_drops_reported on platform.device_drops (reported_at);
create index enrol_tokens_expires on platform.enrol_tokens (expires_at);
create index usage_orphans_hour on platform.usage_orphans (hour);
create index usage_settled_nothing on platform.usage_settled (device_id) where rx_bytes = 0 and tx_bytes = 0;
grant delete on cvault.api_keys to cvault_sys;
create policy revoked_only on cvault.api_keys as restrictive for delete to cvault_sys using (revoked_at is not null);
create index api_keys_revoked on cvault.api_keys (revoked_at) where revoked_at is not null;

-- As before; the server's row before the peer's, as whatever places or moves a device locks them.
grant create on schema platform to cvault_fn;
create or replace function platform.withdraw(p_device uuid, p_tenant uuid) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
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
revoke create on schema platform from cvault_fn;
