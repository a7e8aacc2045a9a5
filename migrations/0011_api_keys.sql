-- API keys with scopes and a grace period, what a tenant sets for its clients, and users that are disabled or deleted.
alter table cvault.api_keys
    add column scopes text[] not null default '{auth,users,usage,devices}',
    -- the secret before the last regeneration, as long as it still works
    add column previous_secret_hash bytea,
    add column previous_valid_until timestamptz,
    add column regenerated_at timestamptz,
    add constraint api_keys_name_length check (char_length(name) between 1 and 255),
    add constraint api_keys_scopes check (scopes <@ '{auth,users,usage,devices}' and cardinality(scopes) between 1 and 4),
    add constraint api_keys_previous_secret check (
        (previous_secret_hash is null) = (previous_valid_until is null) and octet_length(previous_secret_hash) = 32);

alter table cvault.tenants
    -- where browsers may call from, as they write it in `Origin`
    add column allowed_origins text[] not null default '{}',
    -- written into device configurations instead of the platform's; as types that hold nothing but addresses
    add column client_dns inet[],
    add column client_allowed_ips cidr[],
    add column client_mtu integer,
    add constraint tenants_allowed_origins check (cardinality(allowed_origins) <= 100),
    add constraint tenants_client_dns check (cardinality(client_dns) between 1 and 4),
    add constraint tenants_client_allowed_ips check (cardinality(client_allowed_ips) between 1 and 32),
    add constraint tenants_client_mtu check (client_mtu between 1280 and 1500);
grant insert (public_clients, allowed_origins, client_dns, client_allowed_ips, client_mtu),
    update (public_clients, allowed_origins, client_dns, client_allowed_ips, client_mtu) on cvault.tenants to cvault_app;

-- A deleted user keeps its row, empty, because the ledger of its devices stays.
alter table cvault.users
    add column deleted_at timestamptz,
    drop constraint users_status,
    add constraint users_status check (status in ('active', 'disabled', 'deleted')),
    drop constraint users_identified,
    add constraint users_identified check (
        case status when 'deleted' then email is null and external_user_id is null and password_hash is null
        else email is not null or external_user_id is not null end),
    add constraint users_deleted check ((status = 'deleted') = (deleted_at is not null));
-- counting and listing; the limit of users is counted at each new one
create index users_present on cvault.users (tenant_id, user_id) where status <> 'deleted';
-- whose devices are to be off their servers
create index users_disabled on cvault.users (tenant_id, user_id) where status = 'disabled';
create policy platform_access on cvault.users for select to cvault_sys using (true);
grant select (tenant_id, user_id, status) on cvault.users to cvault_sys;
grant select (tenant_id, user_id, status) on cvault.users to cvault_fn;

grant create on schema platform to cvault_fn;
-- Takes one device of a disabled user of the current tenant off its server. NULL when it was on none.
create function platform.suspend_user_peer(p_device uuid) returns bigint
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
    select platform.withdraw(p_device, d.tenant_id)
    from cvault.devices d join cvault.users u on u.tenant_id = d.tenant_id and u.user_id = d.user_id
    where d.tenant_id = cvault.tenant_id() and d.device_id = p_device and u.status = 'disabled'
$$;
revoke all on function platform.suspend_user_peer from public;
alter function platform.suspend_user_peer owner to cvault_fn;
grant execute on function platform.suspend_user_peer to cvault_app;
revoke create on schema platform from cvault_fn;
