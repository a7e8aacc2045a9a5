-- Operations of platform staff over HTTP: kept answers of their writes, pools that can be deleted, the audit log across tenants.

-- Idempotency-Key of writes that belong to no tenant. Answers are sealed with the key-encryption key: they may hold tokens.
create table platform.idempotency_keys (
    principal text not null,
    key text not null,
    fingerprint bytea not null,
    status smallint,
    response_sealed bytea,
    created_at timestamptz not null default now(),
    constraint idempotency_keys_pkey primary key (principal, key),
    constraint idempotency_keys_key_length check (char_length(key) between 1 and 255)
);
grant select, insert, delete, update (fingerprint, status, response_sealed, created_at) on platform.idempotency_keys to cvault_sys;

-- Staff's writes to tenants are kept beside the tenant's own, in the tenant's transaction. Their keys are unique across tenants,
-- because the request that makes a tenant has none yet.
create unique index idempotency_keys_staff on cvault.idempotency_keys (principal, key) where principal like 'admin:%';
grant select (tenant_id, principal, key, fingerprint, status, response_sealed) on cvault.idempotency_keys to cvault_sys;

-- A pool that was ever used stays, because devices that are gone name it; its prefixes may be used again.
alter table platform.address_pools add column deleted_at timestamptz,
    drop constraint address_pools_name_unique,
    drop constraint address_pools_ipv4_overlap,
    drop constraint address_pools_ipv6_overlap,
    add constraint address_pools_ipv4_overlap exclude using gist (ipv4 inet_ops with &&) where (deleted_at is null),
    add constraint address_pools_ipv6_overlap exclude using gist (ipv6 inet_ops with &&) where (deleted_at is null);
create unique index address_pools_name_unique on platform.address_pools (name) where deleted_at is null;
grant update (deleted_at) on platform.address_pools to cvault_sys;
grant delete on platform.addresses to cvault_sys;
create index servers_pool on platform.servers (pool_id) where status <> 'removed';

-- Newest first across tenants. Ids are UUIDv7, so that the index grows at its end.
create index audit_log_id on cvault.audit_log (audit_id);
