//! Run Command: what is sent, and what became of it on each host. Statuses stay apart as Systems Manager has them, and a `Success` counts only with the
//! line that the agent prints at its end: a step that a host skipped is a success, too.

use super::{connect, said};
use anyhow::{Context as _, Result, anyhow, bail};
use aws_sdk_ssm::{
    Client,
    config::retry::RetryConfig,
    error::{ProvideErrorMetadata, SdkError},
    types::{
        CommandInvocation, DocumentHashType, InstanceInformationStringFilter, InstancePropertyFilter,
        InstancePropertyFilterKey, Target,
    },
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};
use stillframe_store::aws::Reach;
use tokio::runtime::Runtime;

/// How often the SDK tries: a fleet is throttled now and then.
const ATTEMPTS: u32 = 8;
/// Between two requests of one watcher, at least: so that many can watch.
const PACE: Duration = Duration::from_millis(550);
/// What the agent's one line begins with.
const RESULT: &str = "stillframe-result ";
/// Instances that DescribeInstanceProperties takes by their ids.
const MOST_PROPERTIES: usize = 40;
/// Instances that one SendCommand takes by their ids.
pub const MOST_INSTANCES: usize = 50;

/// Systems Manager in one region.
pub struct Ssm {
    runtime: Runtime,
    client: Client,
    last: std::cell::Cell<Option<Instant>>,
}

/// A document, pinned.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Document {
    /// Its name.
    pub name: String,
    /// A number, never `$LATEST`.
    pub version: String,
    /// SHA-256 as the service states it.
    pub hash: String,
}

/// Whom a command is for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Targets {
    /// By their ids.
    Instances(Vec<String>),
    /// By key and values, as `tag:Role` or `resource-groups:Name`.
    Keys(BTreeMap<String, Vec<String>>),
}

/// How a command is spread over a fleet.
#[derive(Clone, Debug)]
pub struct Spread {
    /// Hosts at once: a number or a percentage.
    pub max_concurrency: String,
    /// Failures after which the rest is not begun.
    pub max_errors: String,
    /// Seconds in which a host must begin.
    pub delivery_seconds: i32,
}

/// A host that Systems Manager knows.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// Its instance id.
    pub id: String,
    /// `Online`, `ConnectionLost`.
    pub ping: String,
    /// `Linux`, `Windows`.
    pub platform: String,
    /// Of the SSM agent.
    pub agent_version: String,
    /// What it calls itself.
    pub name: String,
}

/// What Systems Manager has from EC2 of a host.
#[derive(Clone, Debug)]
pub struct Property {
    /// Its instance id.
    pub id: String,
    /// Its instance profile: whose credentials its metadata service gives. Blank without one.
    pub profile: String,
    /// The role by which a machine outside EC2 (`mi-…`) is registered.
    pub role: String,
    /// `x86_64`, `arm64`; blank where it is not known.
    pub architecture: String,
}

/// What became of a command on one host.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Invocation {
    /// The host.
    pub host: String,
    /// The command that reached it.
    pub command: String,
    /// How far it is.
    pub state: State,
    /// What the agent said at its end.
    pub told: Option<Told>,
    /// What was printed instead, where nothing was told: its last line.
    pub output: Option<String>,
}

/// How far a host is. What ended badly is kept apart by how it ended.
#[derive(Clone, Copy, Debug, Serialize, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Not begun.
    Pending,
    /// Under way.
    InProgress,
    /// To be tried again by the service.
    Delayed,
    /// Being cancelled.
    Cancelling,
    /// Everything was captured.
    Complete,
    /// The capture is closed, and something is missing in it; its outcomes say what.
    Partial,
    /// It was asked to end, and closed the capture with what it had.
    Stopped,
    /// The agent could not close the capture.
    Failed,
    /// Systems Manager calls it a success, and no agent said anything: skipped, or not ours.
    NoResult,
    /// The script failed before or beside the agent.
    ScriptFailed,
    /// Killed.
    Cancelled,
    /// It did not begin in time.
    DeliveryTimedOut,
    /// It did not end in time.
    ExecutionTimedOut,
    /// It cannot be reached.
    Undeliverable,
    /// Not begun, because too many others failed.
    Terminated,
    /// It may not run the document.
    AccessDenied,
    /// A status that this program does not know.
    Unknown,
}

impl State {
    /// True when nothing more will come.
    pub fn is_over(self) -> bool {
        !matches!(
            self,
            State::Pending | State::InProgress | State::Delayed | State::Cancelling
        )
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            State::Pending => "pending",
            State::InProgress => "in progress",
            State::Delayed => "delayed",
            State::Cancelling => "cancelling",
            State::Complete => "complete",
            State::Partial => "partial",
            State::Stopped => "stopped",
            State::Failed => "failed",
            State::NoResult => "no result",
            State::ScriptFailed => "script failed",
            State::Cancelled => "cancelled",
            State::DeliveryTimedOut => "delivery timed out",
            State::ExecutionTimedOut => "execution timed out",
            State::Undeliverable => "undeliverable",
            State::Terminated => "terminated",
            State::AccessDenied => "access denied",
            State::Unknown => "unknown",
        })
    }
}

/// The agent's one line.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Told {
    /// The capture.
    pub capture: String,
    /// `complete`, `partial`, `stopped`, `failed`.
    pub outcome: String,
    /// The key of the chain.
    pub key: Option<String>,
    /// Events in it.
    pub events: u64,
    /// Why it is not complete.
    pub why: Option<String>,
}

/// Nobody knows whether a command was taken: its answer was lost, or it was the service that failed.
#[derive(Debug)]
pub struct Unanswered(String);

impl std::fmt::Display for Unanswered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unanswered {}

fn refused<E, R>(error: &SdkError<E, R>) -> anyhow::Error
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
    R: std::fmt::Debug,
{
    anyhow!("Systems Manager: {}", said(error))
}

impl Ssm {
    /// Opens it.
    pub fn open(reach: &Reach) -> Result<Self> {
        let (runtime, config) = connect(reach, ATTEMPTS)?;
        Ok(Ssm {
            client: Client::new(&config),
            runtime,
            last: std::cell::Cell::new(None),
        })
    }

    fn pace(&self) {
        if let Some(last) = self.last.get() {
            std::thread::sleep(PACE.saturating_sub(last.elapsed()));
        }
        self.last.set(Some(Instant::now()));
    }

    /// A document's newest version, by its number, and its hash.
    pub fn document(&self, name: &str) -> Result<Document> {
        let answer = self
            .runtime
            .block_on(self.client.describe_document().name(name).send())
            .map_err(|error| {
                refused(&error).context(format!("document {name}: has it been deployed in this region?"))
            })?;
        let document = answer.document().context("no document in the answer")?;
        let (Some(version), Some(hash)) = (document.document_version(), document.hash()) else {
            bail!("document {name}: the service states no version or no hash of it");
        };
        Ok(Document {
            name: name.to_owned(),
            version: version.to_owned(),
            hash: hash.to_owned(),
        })
    }

    /// The hosts that are meant, as far as Systems Manager knows them, or the first of them, that many at least; nothing for a resource group, which it
    /// resolves when a command is sent.
    pub fn hosts(&self, targets: &Targets, enough: usize) -> Result<Option<Vec<Host>>> {
        if matches!(targets, Targets::Keys(keys) if !keys.keys().all(|key| key.starts_with("tag:"))) {
            return Ok(None);
        }
        let filters: Vec<(String, Vec<String>)> = match targets {
            Targets::Instances(ids) => vec![("InstanceIds".to_owned(), ids.clone())],
            Targets::Keys(keys) => keys
                .iter()
                .map(|(key, values)| (key.clone(), values.clone()))
                .collect(),
        };
        let filters = filters
            .into_iter()
            .map(|(key, values)| {
                InstanceInformationStringFilter::builder()
                    .key(key)
                    .set_values(Some(values))
                    .build()
                    .map_err(|error| anyhow!("a filter: {error}"))
            })
            .collect::<Result<Vec<_>>>()?;
        let (mut hosts, mut token) = (Vec::new(), None);
        loop {
            self.pace();
            let answer = self
                .runtime
                .block_on(
                    self.client
                        .describe_instance_information()
                        .set_filters(Some(filters.clone()).filter(|f| !f.is_empty()))
                        .max_results(50)
                        .set_next_token(token)
                        .send(),
                )
                .map_err(|error| refused(&error))?;
            hosts.extend(answer.instance_information_list().iter().map(|one| Host {
                id: one.instance_id().unwrap_or_default().to_owned(),
                ping: one.ping_status().map_or("", |p| p.as_str()).to_owned(),
                platform: one.platform_type().map_or("", |p| p.as_str()).to_owned(),
                agent_version: one.agent_version().unwrap_or_default().to_owned(),
                name: one.computer_name().unwrap_or_default().to_owned(),
            }));
            token = answer.next_token().filter(|t| !t.is_empty()).map(str::to_owned);
            if token.is_none() || hosts.len() >= enough {
                return Ok(Some(hosts));
            }
        }
    }

    /// What EC2 says of these hosts.
    pub fn properties(&self, ids: &[String]) -> Result<Vec<Property>> {
        let mut found = Vec::new();
        for ids in ids.chunks(MOST_PROPERTIES) {
            let filter = InstancePropertyFilter::builder()
                .key(InstancePropertyFilterKey::InstanceIds)
                .set_value_set(Some(ids.to_vec()))
                .build()
                .map_err(|error| anyhow!("a filter: {error}"))?;
            let mut token = None;
            loop {
                self.pace();
                let request = self.client.describe_instance_properties();
                let request = request.instance_property_filter_list(filter.clone());
                let answer = self
                    .runtime
                    .block_on(request.set_next_token(token).send())
                    .map_err(|error| refused(&error))?;
                found.extend(answer.instance_properties().iter().map(|one| Property {
                    id: one.instance_id().unwrap_or_default().to_owned(),
                    profile: one.instance_role().unwrap_or_default().to_owned(),
                    role: one.iam_role().unwrap_or_default().to_owned(),
                    architecture: one.architecture().unwrap_or_default().to_owned(),
                }));
                token = answer.next_token().filter(|t| !t.is_empty()).map(str::to_owned);
                if token.is_none() {
                    break;
                }
            }
        }
        Ok(found)
    }

    /// Sends a document; the id of the command comes back. [`Unanswered`] where it may have been taken all the same.
    pub fn send(
        &self,
        document: &Document,
        targets: &Targets,
        parameters: &BTreeMap<&str, String>,
        spread: &Spread,
        comment: &str,
    ) -> Result<String> {
        let parameters: HashMap<String, Vec<String>> = parameters
            .iter()
            .map(|(k, v)| ((*k).to_owned(), vec![v.clone()]))
            .collect();
        let mut request = self
            .client
            .send_command()
            .document_name(&document.name)
            .document_version(&document.version)
            .document_hash(&document.hash)
            .document_hash_type(DocumentHashType::Sha256)
            .set_parameters(Some(parameters))
            .timeout_seconds(spread.delivery_seconds)
            .max_concurrency(&spread.max_concurrency)
            .max_errors(&spread.max_errors)
            .comment(comment);
        request = match targets {
            Targets::Instances(ids) => request.set_instance_ids(Some(ids.clone())),
            Targets::Keys(keys) => request.set_targets(Some(
                keys.iter()
                    .map(|(key, values)| {
                        Target::builder()
                            .key(key)
                            .set_values(Some(values.clone()))
                            .build()
                    })
                    .collect(),
            )),
        };
        // Never sent twice for an answer that was lost: two agents of one capture would contradict each other. What was throttled was not taken.
        let mut tries = 0;
        let answer = loop {
            tries += 1;
            let once = aws_sdk_ssm::config::Config::builder().retry_config(RetryConfig::disabled());
            match self
                .runtime
                .block_on(request.clone().customize().config_override(once).send())
            {
                Ok(answer) => break answer,
                Err(error) if error.code() == Some("ThrottlingException") && tries < ATTEMPTS => {
                    std::thread::sleep(PACE.saturating_mul(tries));
                }
                Err(error) => {
                    let status = error.raw_response().map(|answer| answer.status());
                    return Err(if status.is_some_and(|status| status.is_client_error()) {
                        refused(&error)
                    } else {
                        Unanswered(refused(&error).to_string()).into()
                    });
                }
            }
        };
        let id = answer.command().and_then(|c| c.command_id());
        id.map(str::to_owned).context("the service gave no command id")
    }

    /// What became of a command, host by host, page by page.
    pub fn invocations(&self, command: &str) -> Result<Vec<Invocation>> {
        let (mut found, mut token) = (Vec::new(), None);
        loop {
            self.pace();
            let answer = self
                .runtime
                .block_on(
                    self.client
                        .list_command_invocations()
                        .command_id(command)
                        .details(true)
                        .max_results(50)
                        .set_next_token(token)
                        .send(),
                )
                .map_err(|error| refused(&error))?;
            found.extend(answer.command_invocations().iter().map(invocation));
            token = answer.next_token().filter(|t| !t.is_empty()).map(str::to_owned);
            if token.is_none() {
                found.sort_by(|a: &Invocation, b| a.host.cmp(&b.host));
                return Ok(found);
            }
        }
    }

    /// Has a command killed where it runs, on these hosts or on all.
    pub fn cancel(&self, command: &str, hosts: &[String]) -> Result<()> {
        let request = self
            .client
            .cancel_command()
            .command_id(command)
            .set_instance_ids(Some(hosts.to_vec()).filter(|hosts| !hosts.is_empty()));
        self.runtime
            .block_on(request.send())
            .map(|_| ())
            .map_err(|error| refused(&error))
    }
}

fn invocation(one: &CommandInvocation) -> Invocation {
    // What a host says of the other platform's step is nothing that happened.
    let outputs: Vec<&str> = one
        .command_plugins()
        .iter()
        .filter_map(|p| p.output())
        .filter(|output| !output.contains("Step execution skipped"))
        .collect();
    let told = outputs.iter().flat_map(|o| o.lines()).find_map(told);
    let last = outputs
        .iter()
        .rev()
        .find_map(|o| o.lines().rev().find(|line| !line.trim().is_empty()));
    let details = one.status_details().unwrap_or_default();
    Invocation {
        host: one.instance_id().unwrap_or_default().to_owned(),
        command: one.command_id().unwrap_or_default().to_owned(),
        state: state(one.status().map_or("", |s| s.as_str()), details, told.as_ref()),
        output: if told.is_none() {
            last.map(str::to_owned)
        } else {
            None
        },
        told,
    }
}

/// The agent's line, where this is it.
fn told(line: &str) -> Option<Told> {
    serde_json::from_str(line.trim().strip_prefix(RESULT)?).ok()
}

fn state(status: &str, details: &str, told: Option<&Told>) -> State {
    let squeezed: String = details.chars().filter(|c| !c.is_whitespace()).collect();
    match squeezed.as_str() {
        "DeliveryTimedOut" => return State::DeliveryTimedOut,
        "ExecutionTimedOut" => return State::ExecutionTimedOut,
        "Undeliverable" => return State::Undeliverable,
        "Terminated" => return State::Terminated,
        "AccessDenied" => return State::AccessDenied,
        _ => (),
    }
    match (status, told.map(|t| t.outcome.as_str())) {
        ("Pending", _) => State::Pending,
        ("InProgress", _) => State::InProgress,
        ("Delayed", _) => State::Delayed,
        ("Cancelling", _) => State::Cancelling,
        ("Cancelled", _) => State::Cancelled,
        ("TimedOut", _) => State::ExecutionTimedOut,
        ("Success", Some("complete")) => State::Complete,
        ("Success", Some("partial")) => State::Partial,
        ("Success", Some("stopped")) => State::Stopped,
        ("Success", _) => State::NoResult,
        ("Failed", Some("failed")) => State::Failed,
        ("Failed", _) => State::ScriptFailed,
        _ => State::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_success_needs_its_line() {
        let line = r#"stillframe-result {"capture":"c","outcome":"partial","key":"k","events":9,"why":null}"#;
        let partial = told(line);
        assert_eq!(state("Success", "Success", partial.as_ref()), State::Partial);
        assert_eq!(state("Success", "Success", None), State::NoResult);
        for not in [
            "",
            "stillframe-result",
            "stillframe-result {}",
            "x stillframe-result {}",
        ] {
            assert_eq!(told(not), None, "{not}");
        }
    }

    #[test]
    fn what_ended_badly_is_kept_apart() {
        for (status, details, expected) in [
            ("TimedOut", "Delivery Timed Out", State::DeliveryTimedOut),
            ("TimedOut", "DeliveryTimedOut", State::DeliveryTimedOut),
            ("TimedOut", "Execution Timed Out", State::ExecutionTimedOut),
            ("Failed", "Undeliverable", State::Undeliverable),
            ("Cancelled", "Terminated", State::Terminated),
            ("Failed", "Access Denied", State::AccessDenied),
            ("Cancelled", "Cancelled", State::Cancelled),
            ("Failed", "Failed", State::ScriptFailed),
            ("Whatever", "", State::Unknown),
        ] {
            assert_eq!(state(status, details, None), expected, "{status} {details}");
        }
        // A line from before the end does not make a success of a failure.
        let told = Told {
            capture: String::new(),
            outcome: "complete".to_owned(),
            key: None,
            events: 1,
            why: None,
        };
        assert_eq!(state("Failed", "Failed", Some(&told)), State::ScriptFailed);
        assert_eq!(
            state("TimedOut", "Execution Timed Out", Some(&told)),
            State::ExecutionTimedOut
        );
    }
}
