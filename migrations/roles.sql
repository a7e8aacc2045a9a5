-- The four roles. Run once by a role that may create roles, before the first migration; repeating it changes nothing.
-- None is superuser, BYPASSRLS or owner of another's tables; only cvault_owner may hand functions to cvault_fn.
do $$
begin
    if not exists (select from pg_roles where rolname = 'cvault_owner') then
        create role cvault_owner login nosuperuser nocreatedb nocreaterole nobypassrls;
    end if;
    if not exists (select from pg_roles where rolname = 'cvault_app') then
        create role cvault_app login nosuperuser nocreatedb nocreaterole nobypassrls noinherit;
    end if;
    if not exists (select from pg_roles where rolname = 'cvault_sys') then
        create role cvault_sys login nosuperuser nocreatedb nocreaterole nobypassrls noinherit;
    end if;
    if not exists (select from pg_roles where rolname = 'cvault_fn') then
        create role cvault_fn nologin nosuperuser nocreatedb nocreaterole nobypassrls;
    end if;
    if not pg_has_role('cvault_owner', 'cvault_fn', 'member') then
        grant cvault_fn to cvault_owner;
    end if;
    -- What a session is running is visible to every other session of its role, and all tenants share this one.
    -- The setting needs a superuser; where nobody is one, set it for the whole server. `serve` refuses to run without.
    if not exists (select from pg_db_role_setting
                   where setrole = 'cvault_app'::regrole and setdatabase = 0 and 'track_activities=off' = any (setconfig)) then
        begin
            alter role cvault_app set track_activities = off;
        exception when insufficient_privilege then
            raise warning 'track_activities must be switched off for role cvault_app by a superuser';
        end;
    end if;
    execute format('revoke all on database %I from public', current_database());
    execute format('grant connect on database %I to cvault_owner, cvault_app, cvault_sys', current_database());
    execute format('grant create on database %I to cvault_owner', current_database());
end
$$;
revoke create on schema public from public;
-- sqlx keeps its own table of applied migrations in the schema of the role that migrates.
grant usage, create on schema public to cvault_owner;
