//! `doctor`: what of an order would fail, and why, before one is given. It asks, and changes nothing. Which role a host has it sees, not what that may do: only
//! IAM knows, which responders need no right to ask, and the host's first object shows it.

mod bucket;

use super::{
    At,
    capture::{Credentials, beside},
    whom::Whom,
};
use crate::{
    aws::{
        caller,
        ssm::{Property, Ssm},
    },
    ui::Ui,
};
use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use stillframe_evidence::{root::Hash, text::printable};

/// Its arguments.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    at: At,
    #[command(flatten)]
    whom: Whom,
    /// Whose credentials the hosts are to write with
    #[arg(long, value_enum, default_value_t)]
    credentials: Credentials,
    /// A document that must be there; may be given several times
    #[arg(long, default_values_t = ["Stillframe-Capture".to_owned(), "Stillframe-Stop".to_owned()])]
    document: Vec<String>,
}

/// How a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// As it must be.
    Good,
    /// Nobody knows from here.
    Unseen,
    /// Something will be less than it could be.
    Weak,
    /// An order would fail.
    Bad,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
pub struct Check {
    /// What.
    pub what: String,
    /// How it is.
    pub health: Health,
    /// What was seen, and what to do.
    pub about: String,
}

impl Check {
    /// That something is so.
    pub fn new(what: impl Into<String>, health: Health, about: impl Into<String>) -> Self {
        Check {
            what: what.into(),
            health,
            about: about.into(),
        }
    }
}

#[derive(Serialize)]
struct Report {
    health: Health,
    checks: Vec<Check>,
}

/// Looks at everything. 0 when all is good, 5 when something is weak, 1 when an order would fail.
pub fn run(args: &Args, ui: &Ui) -> Result<u8> {
    let store = args.at.store.to_str().filter(|s| s.starts_with("s3://"));
    let store = store.context("--store: evidence of hosts goes to s3://bucket/prefix")?;
    let reach = args.at.aws.reach();
    let mut checks = vec![match caller(&reach) {
        Ok(arn) => Check::new("credentials", Health::Good, arn),
        Err(error) => Check::new("credentials", Health::Bad, format!("{error:#}")),
    }];
    checks.extend(bucket::checks(store, &reach)?);
    let ssm = Ssm::open(&reach)?;
    for name in &args.document {
        let what = format!("document {name}");
        checks.push(match ssm.document(name) {
            Ok(document) => Check::new(
                what,
                Health::Good,
                format!("version {}, sha256 {}", document.version, document.hash),
            ),
            Err(error) => Check::new(what, Health::Bad, format!("{error:#}")),
        });
    }
    checks.push(agent());
    checks.extend(hosts(args, &ssm)?);
    checks.push(Check::new(
        "not looked at",
        Health::Unseen,
        "whether the agent is staged on the hosts, what their roles may put, whether what is lent would do",
    ));
    let health = checks.iter().map(|f| f.health).max().unwrap_or(Health::Good);
    let report = Report { health, checks };
    ui.print(&report, || text(&report));
    Ok(match health {
        Health::Good | Health::Unseen => 0,
        Health::Weak => 5,
        Health::Bad => 1,
    })
}

fn agent() -> Check {
    let bytes = beside().and_then(|path| {
        std::fs::read(&path)
            .map(|bytes| (path.clone(), bytes))
            .with_context(|| path.display().to_string())
    });
    match bytes {
        Ok((path, bytes)) if memchr::memmem::find(&bytes, b"/ld-linux").is_some() => Check::new(
            "agent",
            Health::Weak,
            format!(
                "{} needs the libc of this machine: stage the static one, and order with --agent-sha256",
                path.display()
            ),
        ),
        Ok((path, bytes)) => {
            let sha256 = Hash(Sha256::digest(bytes).into());
            Check::new(
                "agent",
                Health::Good,
                format!(
                    "{} sha256 {sha256}: what hosts must have, unless --agent-sha256 says otherwise",
                    path.display()
                ),
            )
        }
        Err(error) => Check::new(
            "agent",
            Health::Weak,
            format!("{error:#}; orders need --agent-sha256 then"),
        ),
    }
}

fn hosts(args: &Args, ssm: &Ssm) -> Result<Vec<Check>> {
    if !args.whom.is_meant() {
        return Ok(vec![Check::new(
            "hosts",
            Health::Weak,
            "none was named (--instance, --tag): none was looked at",
        )]);
    }
    let targets = args.whom.targets()?;
    let known = match ssm.hosts(&targets, usize::MAX) {
        Ok(Some(known)) => known,
        Ok(None) => {
            bail!("a resource group is resolved when a command is sent: name hosts with --instance or --tag")
        }
        Err(error) => return Ok(vec![Check::new("hosts", Health::Bad, format!("{error:#}"))]),
    };
    let mut checks: Vec<Check> = known
        .iter()
        .map(|host| {
            let about = format!(
                "{}, {}, SSM agent {}",
                host.ping, host.platform, host.agent_version
            );
            let (health, about) = match (host.ping.as_str(), host.platform.as_str()) {
                ("Online", "Linux") => (Health::Good, about),
                ("Online", "Windows") => (
                    Health::Weak,
                    format!("{about}: an order needs --windows-agent-sha256"),
                ),
                ("Online", _) => (Health::Bad, format!("{about}: there is no agent for this platform")),
                _ => (
                    Health::Bad,
                    format!("{about}: an order would not reach it (the SSM agent, its role, or its way to the endpoints)"),
                ),
            };
            Check::new(format!("host {}", host.id), health, about)
        })
        .collect();
    for id in args
        .whom
        .instance
        .iter()
        .filter(|id| !known.iter().any(|host| host.id == **id))
    {
        let why =
            "Systems Manager does not know it: no SSM agent, no role that may register, or another region";
        checks.push(Check::new(format!("host {id}"), Health::Bad, why));
    }
    if checks.is_empty() {
        checks.push(Check::new("hosts", Health::Bad, "nobody has that tag"));
    }
    let ids: Vec<String> = known.iter().map(|host| host.id.clone()).collect();
    match ssm.properties(&ids) {
        Ok(properties) => checks.extend(ids.iter().flat_map(|id| roles(id, &properties, args.credentials))),
        Err(error) => checks.push(Check::new("roles of hosts", Health::Unseen, format!("{error:#}"))),
    }
    Ok(checks)
}

/// Whose credentials a host has, and whether there is an agent that runs on it.
fn roles(id: &str, properties: &[Property], credentials: Credentials) -> Vec<Check> {
    let what = format!("role of {id}");
    let Some(property) = properties.iter().find(|one| one.id == id) else {
        return vec![Check::new(what, Health::Unseen, "Systems Manager does not say")];
    };
    let lend = "order with --credentials session";
    let (health, about) = match (&property.profile, &property.role) {
        _ if credentials == Credentials::Session => {
            (Health::Unseen, "not needed: credentials are lent".to_owned())
        }
        (none, role) if none.is_empty() && !role.is_empty() => (
            Health::Bad,
            format!(
                "registered as {role}, and outside EC2 no metadata service gives that role's credentials: {lend}"
            ),
        ),
        (none, _) if none.is_empty() => (
            Health::Bad,
            format!(
                "no instance profile, and Default Host Management's credentials are the SSM agent's alone: {lend}"
            ),
        ),
        (profile, _) => (
            Health::Unseen,
            format!(
                "instance profile {profile}; whether it has policies/instance-role.json, its first object shows"
            ),
        ),
    };
    let mut checks = vec![Check::new(what, health, about)];
    if !matches!(property.architecture.as_str(), "" | "x86_64") {
        checks.push(Check::new(
            format!("processor of {id}"),
            Health::Bad,
            format!("{}: the agent is one for x86_64", property.architecture),
        ));
    }
    checks
}

fn text(report: &Report) -> String {
    let lines = report.checks.iter().map(|check| {
        let health = match check.health {
            Health::Good => "good",
            Health::Unseen => "-",
            Health::Weak => "weak",
            Health::Bad => "BAD",
        };
        format!(
            "{health:<6}{:<32} {}",
            printable(check.what.as_bytes()),
            printable(check.about.as_bytes())
        )
    });
    lines.collect::<Vec<_>>().join("\n")
}
