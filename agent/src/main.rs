//! `stillframe-agent`: see the library of this package.

#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: stillframe_agent::sys::allocator::Allocator = stillframe_agent::sys::allocator::Allocator;

fn main() -> std::process::ExitCode {
    stillframe_agent::cli::run()
}
