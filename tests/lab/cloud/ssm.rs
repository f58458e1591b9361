//! Systems Manager, as far as Run Command goes: documents with versions and hashes, SendCommand with ids, tags and rate control, invocations by the page,
//! CancelCommand. Hosts either execute what they are sent, in namespaces and a process group of their own, or come to a fate that a test gives them.
//!
//! Modelled on the real agent 3.3.0.0 and the service's model: a value that breaks its pattern fails the step before anything runs; output is empty until a
//! step ends, and cut; a step whose precondition does not hold is skipped and is a success. Any code but 0 is `Failed`, and the next step runs all the same,
//! except (`agent/framework/runpluginutil` of that agent) that 168 ends the document well and erases what went to standard error, 169 ends it
//! badly, and 194 restarts the host, which then runs the step again.

use super::{
    document::{self, Step},
    http::{Handler, Reply, Request, Response},
    namespaces::Namespaces,
    post::Post,
};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::{
    collections::BTreeMap,
    io::Read as _,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{Command, Stdio},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Characters of output that a page shows.
const SHOWN: usize = 2500;
/// Invocations on a page.
const PAGE: usize = 50;
/// Properties of instances on a page: how many the service gives, it does not say.
const PROPERTIES: usize = 5;
/// A host that restarts more often for one step is taken for one that always will.
const RESTARTS: u32 = 3;

/// What becomes of a command on a host.
#[derive(Clone, Debug)]
pub enum Fate {
    /// It executes the document, with this environment beside the system's own.
    Executes(Vec<(String, String)>),
    /// A guest executes it.
    InGuest(Post),
    /// It says this on standard output, and ends well.
    Says(String),
    /// It fails.
    Fails,
    /// It ends well and runs no step.
    Skips,
    /// It never answers.
    Silent,
    /// The service cannot reach it.
    Undeliverable,
    /// It takes longer than it may.
    TooLong,
    /// It may not run the document.
    Denied,
}

/// A host.
#[derive(Clone, Debug)]
pub struct Host {
    /// Its instance id.
    pub id: String,
    /// `Linux` or `Windows`.
    pub platform: &'static str,
    /// Its tags.
    pub tags: BTreeMap<String, String>,
    /// What becomes of what it is sent.
    pub fate: Fate,
    /// Its instance profile.
    pub profile: Option<&'static str>,
    /// `x86_64`.
    pub architecture: &'static str,
}

impl Default for Host {
    fn default() -> Self {
        Host {
            id: String::new(),
            platform: "Linux",
            tags: BTreeMap::new(),
            fate: Fate::Silent,
            profile: Some("instances"),
            architecture: "x86_64",
        }
    }
}

#[derive(Clone, Debug)]
struct Invocation {
    host: String,
    status: &'static str,
    details: &'static str,
    output: String,
    errors: String,
    code: i32,
    /// Its process group, while it runs.
    group: Option<i32>,
}

#[derive(Debug)]
struct Sent {
    document: String,
    invocations: Vec<Invocation>,
    cancelled: bool,
    sent: Instant,
}

#[derive(Default)]
struct State {
    documents: BTreeMap<String, Value>,
    hosts: Vec<Host>,
    commands: BTreeMap<String, Sent>,
    next: u64,
    /// It ends: no host is started any more.
    closed: bool,
}

struct Inside {
    state: Mutex<State>,
    changed: Condvar,
    calls: AtomicU64,
    /// One call in so many is throttled; none where this is zero.
    throttle: AtomicU64,
    /// The next command is taken, and the answer is that the service failed.
    loses: AtomicBool,
    folder: tempfile::TempDir,
    /// Of each host that has executed anything.
    machines: Mutex<BTreeMap<String, Namespaces>>,
    /// How `aws:downloadContent` comes by an object of S3, by the host's rights.
    download: Mutex<Option<Download>>,
}

/// Gives what an address of S3 stands for.
pub type Download = Arc<dyn Fn(&str) -> Result<Vec<u8>> + Send + Sync>;

/// The service.
pub struct Ssm {
    inside: Arc<Inside>,
}

impl Ssm {
    /// Without documents and hosts.
    pub fn new() -> Result<Self> {
        let inside = Arc::new(Inside {
            state: Mutex::default(),
            changed: Condvar::new(),
            calls: AtomicU64::new(0),
            throttle: AtomicU64::new(0),
            loses: AtomicBool::new(false),
            folder: tempfile::tempdir()?,
            machines: Mutex::default(),
            download: Mutex::default(),
        });
        Ok(Ssm { inside })
    }

    /// What answers its requests; that they are signed is for the gate to see.
    pub fn handler(&self) -> Handler {
        let inside = self.inside.clone();
        Arc::new(move |request| Reply::Whole(inside.handle(&request)))
    }

    /// Enters a document. It must be valid.
    pub fn document(&self, name: &str, content: Value) -> Result<()> {
        document::validate(&content).with_context(|| name.to_owned())?;
        self.inside.state().documents.insert(name.to_owned(), content);
        Ok(())
    }

    /// Enters a host.
    pub fn host(&self, host: Host) {
        self.inside.state().hosts.push(host);
    }

    /// Has hosts download by it.
    pub fn download_by(&self, download: Download) {
        *self
            .inside
            .download
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(download);
    }

    /// Calls so far.
    pub fn calls(&self) -> u64 {
        self.inside.calls.load(Ordering::SeqCst)
    }

    /// True when every host is done with a command.
    pub fn is_over(&self, command: &str) -> bool {
        let state = self.inside.state();
        state.commands.get(command).is_some_and(|sent| {
            let mut each = sent.invocations.iter();
            each.all(|one| !matches!(one.status, "Pending" | "InProgress" | "Cancelling"))
        })
    }

    /// Takes the next command, and fails in place of an answer.
    pub fn lose_an_answer(&self) {
        self.inside.loses.store(true, Ordering::SeqCst);
    }

    /// How many commands were taken.
    pub fn taken(&self) -> usize {
        self.inside.state().commands.len()
    }

    /// Throttles one call of so many from here on.
    pub fn throttle(&self, one_in: u64) {
        self.inside.throttle.store(one_in, Ordering::SeqCst);
    }

    /// Every script that a host was given.
    pub fn scripts(&self) -> Vec<String> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(self.inside.folder.path())
            .into_iter()
            .flatten()
            .flatten()
        {
            found.extend(std::fs::read_to_string(entry.path()));
        }
        found
    }
}

impl Drop for Ssm {
    fn drop(&mut self) {
        let groups: Vec<i32> = {
            let mut state = self.inside.state();
            state.closed = true;
            state
                .commands
                .values()
                .flat_map(|c| &c.invocations)
                .filter_map(|i| i.group)
                .collect()
        };
        groups.into_iter().for_each(kill);
        self.inside.machines().clear();
    }
}

fn kill(group: i32) {
    // SAFETY: a signal to a process group that this process started.
    #[allow(unsafe_code)]
    unsafe {
        libc::kill(-group, libc::SIGKILL);
    }
}

fn refused(code: &str, message: impl Into<String>) -> Response {
    let message: String = message.into();
    Response::new(
        400,
        "application/x-amz-json-1.1",
        json!({"__type": code, "message": message}).to_string(),
    )
}

impl Inside {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn machines(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Namespaces>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(self: &Arc<Self>, request: &Request) -> Response {
        let calls = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let throttle = self.throttle.load(Ordering::SeqCst);
        if throttle > 0 && calls.is_multiple_of(throttle) {
            return refused("ThrottlingException", "Rate exceeded");
        }
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let operation = request
            .header("x-amz-target")
            .strip_prefix("AmazonSSM.")
            .unwrap_or_default();
        let answer = match operation {
            "DescribeDocument" => self.describe_document(&body),
            "DescribeInstanceInformation" => Ok(self.instances(&body)),
            "DescribeInstanceProperties" => self.properties(&body),
            "SendCommand" => self.send(&body),
            "ListCommandInvocations" => self.list(&body),
            "GetCommandInvocation" => self.get(&body),
            "CancelCommand" => self.cancel(&body),
            other => Err(("UnknownOperationException", other.to_owned())),
        };
        if operation == "SendCommand" && self.loses.swap(false, Ordering::SeqCst) {
            return Response::new(
                500,
                "application/x-amz-json-1.1",
                json!({"__type": "InternalServerError"}).to_string(),
            );
        }
        match answer {
            Ok(value) => Response::new(200, "application/x-amz-json-1.1", value.to_string()),
            Err((code, message)) => refused(code, message),
        }
    }

    fn describe_document(&self, body: &Value) -> Answer {
        let state = self.state();
        let name = body["Name"].as_str().unwrap_or_default();
        let content = state
            .documents
            .get(name)
            .ok_or(("InvalidDocument", name.to_owned()))?;
        Ok(
            json!({"Document": {"Name": name, "DocumentVersion": "1", "HashType": "Sha256", "Hash": hash(content), "Status": "Active", "SchemaVersion": "2.2"}}),
        )
    }

    fn instances(&self, body: &Value) -> Value {
        let state = self.state();
        let fits = |host: &&Host| {
            body["Filters"].as_array().into_iter().flatten().all(|filter| {
                let values = strings(&filter["Values"]);
                matches(host, filter["Key"].as_str().unwrap_or_default(), &values)
            })
        };
        let hosts: Vec<&Host> = state.hosts.iter().filter(fits).collect();
        let from = token(body);
        let page: Vec<Value> = hosts
            .iter()
            .skip(from)
            .take(PAGE)
            .map(|host| {
                let ping = if matches!(host.fate, Fate::Silent | Fate::Undeliverable) { "ConnectionLost" } else { "Online" };
                json!({"InstanceId": host.id, "PingStatus": ping, "PlatformType": host.platform, "AgentVersion": "3.3.0.0", "ComputerName": format!("{}.lab", host.id)})
            })
            .collect();
        paged(json!({"InstanceInformationList": page}), from + PAGE, hosts.len())
    }

    fn properties(&self, body: &Value) -> Answer {
        let filters = body["InstancePropertyFilterList"].as_array();
        let filters: Vec<&Value> = filters.into_iter().flatten().collect();
        let takes =
            |filter: &&Value| filter["key"] == "InstanceIds" && strings(&filter["valueSet"]).len() <= 40;
        if !filters.iter().all(takes) {
            return Err(("ValidationException", "InstancePropertyFilterList".to_owned()));
        }
        let state = self.state();
        let fits = |host: &&Host| {
            let mut sets = filters.iter().map(|filter| strings(&filter["valueSet"]));
            sets.all(|ids| ids.contains(&&host.id[..]))
        };
        let hosts: Vec<&Host> = state.hosts.iter().filter(fits).collect();
        let from = token(body);
        let one = |host: &&Host| {
            let in_ec2 = !host.id.starts_with("mi-");
            let (profile, role) = (host.profile.filter(|_| in_ec2), host.profile.filter(|_| !in_ec2));
            json!({"InstanceId": host.id, "InstanceRole": profile, "IamRole": role, "Architecture": host.architecture, "InstanceState": "running"})
        };
        let page: Vec<Value> = hosts.iter().skip(from).take(PROPERTIES).map(one).collect();
        Ok(paged(
            json!({"InstanceProperties": page}),
            from + PROPERTIES,
            hosts.len(),
        ))
    }

    fn send(self: &Arc<Self>, body: &Value) -> Answer {
        let mut state = self.state();
        let name = body["DocumentName"].as_str().unwrap_or_default().to_owned();
        let content = state
            .documents
            .get(&name)
            .cloned()
            .ok_or(("InvalidDocument", name.clone()))?;
        if !body["DocumentHash"].is_null() && body["DocumentHash"] != hash(&content) {
            return Err(("InvalidDocument", "the hash is another".to_owned()));
        }
        if body["Comment"].as_str().is_some_and(|c| c.len() > 100) {
            return Err((
                "ValidationException",
                "a comment of more than 100 characters".to_owned(),
            ));
        }
        let seconds = body["TimeoutSeconds"].as_u64().unwrap_or(3600);
        if !(30..=2_592_000).contains(&seconds) {
            return Err(("ValidationException", "TimeoutSeconds".to_owned()));
        }
        let ids = strings(&body["InstanceIds"]);
        if ids.len() > 50 {
            return Err(("ValidationException", "more than 50 instances".to_owned()));
        }
        let targets = body["Targets"].as_array().cloned().unwrap_or_default();
        let meant = |host: &&Host| {
            ids.contains(&&host.id[..])
                || (!targets.is_empty()
                    && targets.iter().all(|target| {
                        let values = strings(&target["Values"]);
                        matches(host, target["Key"].as_str().unwrap_or_default(), &values)
                    }))
        };
        let hosts: Vec<Host> = state.hosts.iter().filter(meant).cloned().collect();
        if let Some(unknown) = ids.iter().find(|id| !hosts.iter().any(|h| h.id == **id)) {
            return Err(("InvalidInstanceId", (*unknown).to_owned()));
        }
        let given: BTreeMap<String, String> = body["Parameters"]
            .as_object()
            .into_iter()
            .flatten()
            .filter_map(|(name, values)| Some((name.clone(), values[0].as_str()?.to_owned())))
            .collect();
        state.next += 1;
        let id = format!("00000000-0000-4000-8000-{:012}", state.next);
        let pending = |host: &Host| Invocation {
            host: host.id.clone(),
            status: "Pending",
            details: "Pending",
            output: String::new(),
            errors: String::new(),
            code: -1,
            group: None,
        };
        state.commands.insert(
            id.clone(),
            Sent {
                document: name.clone(),
                invocations: hosts.iter().map(pending).collect(),
                cancelled: false,
                sent: Instant::now(),
            },
        );
        drop(state);
        let spread = |key: &str, default: usize| share(body[key].as_str(), hosts.len(), default);
        let run = Run {
            inside: self.clone(),
            command: id.clone(),
            content,
            given,
            at_once: spread("MaxConcurrency", 50).max(1),
            errors: spread("MaxErrors", 0),
            delivery: Duration::from_secs(seconds),
        };
        std::thread::spawn(move || run.all(&hosts));
        Ok(json!({"Command": {"CommandId": id, "DocumentName": name, "Status": "Pending"}}))
    }

    fn list(&self, body: &Value) -> Answer {
        let state = self.state();
        let id = body["CommandId"].as_str().unwrap_or_default();
        let sent = state
            .commands
            .get(id)
            .ok_or(("InvalidCommandId", id.to_owned()))?;
        let details = body["Details"] == true;
        // The service knows of a command a moment after it gave its id.
        if sent.sent.elapsed() < Duration::from_millis(300) {
            return Ok(json!({"CommandInvocations": []}));
        }
        let from = token(body);
        let page: Vec<Value> = sent
            .invocations
            .iter()
            .skip(from)
            .take(PAGE)
            .map(|one| {
                let plugins = if details {
                    vec![json!({"Name": "step", "Status": one.status, "ResponseCode": one.code, "Output": cut(&format!("{}{}", one.output, errors_section(&one.errors)), SHOWN)})]
                } else {
                    Vec::new()
                };
                json!({"CommandId": id, "InstanceId": one.host, "DocumentName": sent.document, "Status": one.status, "StatusDetails": one.details, "CommandPlugins": plugins})
            })
            .collect();
        Ok(paged(
            json!({"CommandInvocations": page}),
            from + PAGE,
            sent.invocations.len(),
        ))
    }

    fn get(&self, body: &Value) -> Answer {
        let state = self.state();
        let id = body["CommandId"].as_str().unwrap_or_default();
        let sent = state
            .commands
            .get(id)
            .ok_or(("InvalidCommandId", id.to_owned()))?;
        let one = sent
            .invocations
            .iter()
            .find(|i| i.host == body["InstanceId"].as_str().unwrap_or_default());
        let one = one
            .filter(|_| sent.sent.elapsed() > Duration::from_millis(300))
            .ok_or(("InvocationDoesNotExist", String::new()))?;
        Ok(json!({
            "CommandId": id, "InstanceId": one.host, "Status": one.status, "StatusDetails": one.details, "ResponseCode": one.code,
            "StandardOutputContent": cut(&one.output, 24_000), "StandardErrorContent": cut(&one.errors, 8_000),
        }))
    }

    fn cancel(&self, body: &Value) -> Answer {
        let mut state = self.state();
        let id = body["CommandId"].as_str().unwrap_or_default();
        let sent = state
            .commands
            .get_mut(id)
            .ok_or(("InvalidCommandId", id.to_owned()))?;
        let ids = strings(&body["InstanceIds"]);
        if let Some(foreign) = ids
            .iter()
            .find(|id| !sent.invocations.iter().any(|i| i.host == **id))
        {
            return Err(("InvalidInstanceId", (*foreign).to_owned()));
        }
        sent.cancelled |= ids.is_empty();
        for one in sent
            .invocations
            .iter_mut()
            .filter(|i| matches!(i.status, "Pending" | "InProgress"))
            .filter(|i| ids.is_empty() || ids.contains(&&i.host[..]))
        {
            match one.group {
                Some(group) => {
                    one.status = "Cancelling";
                    one.details = "Cancelling";
                    kill(group);
                }
                None => (one.status, one.details) = ("Cancelled", "Cancelled"),
            }
        }
        Ok(json!({}))
    }
}

type Answer = Result<Value, (&'static str, String)>;

fn errors_section(errors: &str) -> String {
    if errors.is_empty() {
        String::new()
    } else {
        format!("\n----------ERROR-------\n{errors}")
    }
}

fn cut(text: &str, most: usize) -> String {
    text.chars().take(most).collect()
}

fn hash(content: &Value) -> String {
    hex::encode(Sha256::digest(content.to_string()))
}

fn token(body: &Value) -> usize {
    body["NextToken"]
        .as_str()
        .and_then(|t| t.parse().ok())
        .unwrap_or(0)
}

fn strings(list: &Value) -> Vec<&str> {
    let list = list.as_array().into_iter().flatten();
    list.filter_map(Value::as_str).collect()
}

fn paged(mut value: Value, next: usize, of: usize) -> Value {
    if next < of {
        value["NextToken"] = json!(next.to_string());
    }
    value
}

fn matches(host: &Host, key: &str, values: &[&str]) -> bool {
    match key.split_once(':') {
        Some(("tag", name)) => host.tags.get(name).is_some_and(|v| values.contains(&&v[..])),
        Some(("resource-groups", _)) => host.tags.get("group").is_some_and(|v| values.contains(&&v[..])),
        _ => key == "InstanceIds" && values.contains(&&host.id[..]),
    }
}

/// `50` or `10%` of so many.
fn share(text: Option<&str>, of: usize, default: usize) -> usize {
    match text {
        Some(text) => match text.strip_suffix('%') {
            Some(percent) => percent.parse::<usize>().map_or(default, |p| of * p / 100),
            None => text.parse().unwrap_or(default),
        },
        None => default,
    }
}

/// One command on its way through its hosts.
struct Run {
    inside: Arc<Inside>,
    command: String,
    content: Value,
    given: BTreeMap<String, String>,
    at_once: usize,
    errors: usize,
    delivery: Duration,
}

impl Run {
    fn all(self, hosts: &[Host]) {
        let run = Arc::new(self);
        let running = Arc::new(Mutex::new(0usize));
        for (index, host) in hosts.iter().enumerate() {
            loop {
                let mut state = run.inside.state();
                let Some(sent) = state.commands.get_mut(&run.command) else {
                    return;
                };
                let failed = sent
                    .invocations
                    .iter()
                    .filter(|i| matches!(i.status, "Failed" | "TimedOut"))
                    .count();
                if failed > run.errors && sent.invocations[index].status == "Pending" {
                    (sent.invocations[index].status, sent.invocations[index].details) =
                        ("Cancelled", "Terminated");
                    break;
                }
                if sent.cancelled || sent.invocations[index].status == "Cancelled" {
                    break;
                }
                let mut now = running.lock().unwrap_or_else(PoisonError::into_inner);
                if *now < run.at_once {
                    *now += 1;
                    drop(now);
                    drop(state);
                    match &host.fate {
                        // Only these take time of their own.
                        Fate::Executes(_) | Fate::InGuest(_) | Fate::Silent => {
                            let (run, host, running) = (run.clone(), host.clone(), running.clone());
                            std::thread::spawn(move || {
                                run.one(index, &host);
                                *running.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
                                run.inside.changed.notify_all();
                            });
                        }
                        _ => {
                            run.one(index, host);
                            *running.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
                        }
                    }
                    break;
                }
                drop(now);
                drop(run.inside.changed.wait_timeout(state, Duration::from_millis(100)));
            }
        }
    }

    fn set(&self, index: usize, change: impl FnOnce(&mut Invocation)) {
        let mut state = self.inside.state();
        if let Some(one) = state
            .commands
            .get_mut(&self.command)
            .and_then(|s| s.invocations.get_mut(index))
        {
            change(one);
        }
    }

    fn end(
        &self,
        index: usize,
        status: &'static str,
        details: &'static str,
        code: i32,
        output: String,
        errors: String,
    ) {
        self.set(index, |one| {
            *one = Invocation {
                host: one.host.clone(),
                status,
                details,
                output,
                errors,
                code,
                group: None,
            };
        });
    }

    fn one(&self, index: usize, host: &Host) {
        let nothing = String::new;
        match &host.fate {
            Fate::Says(text) => self.end(index, "Success", "Success", 0, text.clone(), nothing()),
            Fate::Skips => self.end(index, "Success", "Success", 0, nothing(), nothing()),
            Fate::Fails => self.end(index, "Failed", "Failed", 1, nothing(), "on purpose".to_owned()),
            Fate::Undeliverable => self.end(index, "Failed", "Undeliverable", -1, nothing(), nothing()),
            Fate::TooLong => self.end(index, "TimedOut", "Execution Timed Out", -1, nothing(), nothing()),
            Fate::Denied => self.end(index, "Failed", "Access Denied", -1, nothing(), nothing()),
            Fate::Silent => {
                std::thread::sleep(self.delivery.min(Duration::from_secs(60)));
                self.set(index, |one| {
                    if one.status == "Pending" {
                        (one.status, one.details) = ("TimedOut", "Delivery Timed Out");
                    }
                });
            }
            Fate::Executes(_) | Fate::InGuest(_) => {
                self.set(index, |one| {
                    (one.status, one.details) = ("InProgress", "In Progress")
                });
                match self.execute(index, host) {
                    Ok(()) => (),
                    Err(error) => self.end(index, "Failed", "Failed", 1, nothing(), format!("{error:#}")),
                }
            }
        }
    }

    fn execute(&self, index: usize, host: &Host) -> Result<()> {
        let steps = document::render(&self.content, &self.given, host.platform)?;
        let (mut output, mut errors, mut code) = (String::new(), String::new(), 0);
        for step in &steps {
            if self.is_called_off(index) {
                break;
            }
            let (exit, mut said, mut wrong) = self.step(index, host, step)?;
            let why = match exit {
                168 => Some("Step exited with code 168. Therefore, marking step as succeeded."),
                169 => Some("Step exited with code 169. Therefore, marking step as Failed."),
                0 => None,
                _ if step.decides => Some("Step was found to have onFailure property."),
                _ => None,
            };
            if let Some(why) = why {
                let why = format!("\n{why} Further document steps will be skipped.");
                said += &why;
                wrong += &why;
            }
            if exit == 168 {
                wrong.clear();
            } else if exit != 0 {
                code = exit;
            }
            output += &said;
            errors += &wrong;
            if why.is_some() {
                break;
            }
        }
        match code {
            _ if self.is_called_off(index) => self.end(index, "Cancelled", "Cancelled", code, output, errors),
            0 => self.end(index, "Success", "Success", code, output, errors),
            124 => self.end(index, "TimedOut", "Execution Timed Out", -1, output, errors),
            _ => self.end(index, "Failed", "Failed", code, output, errors),
        }
        Ok(())
    }

    /// True once it was cancelled, or the service ended: nothing more is begun then.
    fn is_called_off(&self, index: usize) -> bool {
        let state = self.inside.state();
        let sent = state.commands.get(&self.command);
        let sent = sent.filter(|s| !s.cancelled);
        let one = sent.and_then(|s| s.invocations.get(index));
        state.closed || one.is_none_or(|one| matches!(one.status, "Cancelling" | "Cancelled"))
    }

    /// Its code, and what it said on standard output and on standard error.
    fn step(&self, index: usize, host: &Host, step: &Step) -> Result<(i32, String, String)> {
        if step.action == "aws:downloadContent" {
            let done = self.download(step);
            return Ok(match done {
                Ok(()) => (0, String::new(), String::new()),
                Err(error) => (1, String::new(), format!("{error:#}")),
            });
        }
        ensure!(
            step.action == "aws:runShellScript",
            "{}: this lab's hosts do not run {}",
            step.name,
            step.action
        );
        let environment = match &host.fate {
            Fate::InGuest(post) => {
                let ended = post.run(&step.script, Duration::from_secs(step.timeout))?;
                ensure!(ended.0 != 194, "this lab's guests are not restarted");
                return Ok(ended);
            }
            Fate::Executes(environment) => environment,
            other => bail!("{other:?} executes nothing"),
        };
        for _ in 0..=RESTARTS {
            let ended = self.script(index, host, step, environment)?;
            if ended.0 != 194 || self.is_called_off(index) {
                return Ok(ended);
            }
            self.inside.machines().remove(&host.id);
        }
        bail!("{}: restarts {} again and again", step.name, host.id)
    }

    /// What runs on a host, ready for a program; the host is started where it is not up.
    fn on(&self, host: &Host) -> Result<Command> {
        let mut machines = self.inside.machines();
        ensure!(!self.inside.state().closed, "the lab is closed");
        if !machines.contains_key(&host.id) {
            machines.insert(host.id.clone(), Namespaces::start(&format!("{}.lab", host.id))?);
        }
        Ok(machines.get(&host.id).context("no machine")?.command())
    }

    /// As the SSM agent does it: into the destination where that is a folder, else under that name.
    fn download(&self, step: &Step) -> Result<()> {
        let (source, destination) = step.script.split_once('\n').context("no source")?;
        let source: Value = serde_json::from_str(source)?;
        let address = source["path"].as_str().context("no path")?;
        let download = self
            .inside
            .download
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let bytes = download.context("this lab's hosts do not download")?(address)?;
        let mut path = std::path::PathBuf::from(destination);
        if path.is_dir() {
            path.push(address.rsplit('/').next().unwrap_or_default());
        }
        std::fs::write(&path, bytes).with_context(|| path.display().to_string())
    }

    fn script(
        &self,
        index: usize,
        host: &Host,
        step: &Step,
        environment: &[(String, String)],
    ) -> Result<(i32, String, String)> {
        let path = self
            .inside
            .folder
            .path()
            .join(format!("{}-{}-{}.sh", self.command, host.id, step.name));
        std::fs::write(&path, &step.script)?;
        let mut child = self
            .on(host)?
            .arg("sh")
            .arg(&path)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .envs(environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let group = i32::try_from(child.id())?;
        self.set(index, |one| one.group = Some(group));
        let (mut out, mut err) = (
            child.stdout.take().context("no output")?,
            child.stderr.take().context("no errors")?,
        );
        let reader = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = err.read_to_end(&mut text);
            text
        });
        let over = Instant::now() + Duration::from_secs(step.timeout);
        let watch = std::thread::spawn({
            let inside = self.inside.clone();
            let command = self.command.clone();
            move || {
                while Instant::now() < over {
                    let state = inside.state();
                    let runs = state
                        .commands
                        .get(&command)
                        .and_then(|s| s.invocations.get(index))
                        .is_some_and(|i| i.group == Some(group));
                    drop(state);
                    if !runs {
                        return false;
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
                kill(group);
                true
            }
        });
        let mut text = Vec::new();
        let _ = out.read_to_end(&mut text);
        let status = child.wait()?;
        self.set(index, |one| one.group = None);
        let late = watch.join().unwrap_or(false);
        let errors = reader.join().unwrap_or_default();
        let code = if late {
            124
        } else {
            status
                .code()
                .or_else(|| status.signal().map(|s| 128 + s))
                .unwrap_or(1)
        };
        Ok((
            code,
            String::from_utf8_lossy(&text).into_owned(),
            String::from_utf8_lossy(&errors).into_owned(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A document of two steps sent to one host that executes it; when it is over: status, output, errors.
    fn sent(ssm: &Ssm, first: &str, more: Value) -> Result<(String, String, String)> {
        let mut document = json!({
            "schemaVersion": "2.2",
            "description": "a test",
            "mainSteps": [
                {"name": "first", "action": "aws:runShellScript", "precondition": {"StringEquals": ["platformType", "Linux"]}, "inputs": {"timeoutSeconds": "60", "runCommand": [first]}},
                {"name": "second", "action": "aws:runShellScript", "precondition": {"StringEquals": ["platformType", "Linux"]}, "inputs": {"timeoutSeconds": "60", "runCommand": ["echo second"]}}
            ]
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            document["mainSteps"][0][key] = value.clone();
        }
        ssm.document("Test", document)?;
        let answer = |operation: &str, body: Value| -> Result<Value> {
            let request = Request {
                method: "POST".to_owned(),
                path: "/".to_owned(),
                query: String::new(),
                headers: [("x-amz-target".to_owned(), format!("AmazonSSM.{operation}"))].into(),
                body: body.to_string().into_bytes(),
            };
            Ok(serde_json::from_slice(&ssm.inside.handle(&request).body)?)
        };
        let sent = answer(
            "SendCommand",
            json!({"DocumentName": "Test", "InstanceIds": ["i-1"]}),
        )?;
        let of = json!({"CommandId": sent["Command"]["CommandId"], "InstanceId": "i-1"});
        let began = Instant::now();
        loop {
            let one = answer("GetCommandInvocation", of.clone())?;
            let text = |key: &str| one[key].as_str().unwrap_or_default().to_owned();
            if ["Success", "Failed"].contains(&&text("Status")[..]) {
                return Ok((
                    text("Status"),
                    text("StandardOutputContent"),
                    text("StandardErrorContent"),
                ));
            }
            ensure!(began.elapsed() < Duration::from_secs(60), "{one}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn service() -> Result<Ssm> {
        let ssm = Ssm::new()?;
        ssm.host(Host {
            id: "i-1".to_owned(),
            fate: Fate::Executes(Vec::new()),
            ..Host::default()
        });
        Ok(ssm)
    }

    #[test]
    fn codes_end_a_document_as_the_agent_has_it() -> Result<()> {
        let ssm = service()?;
        for (code, status, goes_on, wrong) in [
            (0, "Success", true, "wrong\n"),
            (1, "Failed", true, "wrong\n"),
            (168, "Success", false, ""),
            (
                169,
                "Failed",
                false,
                "wrong\n\nStep exited with code 169. Therefore, marking step as Failed. Further document steps will be skipped.",
            ),
        ] {
            let script = format!("echo first; echo wrong >&2; exit {code}");
            let (ended, output, errors) = sent(&ssm, &script, Value::Null)?;
            assert_eq!((&ended[..], &errors[..]), (status, wrong), "{code}");
            assert!(output.starts_with("first\n"), "{code}: {output}");
            assert_eq!(output.contains("second"), goes_on, "{code}: {output}");
        }
        let (ended, output, _) = sent(&ssm, "exit 1", json!({"onFailure": "exit"}))?;
        assert_eq!(ended, "Failed");
        assert!(
            output.contains("onFailure") && !output.contains("second"),
            "{output}"
        );
        Ok(())
    }

    /// Processes of this machine that were started by this, wherever they run.
    fn running(command: &str) -> usize {
        let line = command.replace(' ', "\0") + "\0";
        let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        all.filter(|entry| std::fs::read(entry.path().join("cmdline")).is_ok_and(|l| l == line.as_bytes()))
            .count()
    }

    /// A command that nobody else runs.
    fn sleep(seconds: u32) -> String {
        format!("sleep {seconds}{}", std::process::id())
    }

    #[test]
    fn a_host_that_restarts_runs_its_step_again() -> Result<()> {
        let ssm = service()?;
        let folder = tempfile::tempdir()?;
        let mark = folder.path().join("mark").display().to_string();
        let left = sleep(1);
        let first = format!("{left} >/dev/null 2>&1 & echo first");
        assert_eq!(sent(&ssm, &first, Value::Null)?.0, "Success");
        assert_eq!(running(&left), 1);
        let script = format!("if [ -e {mark} ]; then echo again; else : > {mark}; exit 194; fi");
        let (ended, output, _) = sent(&ssm, &script, Value::Null)?;
        assert_eq!((&ended[..], &output[..]), ("Success", "again\nsecond\n"));
        assert_eq!(running(&left), 0, "it outlived the restart");
        let (ended, _, errors) = sent(&ssm, "exit 194", Value::Null)?;
        assert_eq!(ended, "Failed");
        assert!(errors.contains("again and again"), "{errors}");
        Ok(())
    }

    #[test]
    fn a_host_is_one_of_its_own() -> Result<()> {
        let ssm = service()?;
        let left = sleep(2);
        let look = format!(
            "readlink /proc/self/ns/pid /proc/self/ns/mnt /proc/self/ns/uts /proc/self/ns/ipc; cat /proc/sys/kernel/hostname; {left} >/dev/null 2>&1 &"
        );
        let (_, output, errors) = sent(&ssm, &look, Value::Null)?;
        let seen: Vec<&str> = output.lines().collect();
        for (kind, theirs) in ["pid", "mnt", "uts", "ipc"].iter().zip(&seen) {
            let ours = std::fs::read_link(format!("/proc/self/ns/{kind}"))?;
            assert!(theirs.starts_with(&format!("{kind}:[")), "{output}{errors}");
            assert_ne!(ours.as_os_str(), *theirs);
        }
        assert_eq!(seen.get(4), Some(&"i-1.lab"), "{output}");
        // What a command leaves behind is there for the next, and gone with the host.
        let again = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '";
        assert!(sent(&ssm, again, Value::Null)?.1.contains(&left));
        assert_eq!(running(&left), 1);
        drop(ssm);
        assert_eq!(running(&left), 0, "it outlives its host");
        Ok(())
    }
}
