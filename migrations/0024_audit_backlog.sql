-- Rows that are not chained yet are read in the order in which they are chained, however many they are.

drop index cvault.audit_log_unchained;
create index audit_log_unchained on cvault.audit_log (tenant_id, at, audit_id) where chain_sequence is null;
