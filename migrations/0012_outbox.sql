-- Mails wait here from the transaction that wants them until they are delivered. What they say, and to whom, is sealed with
-- the tenant's data key, and destroyed on delivery: a link in a mail is as good as a password for a while.
create table cvault.outbox (
    tenant_id uuid not null,
    mail_id uuid not null,
    kind text not null,
    -- address and data, JSON, AES-256-GCM under the tenant's data key
    payload_sealed bytea,
    created_at timestamptz not null default now(),
    -- what the mail is about is over then: it is not sent any more
    expires_at timestamptz not null,
    attempts integer not null default 0,
    -- also the lease of the replica that is sending it
    next_attempt_at timestamptz not null default now(),
    delivered_at timestamptz,
    -- given up, for the reason of last_error
    dead_at timestamptz,
    last_error text,
    constraint outbox_pkey primary key (tenant_id, mail_id),
    constraint outbox_tenant_fkey foreign key (tenant_id) references cvault.tenants,
    constraint outbox_kind check (kind in ('verify_email', 'reset_password', 'password_changed')),
    constraint outbox_attempts check (attempts >= 0),
    constraint outbox_last_error_length check (char_length(last_error) <= 500),
    constraint outbox_one_end check (delivered_at is null or dead_at is null),
    constraint outbox_payload_destroyed check (delivered_at is null or payload_sealed is null)
);
-- across tenants: what is due, oldest first; also what waits at a tenant
create index outbox_due on cvault.outbox (next_attempt_at) where delivered_at is null and dead_at is null;
create index outbox_waiting on cvault.outbox (tenant_id) where delivered_at is null and dead_at is null;
-- across tenants: what may be forgotten
create index outbox_ended on cvault.outbox (created_at) where delivered_at is not null or dead_at is not null;

call platform.protect('cvault.outbox');
grant insert (tenant_id, mail_id, kind, payload_sealed, created_at, expires_at, next_attempt_at),
    select (tenant_id, mail_id, delivered_at, dead_at) on cvault.outbox to cvault_app;
create policy platform_access on cvault.outbox for all to cvault_sys using (true) with check (true);
grant select, delete, update (payload_sealed, attempts, next_attempt_at, delivered_at, dead_at, last_error)
    on cvault.outbox to cvault_sys;

-- Trimming: what role cvault_sys may delete, and only when it is over. The indexes are built under a lock that lets reads pass
-- and writes wait.
create policy platform_access on cvault.auth_events for all to cvault_sys using (true) with check (true);
grant select (tenant_id, event_id, at), delete on cvault.auth_events to cvault_sys;
create index auth_events_at on cvault.auth_events (at);

grant select (tenant_id, principal, key) on cvault.idempotency_keys to cvault_sys;
create index idempotency_keys_created on cvault.idempotency_keys (created_at);
grant select (tenant_id, token_hash) on cvault.refresh_tokens to cvault_sys;
create index refresh_tokens_expires on cvault.refresh_tokens (expires_at);

grant delete on cvault.sessions, cvault.devices to cvault_sys;
grant select (revoked_at) on cvault.devices to cvault_sys;
create policy closed_only on cvault.sessions as restrictive for delete to cvault_sys using (status = 'disconnected');
create policy revoked_only on cvault.devices as restrictive for delete to cvault_sys using (status = 'revoked');
create index devices_revoked on cvault.devices (revoked_at) where status = 'revoked';

-- Counters that were trimmed, summed up, so that `admin verify-ledger` still adds up to what was billed.
create table platform.usage_settled (
    device_id uuid not null,
    rx_bytes numeric not null,
    tx_bytes numeric not null,
    constraint usage_settled_pkey primary key (device_id)
);
grant select, insert, update on platform.usage_settled to cvault_sys;
grant delete on platform.usage_counters to cvault_sys;
create index usage_counters_updated on platform.usage_counters (updated_at);

-- Forgets where devices once were, when their servers have acknowledged the removal or are gone.
grant create on schema platform to cvault_fn;
create function platform.forget_peers(p_devices uuid[]) returns integer
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_gone integer;
begin
    delete from platform.peers p
        using platform.servers s
        where p.device_id = any (p_devices) and p.removed_revision is not null
          and s.server_id = p.server_id and (s.status = 'removed' or p.removed_revision <= s.acked_revision);
    get diagnostics v_gone = row_count;
    return v_gone;
end
$$;
grant delete on platform.peers to cvault_fn;
alter function platform.forget_peers owner to cvault_fn;
revoke all on function platform.forget_peers from public;
grant execute on function platform.forget_peers to cvault_sys;
revoke create on schema platform from cvault_fn;
