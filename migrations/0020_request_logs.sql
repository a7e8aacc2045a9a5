-- Requests that were made with a tenant's keys, for its developers: what was asked and what came of it, never with what. And the
-- change of a portal account's address.

-- Written in batches by role cvault_sys. No foreign keys: a row tells what was, and checking each would lock what requests work
-- with. The primary key is the only index: ids of requests are UUIDv7, so that it is also the order of time.
create table cvault.request_logs (
    tenant_id uuid not null,
    request_id uuid not null,
    at timestamptz not null,
    method text not null,
    -- the template: `/api/v1/devices/{device_id}`
    route text not null,
    status smallint not null,
    -- of an error
    code text,
    duration_us integer not null,
    api_key_id uuid not null,
    user_id uuid,
    client_ip inet,
    constraint request_logs_pkey primary key (tenant_id, request_id),
    constraint request_logs_status check (status between 100 and 599),
    constraint request_logs_lengths check (char_length(method) <= 10 and char_length(route) <= 200 and char_length(code) <= 50)
);
call platform.protect('cvault.request_logs');
-- it goes with its tenant
grant select, delete on cvault.request_logs to cvault_app;
create policy platform_access on cvault.request_logs for all to cvault_sys using (true) with check (true);
grant insert, delete, select (tenant_id, request_id) on cvault.request_logs to cvault_sys;

-- A new address counts when somebody has opened the link that was mailed to it.
alter table cvault.portal_links drop constraint portal_links_purpose,
    add column session_id uuid,
    add constraint portal_links_purpose check (purpose in ('verify_email', 'reset_password', 'change_email')),
    -- the session that asked, which stays when the others end
    add constraint portal_links_session check ((session_id is not null) = (purpose = 'change_email'));
alter table cvault.portal_sessions drop constraint portal_sessions_end_reason,
    add constraint portal_sessions_end_reason
        check (end_reason in ('logout', 'revoked', 'password_changed', 'email_changed', 'token_reused', 'risk'));
alter table cvault.outbox drop constraint outbox_kind,
    add constraint outbox_kind check (kind in (
        'verify_email', 'reset_password', 'password_changed', 'change_email', 'email_change_asked', 'email_changed'));
alter table cvault.auth_events drop constraint auth_events_kind,
    add constraint auth_events_kind check (kind in (
        'register', 'login', 'refresh', 'logout', 'portal_signup', 'portal_login', 'portal_refresh', 'portal_logout',
        'portal_email_verify', 'portal_email_change', 'portal_password_reset', 'portal_password_change', 'portal_step_up',
        'portal_risk'));
