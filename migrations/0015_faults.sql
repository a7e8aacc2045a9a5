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
