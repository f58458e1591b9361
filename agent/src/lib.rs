//! The in-guest program of Stillframe, as a library with a thin `main`.
//!
//! ```text
//! order -> plan -> worker processes (collectors of sys/<platform>) -> records -> segments -> store -> chain -> manifest
//!               -> memory sources (memory/) ----------------------> frames  ->
//! ```
//! Each arrow is one call in one direction. No collector knows a store and no store (the crate `stillframe_store`) knows a
//! collector; only [`capture`] knows both. A collector runs in a worker process ([`worker`]), so that one that hangs or dies costs what it was at
//! and nothing else. Nothing is executed on the host but this program itself, neither directly nor by asking the
//! kernel for something that would make it run a helper.
//!
//! To add a kind: its record in `stillframe_evidence::records`, its reader in `sys/<platform>/<kind>.rs`, its line in
//! that platform's list of collectors, its place in [`plan`].

pub mod cancel;
pub mod capture;
pub mod cli;
pub mod collect;
pub mod imds;
pub mod memory;
pub mod plan;
pub mod sys;
pub mod worker;
