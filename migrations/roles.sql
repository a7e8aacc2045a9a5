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
    execute format('revoke all on database %I from public', current_database());
    execute format('grant connect on database %I to cvault_owner, cvault_app, cvault_sys', current_database());
    execute format('grant create on database %I to cvault_owner', current_database());
end
$$;
revoke create on schema public from public;
-- sqlx keeps its own table of applied migrations in the schema of the role that migrates.
grant usage, create on schema public to cvault_owner;
