-- As before, but who brings a public key that is in use is left out, instead of making all the others fail, and when the pool of
-- the least loaded server is exhausted the next one's is tried. The unique constraints still judge those that race.
create or replace function platform.register_devices(
    p_tenant uuid, p_region text, p_seen_since timestamptz, p_at timestamptz, p_devices uuid[], p_users uuid[], p_names text[],
    p_platforms text[], p_public_keys bytea[], p_private_keys_sealed bytea[], p_preshared_keys_sealed bytea[],
    p_preshared_key_hashes bytea[]
) returns table (
    device_id uuid, client_dns inet[], client_allowed_ips cidr[], client_mtu integer, server_id uuid, server_name text, region text,
    public_ip inet, endpoint_port integer, server_public_key bytea, pool_id uuid, capacity integer, peer_count bigint,
    last_seen_at timestamptz, acked_revision bigint, ipv4 inet, ipv6 inet, revision bigint
)
language plpgsql security definer rows 10
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_tenant record;
    v_users uuid[];
    v_places integer[];
    v_taken bigint[] := '{}';
    v_candidate record;
    v_exhausted uuid[] := '{}';
    v_hosts bigint[] := '{}';
    v_server platform.servers;
    v_devices uuid[];
    v_count integer;
begin
    -- nothing is found of a tenant that is not the context's
    select t.max_devices_per_user, t.client_dns, t.client_allowed_ips, t.client_mtu into v_tenant
        from cvault.tenants t
        where t.tenant_id = p_tenant and t.status in ('active', 'trial') and t.over_limit_since is null
        for share;
    if not found then
        return;
    end if;
    -- in one order, whoever else locks several; who is locked by somebody else keeps nobody waiting
    select array_agg(present.user_id) into v_users from (
        select u.user_id from cvault.users u
        where u.tenant_id = p_tenant and u.user_id = any (p_users) and u.status = 'active'
        order by u.user_id for no key update skip locked) as present;
    -- Key pairs of ours are new. One that a client has made may belong to another device, or come twice: the first is judged here.
    -- Each is looked up in the order of the index: no other one can serve that, however little is known of the table.
    if array_position(p_private_keys_sealed, null) is not null then
        execute 'select coalesce(array_agg(w.place), ''{}'')
            from (select w.public_key, w.place, row_number() over (partition by w.public_key order by w.place) as nth
                  from unnest($2, $3) with ordinality as w (public_key, private_key, place)
                  where w.private_key is null) as w
            where w.nth > 1
               or (select d.public_key = w.public_key from cvault.devices d
                   where d.tenant_id = $1 and d.public_key >= w.public_key and d.status = ''active''
                   order by d.public_key limit 1)
               or (select true from platform.peers p
                   where p.public_key = w.public_key and p.removed_revision is null limit 1)'
            into v_taken using p_tenant, p_public_keys, p_private_keys_sealed;
    end if;
    -- A statement of its own: it sees what was committed while that one waited for the locks. Planned each time: a plan that was
    -- made when there was no device yet would go through all of them.
    execute 'select array_agg(w.place::integer order by w.place)
        from (select w.user_id, w.place, row_number() over (partition by w.user_id order by w.place) as nth
              from unnest($2) with ordinality as w (user_id, place) where w.place <> all ($5)) as w
        cross join lateral (
            select count(*) as devices from (
                select from cvault.devices d
                where d.tenant_id = $1 and d.user_id = w.user_id and d.status = ''active''
                order by d.device_id limit $3) as one) as own
        where w.user_id = any ($4) and own.devices + w.nth <= $3'
        into v_places using p_tenant, p_users, v_tenant.max_devices_per_user, v_users, v_taken;
    v_count := coalesce(cardinality(v_places), 0);
    if v_count = 0 then
        return;
    end if;
    select array_agg(p_devices[w.place] order by w.nth) into v_devices from unnest(v_places) with ordinality as w (place, nth);
    for v_candidate in
        select s.server_id, s.pool_id, p.ipv4, p.ipv6, p.next_host
        from platform.servers s join platform.address_pools p on p.pool_id = s.pool_id
        where s.status = 'active' and s.identity_pin is not null and s.public_key is not null
          and s.peer_count + v_count <= s.capacity and s.last_seen_at > p_seen_since and s.region = coalesce(p_region, s.region)
        order by s.peer_count * 1000000 / s.capacity, s.server_id
    loop
        continue when v_candidate.pool_id = any (v_exhausted);
        v_hosts := platform.take_free_addresses(v_candidate.pool_id, p_tenant, v_devices);
        exit when v_hosts <> '{}';
        -- not exhausted: a block is to be opened, and whoever does that keeps others waiting
        if v_candidate.next_host <= (1::bigint << (32 - masklen(v_candidate.ipv4))) - 2 then
            return;
        end if;
        v_exhausted := v_exhausted || v_candidate.pool_id;
    end loop;
    v_count := cardinality(v_hosts);
    if v_count = 0 then
        return;
    end if;
    v_places := v_places[1:v_count];

    -- from here to the end every other change of this server waits
    select * into v_server from platform.servers s where s.server_id = v_candidate.server_id for no key update;
    if v_server.status <> 'active' or v_server.peer_count + v_count > v_server.capacity then
        raise check_violation using message = 'the server takes no more peers', constraint = 'servers_open_for_peers';
    end if;
    insert into cvault.devices (tenant_id, device_id, user_id, name, platform, public_key, private_key_sealed, preshared_key_sealed,
                                preshared_key_hash, pool_id, ipv4, ipv6, server_id, placed_revision, created_at)
        select p_tenant, p_devices[w.place], p_users[w.place], p_names[w.place], p_platforms[w.place], p_public_keys[w.place],
               p_private_keys_sealed[w.place], p_preshared_keys_sealed[w.place], p_preshared_key_hashes[w.place], v_server.pool_id,
               host(v_candidate.ipv4::inet + w.host)::inet, host(v_candidate.ipv6::inet + w.host)::inet, v_server.server_id,
               v_server.revision + w.nth, p_at
        from unnest(v_places, v_hosts) with ordinality as w (place, host, nth);
    insert into platform.peers (server_id, device_id, tenant_id, user_id, public_key, preshared_key_sealed, preshared_key_hash,
                                ipv4, ipv6, generation)
        select v_server.server_id, p_devices[w.place], p_tenant, p_users[w.place], p_public_keys[w.place],
               p_preshared_keys_sealed[w.place], p_preshared_key_hashes[w.place], host(v_candidate.ipv4::inet + w.host)::inet,
               host(v_candidate.ipv6::inet + w.host)::inet, v_server.revision + w.nth
        from unnest(v_places, v_hosts) with ordinality as w (place, host, nth);
    insert into platform.node_changes (server_id, revision, op, device_id, public_key)
        select v_server.server_id, v_server.revision + w.nth, 'upsert', p_devices[w.place], p_public_keys[w.place]
        from unnest(v_places) with ordinality as w (place, nth);
    update platform.servers s
        set revision = s.revision + v_count, peer_count = s.peer_count + v_count,
            digest = (s.digest + (
                select sum(platform.peer_record_digest(v_server.digest_key, p_devices[w.place], p_tenant, p_public_keys[w.place],
                    p_preshared_key_hashes[w.place], host(v_candidate.ipv4::inet + w.host)::inet,
                    host(v_candidate.ipv6::inet + w.host)::inet, v_server.revision + w.nth))
                from unnest(v_places, v_hosts) with ordinality as w (place, host, nth)
            )) % 340282366920938463463374607431768211456
        where s.server_id = v_server.server_id;
    return query
        select p_devices[w.place], v_tenant.client_dns, v_tenant.client_allowed_ips, v_tenant.client_mtu, v_server.server_id,
               v_server.name, v_server.region, v_server.public_ip, v_server.endpoint_port, v_server.public_key, v_server.pool_id,
               v_server.capacity, v_server.peer_count + w.nth, v_server.last_seen_at, v_server.acked_revision,
               host(v_candidate.ipv4::inet + w.host)::inet, host(v_candidate.ipv6::inet + w.host)::inet, v_server.revision + w.nth
        from unnest(v_places, v_hosts) with ordinality as w (place, host, nth);
end
$$;
