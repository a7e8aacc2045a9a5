-- Sessions and the ledger of bytes.
create table cvault.sessions (
    tenant_id uuid not null,
    session_id uuid not null,
    device_id uuid not null,
    user_id uuid not null,
    server_id uuid not null,
    opened_by text not null,
    status text not null default 'active',
    connected_at timestamptz not null default now(),
    disconnected_at timestamptz,
    last_handshake_at timestamptz,
    rx_bytes bigint not null default 0,
    tx_bytes bigint not null default 0,
    constraint sessions_pkey primary key (tenant_id, session_id),
    constraint sessions_device_fkey foreign key (tenant_id, device_id) references cvault.devices,
    constraint sessions_opened_by check (opened_by in ('connect', 'handshake')),
    constraint sessions_status check (status in ('active', 'disconnected')),
    constraint sessions_closed check ((status = 'disconnected') = (disconnected_at is not null)),
    constraint sessions_bytes check (rx_bytes >= 0 and tx_bytes >= 0)
);
create unique index sessions_one_active on cvault.sessions (tenant_id, device_id) where status = 'active';
create index sessions_device on cvault.sessions (tenant_id, device_id, connected_at);
create index sessions_connected on cvault.sessions (tenant_id, connected_at);
-- across tenants, for the daily sums: what is open, and what was closed lately
create index sessions_open on cvault.sessions (connected_at) where status = 'active';
create index sessions_closed_at on cvault.sessions (disconnected_at) where status = 'disconnected';

-- Greatest cumulative value known of each counter: the ledger adds differences to this and nothing else.
create table platform.usage_counters (
    server_id uuid not null,
    counter_epoch uuid not null,
    device_id uuid not null,
    generation bigint not null,
    rx_bytes bigint not null,
    tx_bytes bigint not null,
    rx_packets bigint not null,
    tx_packets bigint not null,
    updated_at timestamptz not null default now(),
    constraint usage_counters_pkey primary key (server_id, counter_epoch, device_id, generation),
    constraint usage_counters_server_fkey foreign key (server_id) references platform.servers,
    constraint usage_counters_bytes check (rx_bytes >= 0 and tx_bytes >= 0)
);
create index usage_counters_device on platform.usage_counters (device_id);

create table platform.usage_windows (
    server_id uuid not null,
    counter_epoch uuid not null,
    sequence bigint not null,
    received_at timestamptz not null default now(),
    constraint usage_windows_pkey primary key (server_id, counter_epoch, sequence),
    constraint usage_windows_server_fkey foreign key (server_id) references platform.servers
);

-- Bytes of devices that no longer exist, or never did: acknowledged and kept, billed to nobody.
create table platform.usage_orphans (
    server_id uuid not null,
    device_id uuid not null,
    hour timestamptz not null,
    rx_bytes bigint not null,
    tx_bytes bigint not null,
    constraint usage_orphans_pkey primary key (server_id, device_id, hour)
);

create table cvault.usage_hourly (
    tenant_id uuid not null,
    hour timestamptz not null,
    device_id uuid not null,
    user_id uuid not null,
    server_id uuid not null,
    rx_bytes bigint not null,
    tx_bytes bigint not null,
    constraint usage_hourly_pkey primary key (tenant_id, hour, device_id, server_id),
    constraint usage_hourly_hour check (hour = date_trunc('hour', hour, 'UTC')),
    constraint usage_hourly_bytes check (rx_bytes >= 0 and tx_bytes >= 0)
) partition by range (hour);
-- across tenants, for the daily sums
create index usage_hourly_hour on cvault.usage_hourly (hour);
create table cvault.usage_hourly_default partition of cvault.usage_hourly default;

-- The guide's UsageMetrics: one row per tenant and day, derived from the hours and sessions; api_calls counted here.
create table cvault.usage_daily (
    tenant_id uuid not null,
    day date not null,
    rx_bytes bigint not null default 0,
    tx_bytes bigint not null default 0,
    connection_seconds bigint not null default 0,
    active_users integer not null default 0,
    api_calls bigint not null default 0,
    constraint usage_daily_pkey primary key (tenant_id, day),
    constraint usage_daily_tenant_fkey foreign key (tenant_id) references cvault.tenants
);

call platform.protect('cvault.sessions');
call platform.protect('cvault.usage_hourly');
call platform.protect('cvault.usage_hourly_default');
call platform.protect('cvault.usage_daily');

grant select, insert, update on cvault.sessions to cvault_app;
grant select on cvault.usage_hourly, cvault.usage_daily to cvault_app;

create policy platform_access on cvault.sessions for all to cvault_sys using (true) with check (true);
create policy platform_access on cvault.usage_hourly for all to cvault_sys using (true) with check (true);
create policy platform_access on cvault.usage_daily for all to cvault_sys using (true) with check (true);
grant select, insert, update on cvault.sessions, cvault.usage_hourly, cvault.usage_daily to cvault_sys;
grant select, insert, update on platform.usage_counters, platform.usage_orphans to cvault_sys;
grant select, insert, delete on platform.usage_windows to cvault_sys;

-- Makes the partitions of usage_hourly from this month to p_months ahead; those that exist are left alone. Runs as the
-- owner, because only the owner of a table may add a partition to it.
create function platform.ensure_usage_partitions(p_months integer) returns integer
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_month timestamp := date_trunc('month', now() at time zone 'UTC');
    v_name text;
    v_made integer := 0;
begin
    perform pg_advisory_xact_lock(731992415);
    for i in 0..least(p_months, 24) loop
        v_name := 'usage_hourly_' || to_char(v_month, 'YYYY_MM');
        if to_regclass('cvault.' || v_name) is null then
            -- without a lock on the parent: attached only when complete
            execute format('create table cvault.%I (like cvault.usage_hourly including defaults including constraints)', v_name);
            call platform.protect(('cvault.' || v_name)::regclass);
            execute format('alter table cvault.usage_hourly attach partition cvault.%I for values from (%L) to (%L)',
                v_name, v_month at time zone 'UTC', (v_month + interval '1 month') at time zone 'UTC');
            v_made := v_made + 1;
        end if;
        v_month := v_month + interval '1 month';
    end loop;
    return v_made;
end
$$;
revoke all on function platform.ensure_usage_partitions from public;
grant execute on function platform.ensure_usage_partitions to cvault_sys;
select platform.ensure_usage_partitions(3);
