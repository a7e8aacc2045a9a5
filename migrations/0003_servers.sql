-- Address pools and their addresses, servers with their desired state, enrolment tokens.
create table platform.address_pools (
    pool_id uuid not null,
    name text not null,
    ipv4 cidr not null,
    ipv6 cidr not null,
    -- never-used host numbers begin here; taken in blocks. 0 is the network, 1 the servers, the last the broadcast.
    next_host bigint not null default 2,
    quarantine_seconds integer not null default 60,
    created_at timestamptz not null default now(),
    constraint address_pools_pkey primary key (pool_id),
    constraint address_pools_name_unique unique (name),
    constraint address_pools_name_length check (char_length(name) between 1 and 64),
    constraint address_pools_families check (family(ipv4) = 4 and family(ipv6) = 6),
    constraint address_pools_ipv4_size check (masklen(ipv4) between 8 and 29),
    constraint address_pools_ipv6_size check (masklen(ipv6) between 48 and 96),
    constraint address_pools_quarantine check (quarantine_seconds between 0 and 604800),
    constraint address_pools_ipv4_overlap exclude using gist (ipv4 inet_ops with &&),
    constraint address_pools_ipv6_overlap exclude using gist (ipv6 inet_ops with &&)
);

-- One row for each host number ever handed out.
create table platform.addresses (
    pool_id uuid not null,
    host bigint not null,
    state text not null,
    tenant_id uuid,
    device_id uuid,
    -- quarantine ends when every server this device was ever on has acknowledged its removal, and the time is over
    released_device_id uuid,
    released_at timestamptz,
    constraint addresses_pkey primary key (pool_id, host),
    constraint addresses_pool_fkey foreign key (pool_id) references platform.address_pools,
    constraint addresses_device_unique unique (device_id),
    constraint addresses_state check (state in ('free', 'allocated', 'quarantine')),
    constraint addresses_owner check ((state = 'allocated') = (device_id is not null) and (device_id is null) = (tenant_id is null))
);
create index addresses_free on platform.addresses (pool_id, released_at nulls first, host) where state = 'free';
create index addresses_quarantine on platform.addresses (pool_id, released_at) where state = 'quarantine';

create table platform.servers (
    server_id uuid not null,
    name text not null,
    region text not null,
    transport text not null default 'agent',
    public_ip inet not null,
    endpoint_port integer not null default 51820,
    pool_id uuid not null,
    capacity integer not null default 65000,
    status text not null default 'active',
    public_key bytea,
    -- SHA-256 of the agent's TLS key; NULL until enrolled
    identity_pin bytea,
    -- desired state
    revision bigint not null default 0,
    peer_count bigint not null default 0,
    digest numeric(39, 0) not null default 0,
    digest_key bytea not null,
    -- acknowledged state
    acked_revision bigint not null default 0,
    acked_digest numeric(39, 0),
    acked_at timestamptz,
    -- the session that said so: within one, the acknowledged revision only grows
    acked_session bigint,
    session_epoch bigint not null default 0,
    instance_id uuid,
    -- the instance before: one that comes back after it was replaced was alive all the time
    replaced_instance_id uuid,
    last_seen_at timestamptz,
    health jsonb not null default '{}',
    created_at timestamptz not null default now(),
    constraint servers_pkey primary key (server_id),
    constraint servers_pool_fkey foreign key (pool_id) references platform.address_pools,
    constraint servers_name_length check (char_length(name) between 1 and 64),
    constraint servers_region_form check (region ~ '^[a-z0-9][a-z0-9-]{0,49}$'),
    constraint servers_transport check (transport in ('agent', 'ssh')),
    constraint servers_endpoint_port check (endpoint_port between 1 and 65535),
    constraint servers_capacity check (capacity between 1 and 65533),
    constraint servers_status check (status in ('active', 'draining', 'maintenance', 'offline', 'removed')),
    constraint servers_public_key_length check (octet_length(public_key) = 32),
    constraint servers_identity_pin_length check (octet_length(identity_pin) = 32),
    constraint servers_identity_pin_unique unique (identity_pin),
    constraint servers_digest_key_length check (octet_length(digest_key) = 32),
    constraint servers_digest_range check (digest >= 0 and digest < 340282366920938463463374607431768211456),
    -- a removed server can never again open a Watch
    constraint servers_removed check (status <> 'removed' or identity_pin is null)
);
create unique index servers_name_unique on platform.servers (name) where status <> 'removed';
create unique index servers_endpoint_unique on platform.servers (public_ip, endpoint_port) where status <> 'removed';

create table platform.enrol_tokens (
    token_id uuid not null,
    server_id uuid not null,
    secret_hash bytea not null,
    expires_at timestamptz not null,
    used_at timestamptz,
    used_pin bytea,
    created_at timestamptz not null default now(),
    constraint enrol_tokens_pkey primary key (token_id),
    constraint enrol_tokens_server_fkey foreign key (server_id) references platform.servers,
    constraint enrol_tokens_pin_length check (octet_length(used_pin) = 32),
    constraint enrol_tokens_secret_length check (octet_length(secret_hash) = 32),
    constraint enrol_tokens_used check ((used_at is null) = (used_pin is null))
);

grant select, insert, update (name, quarantine_seconds) on platform.address_pools to cvault_sys;
grant select, update (state, tenant_id, device_id, released_device_id, released_at) on platform.addresses to cvault_sys;
grant select, insert, update on platform.servers, platform.enrol_tokens to cvault_sys;
grant select, update (next_host) on platform.address_pools to cvault_fn;
grant select, insert, update on platform.addresses, platform.servers to cvault_fn;
