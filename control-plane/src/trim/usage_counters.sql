-- Deletes up to $1 counters that no server will report again, after at least $2 days without a report of them, and adds what they
-- stood for to usage_settled. Returns how many. Index usage_counters_updated, oldest first.
--
-- Reported again they would be billed twice, so each must be dead: its server has told usage in the last 8 days (agents send
-- what they hold in order, and keep what was acknowledged for 7 days), and either has begun to count anew meanwhile (another
-- counter_epoch), or has acknowledged that the device is no longer there under that generation. A server that was removed
-- reports nothing.
with dead as (
    select c.server_id, c.counter_epoch, c.device_id, c.generation
    from platform.usage_counters c
    join platform.servers s on s.server_id = c.server_id
    where c.updated_at < now() - make_interval(days => $2)
      and (s.status = 'removed'
           or exists (select from platform.usage_windows w where w.server_id = c.server_id)
              and (not exists (select from platform.usage_windows w
                               where w.server_id = c.server_id and w.counter_epoch = c.counter_epoch)
                   or not exists (select from platform.peers p
                                  where p.server_id = c.server_id and p.device_id = c.device_id
                                    and (p.generation <= c.generation and p.removed_revision is null
                                         or greatest(p.generation, p.removed_revision) > s.acked_revision))))
    order by c.updated_at limit $1 for update of c skip locked
), gone as (
    delete from platform.usage_counters c using dead
    where c.server_id = dead.server_id and c.counter_epoch = dead.counter_epoch and c.device_id = dead.device_id
      and c.generation = dead.generation
    returning c.device_id, c.rx_bytes, c.tx_bytes
), settled as (
    insert into platform.usage_settled as t (device_id, rx_bytes, tx_bytes)
    select device_id, sum(rx_bytes), sum(tx_bytes) from gone group by device_id
    on conflict on constraint usage_settled_pkey do update
    set rx_bytes = t.rx_bytes + excluded.rx_bytes, tx_bytes = t.tx_bytes + excluded.tx_bytes
)
select count(*) as "deleted!" from gone
