-- Keys that sign tokens, and keys that sign tenant contexts, are replaced by others while everything runs (`admin keys`).

-- Of those that sign tokens there may be several: the newest of which `signs_from` has come signs, all verify.
-- Locks the table, of a few rows, for as long as this takes.
alter table platform.secrets add column signs_from timestamptz;
update platform.secrets set signs_from = created_at where name = 'token_key';
alter table platform.secrets
    add constraint secrets_signs_from check ((signs_from is not null) = (name ~ '^token_key(:[0-9a-f]{16})?$'));
grant delete on platform.secrets to cvault_sys;

grant insert, delete on platform.context_keys to cvault_sys;
