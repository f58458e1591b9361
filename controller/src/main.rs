//! `stillframe`: see the library of this package.

fn main() -> std::process::ExitCode {
    stillframe::cli::run()
}
