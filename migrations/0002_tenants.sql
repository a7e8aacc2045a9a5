-- Tenants and their people: API keys, users, refresh tokens, the audit log and idempotency keys.
create table cvault.tenants (
    tenant_id uuid not null,
    name text not null,
    status text not null default 'active',
    bandwidth_limit_bytes bigint,
    user_limit integer,
    max_devices_per_user integer not null default 5,
    whitelabel_config jsonb not null default '{}',
    public_clients boolean not null default false,
    rate_limit_per_minute integer,
    data_key_version smallint not null,
    data_key_sealed bytea,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    deleted_at timestamptz,
    constraint tenants_pkey primary key (tenant_id),
    constraint tenants_name_length check (char_length(name) between 1 and 255),
    constraint tenants_status check (status in ('active', 'suspended', 'trial', 'deleted')),
    constraint tenants_bandwidth_limit check (bandwidth_limit_bytes >= 0),
    constraint tenants_user_limit check (user_limit >= 0),
    constraint tenants_max_devices check (max_devices_per_user between 0 and 1000),
    constraint tenants_rate_limit check (rate_limit_per_minute > 0),
    -- deleting a tenant destroys its data key
    constraint tenants_data_key check ((data_key_sealed is null) = (status = 'deleted'))
);

create table cvault.api_keys (
    tenant_id uuid not null,
    api_key_id uuid not null,
    name text not null default 'default',
    -- the public part, 'cvk_…', is found by its hash; the secret only as HMAC-SHA-256 with a pepper
    key_text text not null,
    secret_hash bytea not null,
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz,
    constraint api_keys_pkey primary key (tenant_id, api_key_id),
    constraint api_keys_tenant_fkey foreign key (tenant_id) references cvault.tenants,
    constraint api_keys_secret_hash_length check (octet_length(secret_hash) = 32),
    constraint api_keys_tenant_key_text unique (tenant_id, key_text)
);
-- The lookup before a tenant is known. Unique across tenants, so that none can claim another's key; it tells nothing
-- to somebody who does not know the key already.
create unique index api_keys_key_text on cvault.api_keys (key_text);

create table cvault.users (
    tenant_id uuid not null,
    user_id uuid not null,
    external_user_id text,
    email text,
    password_hash text,
    status text not null default 'active',
    created_at timestamptz not null default now(),
    constraint users_pkey primary key (tenant_id, user_id),
    constraint users_tenant_fkey foreign key (tenant_id) references cvault.tenants,
    constraint users_email_unique unique (tenant_id, email),
    constraint users_external_id_unique unique (tenant_id, external_user_id),
    constraint users_email_lower check (email = lower(email) and char_length(email) <= 255),
    constraint users_external_id_length check (char_length(external_user_id) between 1 and 255),
    constraint users_identified check (email is not null or external_user_id is not null),
    constraint users_status check (status in ('active', 'disabled'))
);

create table cvault.refresh_tokens (
    tenant_id uuid not null,
    token_hash bytea not null,
    family_id uuid not null,
    user_id uuid not null,
    issued_at timestamptz not null default now(),
    expires_at timestamptz not null,
    used_at timestamptz,
    revoked_at timestamptz,
    constraint refresh_tokens_pkey primary key (tenant_id, token_hash),
    constraint refresh_tokens_user_fkey foreign key (tenant_id, user_id) references cvault.users on delete cascade,
    constraint refresh_tokens_hash_length check (octet_length(token_hash) = 32)
);
create index refresh_tokens_family on cvault.refresh_tokens (tenant_id, family_id);
create index refresh_tokens_user on cvault.refresh_tokens (tenant_id, user_id);

-- Every authentication attempt (guide §3.6).
create table cvault.auth_events (
    tenant_id uuid not null,
    event_id uuid not null,
    at timestamptz not null default now(),
    kind text not null,
    outcome text not null,
    user_id uuid,
    client_ip inet,
    request_id uuid,
    constraint auth_events_pkey primary key (tenant_id, event_id),
    constraint auth_events_tenant_fkey foreign key (tenant_id) references cvault.tenants,
    constraint auth_events_kind check (kind in ('register', 'login', 'refresh', 'logout')),
    constraint auth_events_outcome check (outcome in ('success', 'failure', 'reuse', 'limited'))
);

-- Append-only. Rows enter inside the business transaction; a job chains them (sequence, hash) afterwards, so that the
-- chain never serialises a tenant's writes.
create table cvault.audit_log (
    tenant_id uuid not null,
    audit_id uuid not null,
    at timestamptz not null default now(),
    actor text not null,
    action text not null,
    target text not null,
    details jsonb not null default '{}',
    request_id uuid,
    chain_sequence bigint,
    chain_hash bytea,
    constraint audit_log_pkey primary key (tenant_id, audit_id),
    constraint audit_log_chain_unique unique (tenant_id, chain_sequence),
    constraint audit_log_chained check ((chain_sequence is null) = (chain_hash is null))
);
create index audit_log_unchained on cvault.audit_log (tenant_id, audit_id) where chain_sequence is null;

create table cvault.idempotency_keys (
    tenant_id uuid not null,
    principal text not null,
    key text not null,
    fingerprint bytea not null,
    status smallint,
    response_sealed bytea,
    created_at timestamptz not null default now(),
    constraint idempotency_keys_pkey primary key (tenant_id, principal, key),
    constraint idempotency_keys_tenant_fkey foreign key (tenant_id) references cvault.tenants,
    constraint idempotency_keys_key_length check (char_length(key) between 1 and 255)
);

call platform.protect('cvault.tenants');
call platform.protect('cvault.api_keys');
call platform.protect('cvault.users');
call platform.protect('cvault.refresh_tokens');
call platform.protect('cvault.auth_events');
call platform.protect('cvault.audit_log');
call platform.protect('cvault.idempotency_keys');

grant select, insert, update on cvault.tenants, cvault.api_keys to cvault_app;
grant select, insert, update, delete on cvault.users, cvault.refresh_tokens, cvault.idempotency_keys to cvault_app;
grant select, insert on cvault.auth_events, cvault.audit_log to cvault_app;

-- What the platform itself needs across tenants: finding a key's tenant, listing tenants, chaining the audit log.
create policy platform_access on cvault.tenants for select to cvault_sys using (true);
create policy platform_access on cvault.api_keys for all to cvault_sys using (true) with check (true);
create policy platform_access on cvault.audit_log for all to cvault_sys using (true) with check (true);
create policy platform_access on cvault.idempotency_keys for all to cvault_sys using (true) with check (true);
create policy platform_access on cvault.refresh_tokens for all to cvault_sys using (true) with check (true);
grant select on cvault.tenants to cvault_sys;
grant select, update (last_used_at) on cvault.api_keys to cvault_sys;
grant select, insert, update (chain_sequence, chain_hash) on cvault.audit_log to cvault_sys;
grant select (created_at), delete on cvault.idempotency_keys to cvault_sys;
grant select (expires_at), delete on cvault.refresh_tokens to cvault_sys;
