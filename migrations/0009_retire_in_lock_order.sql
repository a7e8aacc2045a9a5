-- The server's row is the last lock of every transaction. A registration that finds a number free in its snapshot, and taken
-- since, keeps that number's row locked (SKIP LOCKED skips rows that are locked now): it must not meet a deletion that holds the
-- server and wants the number.
grant create on schema platform to cvault_fn;
create or replace function platform.retire_peer(p_device uuid) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_device cvault.devices;
begin
    select * into v_device from cvault.devices d
        where d.tenant_id = cvault.tenant_id() and d.device_id = p_device and d.status = 'revoked';
    if not found then
        raise no_data_found using message = 'no such revoked device';
    end if;
    update platform.addresses a
        set state = 'quarantine', tenant_id = null, device_id = null, released_device_id = p_device,
            released_at = now()
        where a.device_id = p_device and a.tenant_id = v_device.tenant_id;
    return platform.withdraw_peer(p_device);
end
$$;
revoke create on schema platform from cvault_fn;
