//! The programs under test, built by cargo when they are asked for.

use anyhow::{Context, Result, bail};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

/// The workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("/"))
        .to_owned()
}

/// Where cargo puts what it builds.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// What this process has had built. One build at a time here; cargo itself sees to it between processes.
static BUILT: Mutex<BTreeMap<(String, String), PathBuf>> = Mutex::new(BTreeMap::new());

/// The profile that this very code was built in.
fn own_profile() -> &'static str {
    if cfg!(debug_assertions) { "dev" } else { "release" }
}

/// Builds one binary and says where it lies.
fn build(package: &str, binary: &str, triple: Option<&str>, profile: &str) -> Result<PathBuf> {
    let mut built = BUILT.lock().unwrap_or_else(|e| e.into_inner());
    let key = (format!("{binary} {}", triple.unwrap_or("")), profile.to_owned());
    if let Some(path) = built.get(&key) {
        return Ok(path.clone());
    }
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(workspace())
        .args(["build", "--quiet", "--locked", "-p", package, "--bin", binary])
        .arg("--target-dir")
        .arg(target());
    let mut folder = target();
    if let Some(triple) = triple {
        cargo.args(["--target", triple]);
        folder.push(triple);
    }
    cargo.args(["--profile", profile]);
    // What cargo tells a test or build script about itself is not for the build inside it.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG") || name == "CARGO_MANIFEST_DIR" {
            cargo.env_remove(name);
        }
    }
    let status = cargo.status().context("starting cargo")?;
    if !status.success() {
        bail!("cargo could not build {binary}");
    }
    let suffix = if triple.is_some_and(|t| t.contains("windows")) {
        ".exe"
    } else {
        ""
    };
    let path = folder
        .join(if profile == "dev" { "debug" } else { profile })
        .join(format!("{binary}{suffix}"));
    built.insert(key, path.clone());
    Ok(path)
}

/// The agent for this machine.
pub fn agent() -> Result<PathBuf> {
    build("stillframe-agent", "stillframe-agent", None, own_profile())
}

/// The controller for this machine.
pub fn controller() -> Result<PathBuf> {
    build("stillframe", "stillframe", None, own_profile())
}

/// The lab's own program, which can be a process of a load.
pub fn lab() -> Result<PathBuf> {
    build("stillframe-tests", "lab", None, own_profile())
}

/// The agent as it is released for Linux: static.
pub fn static_agent() -> Result<PathBuf> {
    build(
        "stillframe-agent",
        "stillframe-agent",
        Some("x86_64-unknown-linux-musl"),
        "dist",
    )
}

/// The lab's own program for a guest: static.
pub fn static_lab() -> Result<PathBuf> {
    build(
        "stillframe-tests",
        "lab",
        Some("x86_64-unknown-linux-musl"),
        "dist",
    )
}

/// The agent for Windows.
pub fn windows_agent() -> Result<PathBuf> {
    build(
        "stillframe-agent",
        "stillframe-agent",
        Some("x86_64-pc-windows-gnu"),
        "dist",
    )
}

/// True when a program can be found on the path.
pub fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// For tests that need packages: fails, with what to do, when one is missing. Nothing is skipped in silence.
pub fn require(programs: &[&str]) -> Result<()> {
    let missing: Vec<&str> = programs.iter().copied().filter(|p| !is_installed(p)).collect();
    if missing.is_empty() {
        Ok(())
    } else {
        bail!("not installed: {}; `tests/run` installs them", missing.join(", "))
    }
}
