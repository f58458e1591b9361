//! The lab: everything that a test or a benchmark needs around the unmodified programs. It builds the binaries that it runs,
//! so none is ever stale; what it starts ends with it.

pub mod captured;
pub mod cloud;
pub mod cost;
pub mod dead_mount;
pub mod fill;
pub mod guest;
pub mod load;
pub mod programs;
pub mod slow_folder;
pub mod store;
pub mod volatility;
pub mod wine;
