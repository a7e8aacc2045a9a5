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
