-- Which key-encryption key an answer kept for staff is sealed with: a rotation seals it anew, and the old key is needed until then.
alter table platform.idempotency_keys add column kek_version smallint;
update platform.idempotency_keys set kek_version = coalesce((select min(kek_version) from platform.secrets), 1)
where response_sealed is not null;
alter table platform.idempotency_keys add constraint idempotency_keys_kek_version check ((response_sealed is null) = (kek_version is null));
grant update (kek_version) on platform.idempotency_keys to cvault_sys;
