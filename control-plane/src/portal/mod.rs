//! The people of a tenant who manage it: their accounts, their logins, and the links that are mailed to them.
//!
//! An account is found by its address before its tenant is known, with role `cvault_sys`, which sees no password; everything
//! else happens inside the tenant's own transaction. Team management and second factors have their place here.

pub mod accounts;
pub mod attempts;
pub mod links;
pub mod sessions;
pub mod signup;
