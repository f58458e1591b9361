//! Command documents of schema 2.2, as the SSM agent 3.3 takes them: what it refuses, and what a host would run. There is no public schema of this version;
//! the rules are those of the user guide and of the agent, as far as the project's documents use them.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeMap;

/// The largest document, run-time values included.
const MAX_DOCUMENT: usize = 64 << 10;
const ACTIONS: [&str; 4] = [
    "aws:runShellScript",
    "aws:runPowerShellScript",
    "aws:downloadContent",
    "aws:configurePackage",
];
const TYPES: [&str; 4] = ["String", "StringList", "Integer", "Boolean"];

/// One step that a host runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its name.
    pub name: String,
    /// `aws:runShellScript`.
    pub action: String,
    /// The script, or for a download its source and its destination.
    pub script: String,
    /// Seconds.
    pub timeout: u64,
    /// Its failure ends the document.
    pub decides: bool,
}

/// Refuses what a host or the service would refuse, and what our own rules forbid: a parameter without a pattern, a step without a timeout or a
/// precondition.
pub fn validate(document: &Value) -> Result<()> {
    ensure!(document["schemaVersion"] == "2.2", "schemaVersion is not 2.2");
    ensure!(
        document["description"].as_str().is_some_and(|d| !d.is_empty()),
        "no description"
    );
    for key in document.as_object().context("not an object")?.keys() {
        ensure!(
            ["schemaVersion", "description", "parameters", "mainSteps"].contains(&&key[..]),
            "{key}: no key of a document"
        );
    }
    let none = serde_json::Map::new();
    let parameters = document["parameters"].as_object().unwrap_or(&none);
    for (name, parameter) in parameters {
        ensure!(
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric()),
            "{name}: no name of a parameter"
        );
        for key in parameter
            .as_object()
            .context("a parameter that is no object")?
            .keys()
        {
            let known = [
                "type",
                "description",
                "default",
                "allowedPattern",
                "allowedValues",
            ];
            ensure!(
                known.contains(&&key[..]),
                "{name}: {key} is no key of a parameter"
            );
        }
        ensure!(
            parameter["type"].as_str().is_some_and(|t| TYPES.contains(&t)),
            "{name}: no type"
        );
        ensure!(
            parameter["description"].as_str().is_some_and(|d| !d.is_empty()),
            "{name}: no description"
        );
        match (
            parameter["allowedPattern"].as_str(),
            parameter["allowedValues"].as_array(),
        ) {
            (Some(pattern), _) => {
                ensure!(
                    pattern.starts_with('^') && pattern.ends_with('$'),
                    "{name}: a pattern that is not anchored allows anything"
                );
                // The SSM agent compiles them with Go's regexp, which takes no more; a document with one fails on every host.
                let counts = pattern
                    .split(['{', ',', '}'])
                    .filter_map(|n| n.parse::<u32>().ok());
                ensure!(
                    counts.max() <= Some(1000),
                    "{name}: a count above 1000 in its pattern"
                );
                let compiled = regex_lite::Regex::new(pattern).map_err(|e| anyhow::anyhow!("{name}: {e}"))?;
                for danger in [
                    "'", "\"", "`", "$(id)", ";", "&", "|", "\n", "{{ X }}", "a b", "a'b",
                ] {
                    ensure!(
                        !compiled.is_match(danger),
                        "{name}: its pattern lets {danger:?} into a script"
                    );
                }
            }
            (None, Some(values)) => ensure!(
                !values.is_empty() && values.iter().all(Value::is_string),
                "{name}: values that are none"
            ),
            (None, None) => bail!("{name}: spliced into a script, and nothing says what it may be"),
        }
        if let Some(default) = parameter.get("default") {
            let default = default
                .as_str()
                .with_context(|| format!("{name}: a default of another type"))?;
            allowed(name, parameter, default)?;
        }
    }
    let steps = document["mainSteps"].as_array().context("no mainSteps")?;
    ensure!(!steps.is_empty(), "no steps");
    let mut names = Vec::new();
    for step in steps {
        let name = step["name"].as_str().context("a step without a name")?;
        ensure!(
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'),
            "{name}: no name of a step"
        );
        ensure!(!names.contains(&name), "{name}: two steps of one name");
        names.push(name);
        for key in step.as_object().context("a step that is no object")?.keys() {
            ensure!(
                ["name", "action", "precondition", "inputs", "onFailure"].contains(&&key[..]),
                "{name}: {key} is no key of a step"
            );
        }
        ensure!(
            step.get("onFailure").is_none_or(|it| it == "exit"),
            "{name}: onFailure is exit, or is not there"
        );
        let action = step["action"].as_str().unwrap_or_default();
        ensure!(ACTIONS.contains(&action), "{name}: no action {action}");
        let condition = &step["precondition"]["StringEquals"];
        let pair = condition
            .as_array()
            .with_context(|| format!("{name}: no precondition: every platform would try it"))?;
        ensure!(
            pair.len() == 2 && pair.iter().all(Value::is_string),
            "{name}: a precondition has two sides"
        );
        ensure!(
            step["precondition"].as_object().is_some_and(|p| p.len() == 1),
            "{name}: a step takes one precondition"
        );
        if pair[0] == "platformType" {
            let wanted = match action {
                "aws:runShellScript" => Some("Linux"),
                "aws:runPowerShellScript" => Some("Windows"),
                _ => None,
            };
            ensure!(
                wanted.is_none_or(|w| pair[1] == w),
                "{name}: {action} where the platform is {}",
                pair[1]
            );
        }
        let inputs = step["inputs"]
            .as_object()
            .with_context(|| format!("{name}: no inputs"))?;
        if action.starts_with("aws:run") {
            let lines = inputs
                .get("runCommand")
                .and_then(Value::as_array)
                .with_context(|| format!("{name}: no runCommand"))?;
            ensure!(
                !lines.is_empty() && lines.iter().all(Value::is_string),
                "{name}: lines that are none"
            );
            let timeout = inputs
                .get("timeoutSeconds")
                .and_then(Value::as_str)
                .with_context(|| format!("{name}: no timeout: an hour would be taken in silence"))?;
            ensure!(
                timeout.starts_with("{{") || timeout.parse::<u64>().is_ok_and(|t| (5..=172_800).contains(&t)),
                "{name}: a timeout outside 5 to 172800 becomes an hour in silence"
            );
        }
        for used in placeholders(&serde_json::to_string(step)?) {
            ensure!(
                parameters.contains_key(&used),
                "{name}: {{{{ {used} }}}} is no parameter"
            );
        }
    }
    let text = serde_json::to_string(document)?;
    ensure!(text.len() <= MAX_DOCUMENT, "larger than 64 KB");
    let used = placeholders(&serde_json::to_string(&document["mainSteps"])?);
    for name in parameters.keys() {
        ensure!(used.contains(name), "{name}: never used");
    }
    Ok(())
}

fn placeholders(text: &str) -> Vec<String> {
    let parts = text.split("{{").skip(1);
    parts
        .filter_map(|rest| Some(rest.split_once("}}")?.0.trim().to_owned()))
        .collect()
}

fn allowed(name: &str, parameter: &Value, value: &str) -> Result<()> {
    if let Some(pattern) = parameter["allowedPattern"].as_str() {
        ensure!(
            regex_lite::Regex::new(pattern)?.is_match(value),
            "{name}: the value does not match {pattern}"
        );
    }
    if let Some(values) = parameter["allowedValues"].as_array() {
        ensure!(
            values.iter().any(|v| v == value),
            "{name}: the value is none of those allowed"
        );
    }
    Ok(())
}

/// What a host of this platform runs: values are spliced into the text as they are, which is what the agent does, after each was held against its
/// pattern.
pub fn render(document: &Value, given: &BTreeMap<String, String>, platform: &str) -> Result<Vec<Step>> {
    let none = serde_json::Map::new();
    let parameters = document["parameters"].as_object().unwrap_or(&none);
    for name in given.keys() {
        ensure!(
            parameters.contains_key(name),
            "{name}: the document has no such parameter"
        );
    }
    let mut values = BTreeMap::new();
    for (name, parameter) in parameters {
        let value = match given.get(name) {
            Some(value) => value.clone(),
            None => parameter["default"]
                .as_str()
                .with_context(|| format!("{name}: no value"))?
                .to_owned(),
        };
        allowed(name, parameter, &value)?;
        values.insert(name.clone(), value);
    }
    let splice = |text: &str| {
        let mut out = text.to_owned();
        for (name, value) in &values {
            for form in [format!("{{{{ {name} }}}}"), format!("{{{{{name}}}}}")] {
                out = out.replace(&form, value);
            }
        }
        out
    };
    let mut steps = Vec::new();
    for step in document["mainSteps"].as_array().into_iter().flatten() {
        let sides = step["precondition"]["StringEquals"]
            .as_array()
            .context("no precondition")?;
        let side = |index: usize| sides.get(index).and_then(Value::as_str).unwrap_or_default();
        let holds = match side(0) {
            "platformType" => side(1) == platform,
            text => splice(text) == splice(side(1)),
        };
        if !holds {
            continue;
        }
        let inputs = &step["inputs"];
        let action = step["action"].as_str().unwrap_or_default().to_owned();
        let script = match inputs["runCommand"].as_array() {
            Some(lines) => {
                lines
                    .iter()
                    .filter_map(Value::as_str)
                    .collect::<Vec<_>>()
                    .join("\n")
                    + "\n"
            }
            None => format!(
                "{}\n{}",
                inputs["sourceInfo"].as_str().unwrap_or_default(),
                inputs["destinationPath"].as_str().unwrap_or_default()
            ),
        };
        let timeout = splice(inputs["timeoutSeconds"].as_str().unwrap_or("3600"))
            .parse()
            .unwrap_or(3600);
        steps.push(Step {
            name: step["name"].as_str().unwrap_or_default().to_owned(),
            action,
            script: splice(&script),
            timeout: if (5..=172_800).contains(&timeout) {
                timeout
            } else {
                3600
            },
            decides: step["onFailure"] == "exit",
        });
    }
    Ok(steps)
}
