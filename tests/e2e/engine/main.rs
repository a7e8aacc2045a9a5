//! The data plane process by itself, without control plane or agent: Debian's tools on both sides of it.
//!
//! `CVAULT_TUNNEL_WORKERS` and `CVAULT_TUNNEL_WITHOUT` choose how the engine runs, the same tests for every choice.

mod age;
mod agent;
mod hostile;
mod injected;
mod interop;
mod life;
mod path;
mod restart;
mod tools;
mod wg_quick;
mod witness;
