-- A user that is being deleted has no name, address or password any more, and is disabled until its last device is gone;
-- nothing enables it again. The constraints are checked under an exclusive lock of the table: seconds for millions of users.
alter table cvault.users
    add column deleting_since timestamptz,
    add constraint users_deleting check (deleting_since is null or status in ('disabled', 'deleted')),
    drop constraint users_identified,
    add constraint users_identified check (
        case when status = 'deleted' or deleting_since is not null
        then email is null and external_user_id is null and password_hash is null
        else email is not null or external_user_id is not null end);
create index users_deleting on cvault.users (deleting_since) where deleting_since is not null and status <> 'deleted';
-- whoever finishes deletions that were interrupted looks for them in all tenants
grant select (deleting_since) on cvault.users to cvault_sys;
