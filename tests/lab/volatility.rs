//! Real Volatility 3 and drgn, each in its virtual environment, as `tests/run` installs them.

use crate::programs;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

fn environment(name: &str, program: &str) -> Result<PathBuf> {
    let path = programs::target()
        .join("lab")
        .join(name)
        .join("bin")
        .join(program);
    ensure!(
        path.exists(),
        "{}: not there; `tests/run` installs it",
        path.display()
    );
    Ok(path)
}

/// Runs a plugin on what `stillframe fetch` wrote to `folder` and on nothing else: no network, and caches of its own.
pub fn run(folder: &Path, image: &str, plugin: &[&str]) -> Result<Output> {
    let cache = folder.join("cache");
    let mut volatility = Command::new(environment("volatility", "vol")?);
    volatility.env("XDG_CACHE_HOME", &cache).env("HOME", &cache);
    volatility.args(["-q", "--offline", "-r", "json"]);
    if folder.join("plugins").is_dir() {
        volatility.arg("-p").arg(folder.join("plugins"));
    }
    volatility
        .arg("-s")
        .arg(folder.join("symbols"))
        .arg("-f")
        .arg(folder.join(image))
        .args(plugin);
    volatility.output().context("vol")
}

/// Runs a line that begins with `vol`, in a shell.
pub fn shell(folder: &Path, line: &str) -> Result<Output> {
    let cache = folder.join("cache");
    let program = environment("volatility", "vol")?;
    let path = std::env::var("PATH").unwrap_or_default();
    let bin = program.parent().context("vol lies nowhere")?;
    let mut shell = Command::new("sh");
    shell
        .args(["-c", line])
        .env("PATH", format!("{}:{path}", bin.display()));
    shell.env("XDG_CACHE_HOME", &cache).env("HOME", &cache);
    shell.output().context("sh")
}

/// The rows of a plugin; those below others come after them.
pub fn rows(folder: &Path, image: &str, plugin: &[&str]) -> Result<Vec<Value>> {
    let output = run(folder, image, plugin)?;
    let said = || {
        format!(
            "vol {plugin:?}: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            String::from_utf8_lossy(&output.stdout)
        )
    };
    ensure!(output.status.success(), "{}", said());
    let tree: Vec<Value> = serde_json::from_slice(&output.stdout).with_context(said)?;
    let mut rows = Vec::new();
    let mut open = tree;
    open.reverse();
    while let Some(mut row) = open.pop() {
        if let Some(Value::Array(children)) = row.get_mut("__children").map(Value::take) {
            open.extend(children.into_iter().rev());
        }
        rows.push(row);
    }
    Ok(rows)
}

/// Runs a script in drgn on a vmcore, without debug symbols.
pub fn drgn(core: &Path, script: &Path) -> Result<Output> {
    let program = environment("drgn", "drgn")?;
    Command::new(program)
        .arg("--no-default-symbols")
        .arg("-c")
        .arg(core)
        .arg(script)
        .output()
        .context("drgn")
}

/// Fails unless a symbol table is what Volatility's schema demands.
pub fn validate(isf: &Path) -> Result<()> {
    let python = environment("jsonschema", "python3")?;
    let code = "import glob, json, sys, jsonschema\n\
                schema = glob.glob(sys.argv[1] + '/lib/python3*/site-packages/volatility3/schemas/schema-6.2.0.json')[0]\n\
                jsonschema.validate(json.load(open(sys.argv[2])), json.load(open(schema)))";
    let output = Command::new(python)
        .args(["-c", code])
        .arg(programs::target().join("lab/volatility"))
        .arg(isf)
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
