//! The platform: everything with `cfg(target_os)` or `unsafe`, and one file for each kind that it can collect. The rest of
//! the agent is the same everywhere.
//!
//! A platform provides [`COLLECTORS`], [`Look`], `is_root`, `identity`, `clock`, `usage`, `own_program`, `stop`, `die_with_parent`,
//! `own_descriptors`, `spare_memory`, `read_by_own_instance`, `widen_pipe` and `exit_reason`; for memory, `Vault`, `KeyPages`, `LockedBuffer`, `read_at`, `open_regular`,
//! `is_own_disk`, `total_memory`, and of kernel modules `load_module`, `remove_module`, `stand_alone`, `interrupt`, `this_thread`.

#[cfg(target_os = "linux")]
pub mod allocator;
pub mod sha256;

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
pub use linux::*;

#[cfg(windows)]
mod windows;
#[cfg(windows)]
pub use windows::*;
