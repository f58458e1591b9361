//! Captures as the tests look at them: through the controller, from outside.

use crate::programs;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// Runs the controller.
pub fn stillframe(arguments: &[&str]) -> Result<Output> {
    Command::new(programs::controller()?)
        .args(arguments)
        .output()
        .context("running stillframe")
}

/// The verdict of `verify` and its exit code; `more` are further arguments.
pub fn verify(store: &Path, more: &[&str]) -> Result<(String, i32, Value)> {
    let store = store.to_str().context("a path that is not UTF-8")?;
    let output = stillframe(&[&["verify", "latest", "--store", store, "--output", "json"], more].concat())?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("verify said: {}", String::from_utf8_lossy(&output.stderr)))?;
    let verdict = report["verdict"].as_str().context("no verdict")?.to_owned();
    Ok((verdict, output.status.code().unwrap_or(-1), report))
}

/// The records of one kind of the latest capture.
pub fn records(store: &Path, kind: &str) -> Result<Vec<Value>> {
    let store = store.to_str().context("a path that is not UTF-8")?;
    let output = stillframe(&["cat", kind, "latest", "--store", store])?;
    if !output.status.success() {
        bail!("cat {kind}: {}", String::from_utf8_lossy(&output.stderr));
    }
    output
        .stdout
        .split(|b| *b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| Ok(serde_json::from_slice(l)?))
        .collect()
}

/// The outcome of one kind in the latest capture.
pub fn outcome(store: &Path, kind: &str) -> Result<Value> {
    let path = store.to_str().context("a path that is not UTF-8")?;
    let output = stillframe(&["show", "latest", "--store", path, "--output", "json"])?;
    let view: Value = serde_json::from_slice(&output.stdout)?;
    let outcomes = view["outcomes"].as_array().context("no outcomes")?;
    outcomes
        .iter()
        .find(|o| o["kind"] == kind)
        .cloned()
        .with_context(|| format!("no outcome of {kind}"))
}

/// The folder of the only capture in a store.
pub fn folder(store: &Path) -> Result<PathBuf> {
    let mut found = std::fs::read_dir(store.join("evidence/local"))?;
    let one = found.next().context("no capture")??;
    match found.next() {
        None => Ok(one.path()),
        Some(_) => bail!("more than one capture"),
    }
}

/// Every object of a capture: its name and its path.
pub fn objects(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push((path.strip_prefix(folder)?.to_string_lossy().into_owned(), path));
            }
        }
    }
    found.sort();
    Ok(found)
}
