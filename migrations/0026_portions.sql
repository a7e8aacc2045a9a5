-- Thousands of numbers opened in one transaction kept the registrations beside it waiting for a tenth of a second: so many at a
-- time, and the caller comes again. What there is to do is looked at before the pool is locked, and again by whoever has it.
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
    for locked in 0..1 loop
        if locked = 0 then
            select * into v_pool from platform.address_pools p where p.pool_id = p_pool and p.deleted_at is null;
        else
            select * into v_pool from platform.address_pools p where p.pool_id = p_pool and p.deleted_at is null
                for no key update;
        end if;
        v_last := (1::bigint << (32 - masklen(v_pool.ipv4))) - 2;
        if v_last is null or v_pool.next_host > v_last then
            return 0;
        end if;
        select p_ahead - count(*) into v_missing from (
            select from platform.addresses a where a.pool_id = p_pool and a.state = 'free' limit p_ahead) as free;
        -- not for every number that was taken
        if v_missing < least(p_ahead / 2, c_portion) then
            return 0;
        end if;
    end loop;
    v_to := least(v_pool.next_host + least(v_missing, c_portion) - 1, v_last);
    insert into platform.addresses (pool_id, host, state)
        select p_pool, h, 'free' from generate_series(v_pool.next_host, v_to) as h;
    update platform.address_pools p set next_host = v_to + 1 where p.pool_id = p_pool;
    return v_to - v_pool.next_host + 1;
end
$$;
