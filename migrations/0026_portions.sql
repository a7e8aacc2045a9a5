-- Thousands of numbers opened in one transaction kept the registrations beside it waiting for a tenth of a second: so many at a
-- time, and the caller comes again.
create or replace function platform.open_addresses(p_pool uuid, p_ahead integer) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    c_portion constant bigint := 1024;
    v_pool platform.address_pools;
    v_missing bigint;
    v_last bigint;
    v_to bigint;
begin
    select p_ahead - count(*) into v_missing from (
        select from platform.addresses a where a.pool_id = p_pool and a.state = 'free' limit p_ahead) as free;
    -- not for every number that was taken
    if v_missing < least(p_ahead / 2, c_portion) then
        return 0;
    end if;
    select * into v_pool from platform.address_pools p where p.pool_id = p_pool for no key update;
    v_last := (1::bigint << (32 - masklen(v_pool.ipv4))) - 2;
    v_to := least(v_pool.next_host + least(v_missing, c_portion) - 1, v_last);
    insert into platform.addresses (pool_id, host, state)
        select p_pool, h, 'free' from generate_series(v_pool.next_host, v_to) as h;
    update platform.address_pools p set next_host = v_to + 1 where p.pool_id = p_pool and v_to >= v_pool.next_host;
    return greatest(v_to - v_pool.next_host + 1, 0);
end
$$;
