//! Periodic work, supervised, stopped cleanly at shutdown.
