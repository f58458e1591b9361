//! `stillframe-agent`: see the library of this package.

/// The allocator of musl takes one lock for every thread and gives memory back at every turn: a triage takes half as long
/// again with it.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    stillframe_agent::cli::run()
}
