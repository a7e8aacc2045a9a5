-- What a tenant's traffic may do, and how much of it: settings that reach the packet, and leases of the monthly limit.
alter table cvault.tenants
    add column rate_up_bps bigint,
    add column rate_down_bps bigint,
    add column device_rate_up_bps bigint,
    add column device_rate_down_bps bigint,
    add column allow_intra_tenant boolean not null default false,
    add column allow_private_destinations text[] not null default '{}',
    add column allow_smtp boolean not null default false,
    add column over_quota text not null default 'block',
    add column throttle_bps bigint not null default 1000000,
    -- raised by every change of what servers are told about the tenant
    add column policy_revision bigint not null default 1,
    add constraint tenants_rate_up check (rate_up_bps > 0),
    add constraint tenants_rate_down check (rate_down_bps > 0),
    add constraint tenants_device_rate_up check (device_rate_up_bps > 0),
    add constraint tenants_device_rate_down check (device_rate_down_bps > 0),
    add constraint tenants_private_destinations check (cardinality(allow_private_destinations) <= 64),
    add constraint tenants_over_quota check (over_quota in ('block', 'throttle')),
    add constraint tenants_throttle check (throttle_bps > 0);
grant insert (rate_up_bps, rate_down_bps, device_rate_up_bps, device_rate_down_bps, allow_intra_tenant,
              allow_private_destinations, allow_smtp, over_quota, throttle_bps),
    update (rate_up_bps, rate_down_bps, device_rate_up_bps, device_rate_down_bps, allow_intra_tenant,
            allow_private_destinations, allow_smtp, over_quota, throttle_bps, policy_revision) on cvault.tenants to cvault_app;

-- What was billed to a tenant in a month, UTC: the sum of its hours, kept with them in one transaction. Its row is the lock
-- under which the tenant's quota is leased; it comes after the devices and before the server.
create table platform.quota_months (
    tenant_id uuid not null,
    month date not null,
    bytes bigint not null,
    constraint quota_months_pkey primary key (tenant_id, month),
    constraint quota_months_month check (month = date_trunc('month', month::timestamp)::date),
    constraint quota_months_bytes check (bytes >= 0)
);
insert into platform.quota_months (tenant_id, month, bytes)
    select tenant_id, date_trunc('month', hour at time zone 'UTC')::date,
           least(sum(rx_bytes::numeric + tx_bytes), 9223372036854775807)::bigint
    from cvault.usage_hourly group by 1, 2;

-- How far a server may let one life of a device's counters go. Cumulative: telling it twice grants nothing twice. The quota is
-- never exceeded because what was billed and what is leased beyond that stay within it together.
create table platform.quota_leases (
    tenant_id uuid not null,
    server_id uuid not null,
    counter_epoch uuid not null,
    device_id uuid not null,
    generation bigint not null,
    -- of rx + tx of the counter
    until_bytes bigint not null,
    -- raised by every grant: an agent that repeats the newest one may give the rest of it back
    sequence bigint not null default 1,
    granted_at timestamptz not null default now(),
    constraint quota_leases_pkey primary key (tenant_id, server_id, counter_epoch, device_id, generation),
    constraint quota_leases_server_fkey foreign key (server_id) references platform.servers,
    constraint quota_leases_until check (until_bytes >= 0)
);
create index quota_leases_server on platform.quota_leases (server_id);

-- Packets of a device that its server has dropped, by reason, since the server's tunnel process started.
create table platform.device_drops (
    server_id uuid not null,
    device_id uuid not null,
    generation bigint not null,
    drops jsonb not null,
    reported_at timestamptz not null,
    constraint device_drops_pkey primary key (server_id, device_id),
    constraint device_drops_server_fkey foreign key (server_id) references platform.servers
);

grant select, insert, update on platform.quota_months, platform.device_drops to cvault_sys;
grant select, insert, update, delete on platform.quota_leases to cvault_sys;
