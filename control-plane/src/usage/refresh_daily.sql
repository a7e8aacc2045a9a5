-- usage_daily of the last $1 days and today, of every tenant, from hours and sessions. Reads only what can matter:
-- indexes usage_hourly_hour, sessions_open and sessions_closed_at; as many rows as those days have hours and sessions.
with days as (
    select d::date as day, d at time zone 'UTC' as begins, (d + interval '1 day') at time zone 'UTC' as ends
    from generate_series(date_trunc('day', now() at time zone 'UTC') - make_interval(days => $1),
                         date_trunc('day', now() at time zone 'UTC'), interval '1 day') as d
), bytes as (
    select h.tenant_id, (h.hour at time zone 'UTC')::date as day, h.user_id, sum(h.rx_bytes) as rx, sum(h.tx_bytes) as tx
    from cvault.usage_hourly h
    where h.hour >= (date_trunc('day', now() at time zone 'UTC') - make_interval(days => $1)) at time zone 'UTC'
      and h.hour < (date_trunc('day', now() at time zone 'UTC') + interval '1 day') at time zone 'UTC'
    group by 1, 2, 3
), sessions as (
    select s.tenant_id, s.user_id, s.connected_at, now() as ended_at
    from cvault.sessions s where s.status = 'active'
    union all
    select s.tenant_id, s.user_id, s.connected_at, s.disconnected_at
    from cvault.sessions s
    where s.status = 'disconnected'
      and s.disconnected_at >= (date_trunc('day', now() at time zone 'UTC') - make_interval(days => $1)) at time zone 'UTC'
), spans as (
    select s.tenant_id, d.day, s.user_id,
           sum(extract(epoch from least(s.ended_at, d.ends) - greatest(s.connected_at, d.begins))) as seconds
    from days d join sessions s on s.connected_at < d.ends and s.ended_at >= d.begins
    group by 1, 2, 3
)
insert into cvault.usage_daily (tenant_id, day, rx_bytes, tx_bytes, connection_seconds, active_users)
select tenant_id, day, coalesce(sum(rx), 0)::bigint, coalesce(sum(tx), 0)::bigint,
       greatest(coalesce(sum(seconds), 0), 0)::bigint, count(distinct user_id)::integer
from bytes full join spans using (tenant_id, day, user_id)
group by tenant_id, day
-- one order for all replicas
order by tenant_id, day
on conflict on constraint usage_daily_pkey do update
set rx_bytes = excluded.rx_bytes, tx_bytes = excluded.tx_bytes,
    connection_seconds = excluded.connection_seconds, active_users = excluded.active_users
