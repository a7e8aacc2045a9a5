-- A row in every table of a tenant that the registration of a device does not fill, recognisable by MARK (eight hex
-- digits), WORD (lower case) and NUMBER. TENANT, USER, DEVICE and SERVER are the ids of the person and their device.
update cvault.tenants set name = 'WORD' where tenant_id = 'TENANT';
update cvault.users set email = 'WORD@example.com', external_user_id = 'WORD' where tenant_id = 'TENANT';
update cvault.devices set platform = 'WORD' where tenant_id = 'TENANT';
insert into cvault.sessions (tenant_id, session_id, device_id, user_id, server_id, opened_by, rx_bytes)
    values ('TENANT', 'MARK-0000-4000-8000-000000000001', 'DEVICE', 'USER', 'SERVER', 'connect', NUMBER);
insert into cvault.api_keys (tenant_id, api_key_id, name, key_text, secret_hash)
    values ('TENANT', 'MARK-0000-4000-8000-000000000002', 'WORD', 'cvk_WORD', decode(repeat('MARK', 8), 'hex'));
insert into cvault.audit_log (tenant_id, audit_id, actor, action, target)
    values ('TENANT', 'MARK-0000-4000-8000-000000000003', 'WORD', 'user.create', 'WORD');
insert into cvault.auth_events (tenant_id, event_id, kind, outcome, user_id)
    values ('TENANT', 'MARK-0000-4000-8000-000000000004', 'login', 'success', 'USER');
insert into cvault.idempotency_keys (tenant_id, principal, key, fingerprint)
    values ('TENANT', 'WORD', 'WORD', decode(repeat('MARK', 8), 'hex'));
insert into cvault.outbox (tenant_id, mail_id, kind, expires_at)
    values ('TENANT', 'MARK-0000-4000-8000-000000000005', 'verify_email', now() + interval '1 day');
insert into cvault.request_logs (tenant_id, request_id, at, method, route, status, duration_us, api_key_id)
    values ('TENANT', 'MARK-0000-4000-8000-000000000010', now(), 'GET', 'WORD', 200, NUMBER, 'MARK-0000-4000-8000-000000000002');
insert into cvault.refresh_tokens (tenant_id, token_hash, family_id, user_id, expires_at)
    values ('TENANT', decode(repeat('MARK', 8), 'hex'), 'MARK-0000-4000-8000-000000000006', 'USER', now() + interval '1 day');
insert into cvault.tenant_admins (tenant_id, admin_id, email, role)
    values ('TENANT', 'MARK-0000-4000-8000-000000000007', 'WORD@example.com', 'owner');
insert into cvault.portal_sessions
        (tenant_id, session_id, admin_id, cookie_hash, created_at, expires_at, last_seen_at, user_agent, counted_from)
    values ('TENANT', 'MARK-0000-4000-8000-000000000008', 'MARK-0000-4000-8000-000000000007',
            decode(repeat('MARK', 8), 'hex'), now(), now() + interval '1 day', now(), 'WORD', now());
insert into cvault.portal_networks (tenant_id, admin_id, network, last_seen_at)
    values ('TENANT', 'MARK-0000-4000-8000-000000000007', '192.0.2.0/24', now());
insert into cvault.portal_refresh_tokens (tenant_id, token_hash, session_id, expires_at)
    values ('TENANT', decode(repeat('MARK', 8), 'hex'), 'MARK-0000-4000-8000-000000000008', now() + interval '1 day');
insert into cvault.portal_links (tenant_id, token_hash, admin_id, purpose, email, created_at, expires_at)
    values ('TENANT', decode(repeat('MARK', 8), 'hex'), 'MARK-0000-4000-8000-000000000007', 'verify_email',
            'WORD@example.com', now(), now() + interval '1 day');
insert into cvault.step_up_challenges (tenant_id, challenge_id, session_id, action, request_digest, expires_at)
    values ('TENANT', 'MARK-0000-4000-8000-000000000009', 'MARK-0000-4000-8000-000000000008', 'WORD',
            decode(repeat('MARK', 8), 'hex'), now() + interval '1 day');
insert into cvault.usage_daily (tenant_id, day, rx_bytes) values ('TENANT', current_date, NUMBER);
-- one in every partition that exists, and one in the default partition
insert into cvault.usage_hourly (tenant_id, hour, device_id, user_id, server_id, rx_bytes, tx_bytes)
    select 'TENANT', hour, 'DEVICE', 'USER', 'SERVER', NUMBER, 1
    from (select date_trunc('month', now(), 'UTC') + make_interval(months => month, days => 14)
          from generate_series(0, 3) month
          union all select timestamptz '2001-01-01 00:00:00+00') hours (hour);
