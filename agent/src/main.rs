//! `stillframe-agent`: see the library of this package.

fn main() -> std::process::ExitCode {
    stillframe_agent::cli::run()
}
