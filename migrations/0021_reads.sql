-- What is read most often touches less.

grant create on schema platform to cvault_fn;

-- No one asked for the pool's network. Who wants an order makes it.
drop function platform.list_servers();
create function platform.list_servers() returns table (
    server_id uuid, name text, region text, public_ip inet, endpoint_port integer, public_key bytea, pool_id uuid,
    capacity integer, peer_count bigint, status text, enrolled boolean, last_seen_at timestamptz, acked_revision bigint
)
language plpgsql stable security definer rows 20
set search_path = pg_catalog, pg_temp
as $$
begin
    return query
        select s.server_id, s.name, s.region, s.public_ip, s.endpoint_port, s.public_key, s.pool_id, s.capacity, s.peer_count,
               s.status, s.identity_pin is not null, s.last_seen_at, s.acked_revision
        from platform.servers s
        where s.status <> 'removed';
end
$$;
alter function platform.list_servers owner to cvault_fn;
revoke all on function platform.list_servers from public;
grant execute on function platform.list_servers to cvault_app, cvault_sys;

-- A user's own usage does not go through that of the whole tenant, and neither goes through sessions that ended long ago.
create index usage_hourly_user on cvault.usage_hourly (tenant_id, user_id, hour);
create index sessions_user on cvault.sessions (tenant_id, user_id, (coalesce(disconnected_at, 'infinity')));
create index sessions_ended on cvault.sessions (tenant_id, (coalesce(disconnected_at, 'infinity')));
drop index cvault.sessions_connected;

revoke create on schema platform from cvault_fn;
