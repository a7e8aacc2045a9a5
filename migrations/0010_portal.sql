-- The people of a tenant who use the portal: their accounts, sessions, mailed links and step-up challenges.
create table cvault.tenant_admins (
    tenant_id uuid not null,
    admin_id uuid not null,
    email text not null,
    -- null: invited, and no password chosen yet
    password_hash text,
    role text not null,
    status text not null default 'active',
    email_verified_at timestamptz,
    password_changed_at timestamptz,
    created_at timestamptz not null default now(),
    constraint tenant_admins_pkey primary key (tenant_id, admin_id),
    constraint tenant_admins_tenant_fkey foreign key (tenant_id) references cvault.tenants,
    constraint tenant_admins_email_lower check (email = lower(email) and char_length(email) <= 254),
    constraint tenant_admins_role check (role in ('owner', 'admin', 'developer', 'billing', 'viewer')),
    constraint tenant_admins_status check (status in ('active', 'disabled'))
);
-- A login names an address and no tenant, so an address belongs to one account of the whole platform.
create unique index tenant_admins_email on cvault.tenant_admins (email);

-- One login. A browser's is a cookie, looked up at each request; a program's is a family of refresh tokens.
create table cvault.portal_sessions (
    tenant_id uuid not null,
    session_id uuid not null,
    admin_id uuid not null,
    cookie_hash bytea,
    created_at timestamptz not null,
    expires_at timestamptz not null,
    last_seen_at timestamptz not null,
    last_ip inet,
    user_agent text not null default '',
    ended_at timestamptz,
    end_reason text,
    -- what the risk check counts: sensitive requests since, and wrong answers to challenges
    counted_from timestamptz not null,
    sensitive_requests integer not null default 0,
    challenge_failures integer not null default 0,
    constraint portal_sessions_pkey primary key (tenant_id, session_id),
    constraint portal_sessions_admin_fkey foreign key (tenant_id, admin_id)
        references cvault.tenant_admins on delete cascade,
    constraint portal_sessions_cookie_length check (octet_length(cookie_hash) = 32),
    constraint portal_sessions_user_agent_length check (char_length(user_agent) <= 255),
    constraint portal_sessions_ended check ((ended_at is null) = (end_reason is null)),
    constraint portal_sessions_end_reason
        check (end_reason in ('logout', 'revoked', 'password_changed', 'token_reused', 'risk'))
);
-- found before the tenant is known; 256 random bits need no constraint to be different
create index portal_sessions_cookie on cvault.portal_sessions (cookie_hash) where cookie_hash is not null;
create index portal_sessions_admin on cvault.portal_sessions (tenant_id, admin_id) where ended_at is null;

-- Networks an account has logged in from or answered a challenge from.
create table cvault.portal_networks (
    tenant_id uuid not null,
    admin_id uuid not null,
    network inet not null,
    last_seen_at timestamptz not null,
    constraint portal_networks_pkey primary key (tenant_id, admin_id, network),
    constraint portal_networks_admin_fkey foreign key (tenant_id, admin_id)
        references cvault.tenant_admins on delete cascade
);

create table cvault.portal_refresh_tokens (
    tenant_id uuid not null,
    token_hash bytea not null,
    session_id uuid not null,
    expires_at timestamptz not null,
    used_at timestamptz,
    constraint portal_refresh_tokens_pkey primary key (tenant_id, token_hash),
    constraint portal_refresh_tokens_session_fkey foreign key (tenant_id, session_id)
        references cvault.portal_sessions on delete cascade,
    constraint portal_refresh_tokens_hash_length check (octet_length(token_hash) = 32)
);
create index portal_refresh_tokens_hash on cvault.portal_refresh_tokens (token_hash);
create index portal_refresh_tokens_session on cvault.portal_refresh_tokens (tenant_id, session_id);

-- What was mailed to prove that somebody reads an address.
create table cvault.portal_links (
    tenant_id uuid not null,
    token_hash bytea not null,
    admin_id uuid not null,
    purpose text not null,
    email text not null,
    created_at timestamptz not null,
    expires_at timestamptz not null,
    used_at timestamptz,
    constraint portal_links_pkey primary key (tenant_id, token_hash),
    constraint portal_links_admin_fkey foreign key (tenant_id, admin_id)
        references cvault.tenant_admins on delete cascade,
    constraint portal_links_hash_length check (octet_length(token_hash) = 32),
    constraint portal_links_purpose check (purpose in ('verify_email', 'reset_password'))
);
create index portal_links_hash on cvault.portal_links (token_hash);
create index portal_links_admin on cvault.portal_links (tenant_id, admin_id);

-- A challenge belongs to one session and one request: the digest is of its method, path, query and body.
create table cvault.step_up_challenges (
    tenant_id uuid not null,
    challenge_id uuid not null,
    session_id uuid not null,
    action text not null,
    request_digest bytea not null,
    expires_at timestamptz not null,
    -- set when it was answered; used_at when the token was taken
    token_hash bytea,
    token_expires_at timestamptz,
    used_at timestamptz,
    constraint step_up_challenges_pkey primary key (tenant_id, challenge_id),
    constraint step_up_challenges_session_fkey foreign key (tenant_id, session_id)
        references cvault.portal_sessions on delete cascade,
    constraint step_up_challenges_digest_length check (octet_length(request_digest) = 32),
    constraint step_up_challenges_token check ((token_hash is null) = (token_expires_at is null))
);
create index step_up_challenges_session on cvault.step_up_challenges (tenant_id, session_id);

call platform.protect('cvault.tenant_admins');
call platform.protect('cvault.portal_sessions');
call platform.protect('cvault.portal_networks');
call platform.protect('cvault.portal_refresh_tokens');
call platform.protect('cvault.portal_links');
call platform.protect('cvault.step_up_challenges');

grant select, insert, update, delete on cvault.tenant_admins to cvault_app;
grant select, insert, update on cvault.portal_sessions, cvault.portal_networks, cvault.portal_refresh_tokens,
    cvault.portal_links, cvault.step_up_challenges to cvault_app;

-- What the platform itself needs across tenants: whose an address, a session, a token or a link is, and trimming.
create policy platform_access on cvault.tenant_admins for select to cvault_sys using (true);
create policy platform_access on cvault.portal_sessions for all to cvault_sys using (true) with check (true);
create policy platform_access on cvault.portal_networks for all to cvault_sys using (true) with check (true);
create policy platform_access on cvault.portal_refresh_tokens for all to cvault_sys using (true) with check (true);
create policy platform_access on cvault.portal_links for all to cvault_sys using (true) with check (true);
create policy platform_access on cvault.step_up_challenges for all to cvault_sys using (true) with check (true);
grant select (tenant_id, admin_id, email, role, status) on cvault.tenant_admins to cvault_sys;
grant select (tenant_id, session_id, admin_id, cookie_hash, created_at, expires_at, last_seen_at, last_ip, ended_at)
    on cvault.portal_sessions to cvault_sys;
grant select (tenant_id, token_hash, expires_at) on cvault.portal_refresh_tokens to cvault_sys;
grant select (tenant_id, token_hash, expires_at) on cvault.portal_links to cvault_sys;
grant select (tenant_id, challenge_id, expires_at) on cvault.step_up_challenges to cvault_sys;
grant select (tenant_id, admin_id, network, last_seen_at) on cvault.portal_networks to cvault_sys;
grant delete on cvault.portal_sessions, cvault.portal_networks, cvault.portal_refresh_tokens, cvault.portal_links,
    cvault.step_up_challenges to cvault_sys;

-- Failed logins and requests for a reset, whose account may not exist: the address only as a digest.
create table platform.portal_attempts (
    attempt_id uuid not null,
    at timestamptz not null,
    account bytea not null,
    kind text not null,
    outcome text not null,
    client_ip inet,
    request_id uuid not null,
    constraint portal_attempts_pkey primary key (attempt_id),
    constraint portal_attempts_kind check (kind in ('signup', 'login', 'password_reset')),
    constraint portal_attempts_outcome check (outcome in ('success', 'failure', 'limited'))
);
create index portal_attempts_account on platform.portal_attempts (account, at);
create index portal_attempts_at on platform.portal_attempts (at);
grant select, insert, delete on platform.portal_attempts to cvault_sys;

alter table cvault.auth_events add column admin_id uuid;
alter table cvault.auth_events drop constraint auth_events_kind;
alter table cvault.auth_events add constraint auth_events_kind check (kind in (
    'register', 'login', 'refresh', 'logout', 'portal_signup', 'portal_login', 'portal_refresh', 'portal_logout',
    'portal_email_verify', 'portal_password_reset', 'portal_password_change', 'portal_step_up', 'portal_risk'));
