//! Ordering a capture by way of Systems Manager: who is meant, which document and which agent, pinned; then the order, written down; then it is sent.

use super::{Args, orderer};
use crate::{
    aws::{
        caller,
        session::{ADDRESS_SECONDS, Lender, Session},
        ssm::{Document, Host, Spread, Ssm, Targets, Unanswered},
    },
    command::{order::Order, watch, whom::Whom},
    stored::Store,
    ui::{Ui, bytes},
};
use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use jiff::Timestamp;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use stillframe_evidence::{layout::CaptureId, root::Hash, text::printable};

/// Whom, and how.
#[derive(ClapArgs)]
#[command(next_help_heading = "By way of Systems Manager")]
pub struct Remote {
    #[command(flatten)]
    pub whom: Whom,
    /// The document that captures
    #[arg(long, default_value = "Stillframe-Capture")]
    pub document: String,
    /// The SHA-256 that the agent on the host must have [default: that of the agent beside this program]
    #[arg(long)]
    pub agent_sha256: Option<Hash>,
    /// The SHA-256 that the agent must have on Windows hosts
    #[arg(long)]
    pub windows_agent_sha256: Option<Hash>,
    /// Where the agent is on Linux hosts
    #[arg(long, default_value = "/opt/stillframe/stillframe-agent")]
    pub agent_path: String,
    /// Have the agent fetched first, to Linux hosts: https://BUCKET.s3.REGION.amazonaws.com/KEY
    #[arg(long, value_parser = address)]
    pub agent_url: Option<String>,
    /// Whose credentials the hosts write with: their own role's, or those of a session that is lent to each (needs --instance, --session-role, --order-bucket)
    #[arg(long, value_enum, default_value_t)]
    pub credentials: Credentials,
    /// The role whose session is lent, by its ARN
    #[arg(long, required_if_eq("credentials", "session"))]
    pub session_role: Option<String>,
    /// The bucket in which lent credentials lie for a moment; not that of the evidence
    #[arg(long, required_if_eq("credentials", "session"))]
    pub order_bucket: Option<String>,
    /// Seconds that lent credentials are good for; `watch` renews them
    #[arg(long, default_value_t = 3600, value_parser = clap::value_parser!(i32).range(900..=43_200))]
    pub session_seconds: i32,
    /// Where the hosts reach AWS, where that is not as usual
    #[arg(long)]
    pub host_endpoint_url: Option<String>,
    /// Hosts at once: a number or a percentage
    #[arg(long, default_value = "50")]
    pub max_concurrency: String,
    /// Failures after which the rest is not begun
    #[arg(long, default_value = "100%")]
    pub max_errors: String,
    /// Seconds in which a host must begin
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(i32).range(30..=2_592_000))]
    pub delivery_timeout: i32,
    /// Seconds in which a capture must end
    #[arg(long, default_value_t = 43_200, value_parser = clap::value_parser!(u32).range(5..=172_800))]
    pub timeout: u32,
    /// Stay and watch
    #[arg(long)]
    pub watch: bool,
    /// GiB of memory that a host has, for the estimate: Systems Manager does not know
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=24_576))]
    pub memory_gib: u64,
    #[command(flatten)]
    pub stall: watch::Stall,
    /// Say who is meant and what would be sent, and touch nothing
    #[arg(long)]
    pub plan: bool,
}

/// What the document takes.
fn address(text: &str) -> Result<String, String> {
    let rest = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"));
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._:/-".contains(&b);
    match rest {
        Some(rest) if (1..=300).contains(&rest.len()) && rest.bytes().all(fits) => Ok(text.to_owned()),
        _ => Err("https://BUCKET.s3.REGION.amazonaws.com/KEY is expected".to_owned()),
    }
}

/// Whose credentials a host writes with.
#[derive(Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Credentials {
    /// Its own role's.
    #[default]
    Role,
    /// Those of a session that is lent.
    Session,
}

impl Remote {
    fn session(&self, store: &str) -> Result<Option<Session>> {
        if self.credentials == Credentials::Role {
            if self.session_role.is_some() || self.order_bucket.is_some() {
                bail!("--session-role and --order-bucket are for --credentials session");
            }
            return Ok(None);
        }
        if self.whom.instance.is_empty() {
            bail!("--credentials session is for hosts named with --instance: each gets an order of its own");
        }
        let (Some(role), Some(bucket)) = (self.session_role.clone(), self.order_bucket.clone()) else {
            bail!("--credentials session needs --session-role and --order-bucket");
        };
        if store.split('/').nth(2) == Some(bucket.as_str()) {
            bail!(
                "--order-bucket {bucket}: that is the bucket of the evidence, where nothing can be taken back"
            );
        }
        Ok(Some(Session {
            role,
            bucket,
            seconds: self.session_seconds,
        }))
    }
}

/// What one host is likely to come to. An estimate: how well memory compresses and how fast the way to S3 is, nobody knows before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Estimate {
    /// Bytes that are stored.
    bytes: u64,
    /// Seconds from its begin to its end.
    seconds: u64,
    /// Objects that are put.
    objects: u64,
    /// US dollars for the requests, and for a month of keeping, at the list prices of us-east-1.
    dollars: f64,
}

impl Estimate {
    /// Of memory a good half is stored (benches of guests: 0.43), at 50 MiB a second; at 5 dollars a million puts and 0.023 a GiB and month. Records are a few MiB.
    fn of(profile: &str, memory_gib: u64) -> Self {
        let memory = if profile == "triage" { 0 } else { memory_gib << 30 };
        let bytes = memory / 2 + (4 << 20);
        // As the agent cuts memory (`Sizes::of`): small pieces on a small host, and no more of them than a manifest can name.
        let least = if memory_gib < 3 { 1 << 20 } else { 4 << 20 };
        let objects = 40 + memory / (memory >> 16).clamp(least, 16 << 20);
        Estimate {
            bytes,
            seconds: 10 + bytes / (50 << 20),
            objects,
            dollars: objects as f64 * 5e-6 + bytes as f64 / f64::from(1 << 30) * 0.023,
        }
    }
}

#[derive(Serialize)]
struct Plan<'a> {
    capture: CaptureId,
    document: &'a Document,
    targets: &'a Targets,
    /// Nothing where only Systems Manager can say.
    hosts: Option<Vec<Host>>,
    agent_sha256: &'a str,
    parameters: &'a BTreeMap<&'static str, String>,
    /// Of each host.
    estimate: Estimate,
    /// Whose credentials are lent.
    session: Option<&'a Session>,
}

#[derive(Serialize)]
struct Sent<'a> {
    capture: CaptureId,
    commands: &'a [String],
}

/// Orders it.
pub fn run(args: &Args, ui: &Ui) -> Result<u8> {
    let remote = &args.remote;
    let store_name = args.at.store.to_str().filter(|s| s.starts_with("s3://"));
    let store_name = store_name.context("--store: evidence of hosts goes to s3://bucket/prefix")?;
    for (flag, given) in [
        ("--image", args.image.is_some()),
        ("--pid", !args.pid.is_empty()),
        ("--lime-module", args.lime_module.is_some()),
    ] {
        if given {
            bail!("{flag} is for --local");
        }
    }
    let targets = remote.whom.targets()?;
    let ssm = Ssm::open(&args.at.aws.reach())?;
    let document = ssm.document(&remote.document)?;
    let agent_sha256 = match remote.agent_sha256 {
        Some(hash) => hash.to_string(),
        None => {
            let path = super::beside()?;
            let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
            Hash(Sha256::digest(bytes).into()).to_string()
        }
    };
    let region = args
        .at
        .aws
        .region
        .clone()
        .or_else(|| std::env::var("AWS_REGION").ok())
        .context("--region or AWS_REGION: the hosts must be told where the store is")?;
    // Seconds are enough, and all that the document takes.
    let ordered_at = Timestamp::from_second(Timestamp::now().as_second())?;
    let mut order = Order {
        capture: CaptureId::mint(),
        case: args.case.clone(),
        profile: args.profile.clone(),
        store: store_name.to_owned(),
        nonce: uuid::Uuid::new_v4().simple().to_string(),
        ordered_by: orderer(),
        caller: None,
        ordered_at,
        targets,
        document,
        agent_sha256,
        agent: remote.agent_path.clone(),
        session: remote.session(store_name)?,
        loans: BTreeMap::new(),
        commands: Vec::new(),
        refused: None,
    };
    let mut parameters: BTreeMap<&'static str, String> = [
        ("CaptureId", order.capture.to_string()),
        ("Store", order.store.clone()),
        ("Case", order.case.to_string()),
        ("Profile", order.profile.clone()),
        ("Nonce", order.nonce.clone()),
        ("OrderedBy", order.ordered_by.clone()),
        ("OrderedAt", order.ordered_at.to_string()),
        ("Region", region),
        ("Agent", order.agent.clone()),
        ("AgentSha256", order.agent_sha256.clone()),
        ("TimeoutSeconds", remote.timeout.to_string()),
    ]
    .into();
    parameters.extend(
        remote
            .windows_agent_sha256
            .map(|hash| ("WindowsAgentSha256", hash.to_string())),
    );
    parameters.extend(args.max_rate.map(|rate| ("MaxRate", rate.to_string())));
    parameters.extend(remote.host_endpoint_url.clone().map(|url| ("EndpointUrl", url)));
    if let Some(url) = &remote.agent_url {
        parameters.insert("Fetch", "true".to_owned());
        parameters.insert("AgentUrl", url.clone());
    }
    let estimate = Estimate::of(&order.profile, remote.memory_gib);
    if let Some(session) = &order.session
        && !remote.watch
        && u64::try_from(session.seconds).is_ok_and(|seconds| seconds < estimate.seconds)
    {
        bail!(
            "about {} s are needed for {} GiB of memory, and what is lent ends after {} s: --watch renews it, --session-seconds makes it longer, --memory-gib corrects the estimate",
            estimate.seconds,
            remote.memory_gib,
            session.seconds
        );
    }
    if remote.plan {
        let plan = Plan {
            capture: order.capture,
            hosts: ssm.hosts(&order.targets, usize::MAX)?,
            document: &order.document,
            targets: &order.targets,
            agent_sha256: &order.agent_sha256,
            parameters: &parameters,
            estimate,
            session: order.session.as_ref(),
        };
        ui.print(&plan, || text(&plan));
        let nobody = plan.hosts.as_ref().is_some_and(Vec::is_empty);
        return Ok(if nobody { 5 } else { 0 });
    }
    // Such an order is taken, and nothing comes of it. Where this may not be asked, it is sent all the same.
    if matches!(order.targets, Targets::Keys(_))
        && matches!(ssm.hosts(&order.targets, 1), Ok(Some(hosts)) if hosts.is_empty())
    {
        bail!(
            "Systems Manager knows no host in this region with that tag (with all of them, where several are given), and nothing was sent; --instance names a host by its id"
        );
    }
    // The document and the host learn a name; who that is to AWS, whoever is on the host need not know.
    match caller(&args.at.aws.reach()) {
        Ok(arn) => order.caller = Some(arn),
        Err(error) => ui.warn(&format!("the order does not say who you are to AWS: {error:#}")),
    }
    let store = Store::open(&args.at)?;
    order
        .keep(&store)
        .context("the order could not be written down, and nothing was sent")?;
    let mut spread = Spread {
        max_concurrency: remote.max_concurrency.clone(),
        max_errors: remote.max_errors.clone(),
        delivery_seconds: remote.delivery_timeout,
    };
    if order.session.is_some() {
        // A host that begins when the address is no longer good could only fail.
        spread.delivery_seconds = spread.delivery_seconds.min(ADDRESS_SECONDS - 30);
    }
    let comment = format!("Stillframe {} {}", order.capture, order.case);
    let sent = send(&mut order, args, &ssm, &store, &mut parameters, &spread, &comment);
    let code = match sent {
        Ok(()) => 0,
        Err(error) if order.commands.is_empty() && error.is::<Unanswered>() => {
            return Err(error.context("nobody knows whether the order was taken: look for its comment in Run Command's history before it is given again"));
        }
        Err(error) if order.commands.is_empty() => {
            let error = error.context("the order was not sent: stillframe doctor says what of it would fail");
            order.refused = Some(format!("{error:#}"));
            if let Err(why) = order.keep(&store) {
                ui.warn(&format!("that it was refused could not be written down: {why:#}"));
            }
            return Err(error);
        }
        // Others are at work already.
        Err(error) => {
            ui.warn(&format!("not every host got the order: {error:#}"));
            5
        }
    };
    let sent = Sent {
        capture: order.capture,
        commands: &order.commands,
    };
    let commands = order.commands.join(", ");
    if remote.watch {
        ui.say(&format!("capture {}  command {commands}", order.capture));
        let ended = watch::follow(&store, &order, &args.at, &remote.stall, &ssm, ui)?;
        return Ok(if ended == 0 { code } else { ended });
    }
    ui.print(&sent, || {
        format!(
            "capture {}  command {commands}\n{:<16}  stillframe watch {} --store {}",
            order.capture,
            "next",
            order.capture,
            printable(order.store.as_bytes())
        )
    });
    Ok(code)
}

/// Sends one command; or one a host, each with the address of the credentials that are lent to it. What was sent is written down at once: without it nobody could stop it.
fn send(
    order: &mut Order,
    args: &Args,
    ssm: &Ssm,
    store: &Store,
    parameters: &mut BTreeMap<&'static str, String>,
    spread: &Spread,
    comment: &str,
) -> Result<()> {
    let (Some(session), Targets::Instances(hosts)) = (order.session.clone(), order.targets.clone()) else {
        let command = ssm.send(&order.document, &order.targets, parameters, spread, comment)?;
        return sent(order, store, command);
    };
    let lender = Lender::open(&args.at.aws.reach(), &session)?;
    for host in &hosts {
        let loan = lender.lend(&order.store, order.capture, host)?;
        order.loans.insert(host.clone(), loan);
        let target = Targets::Instances(vec![host.clone()]);
        let command = lender.address(order.capture, host).and_then(|address| {
            parameters.insert("OrderUrl", address);
            ssm.send(&order.document, &target, parameters, spread, comment)
        });
        match command {
            Ok(command) => sent(order, store, command)?,
            Err(error) => {
                let left = lender.take_back(order.capture, host);
                return Err(error.context(match left {
                    Ok(()) => format!("{host}: what was lent is taken back"),
                    Err(why) => format!("{host}: and what was lent could not be taken back ({why:#})"),
                }));
            }
        }
    }
    Ok(())
}

fn sent(order: &mut Order, store: &Store, command: String) -> Result<()> {
    order.commands.push(command);
    order.keep(store).with_context(|| {
        format!(
            "capture {} was sent as {}, and that could not be written down",
            order.capture,
            order.commands.join(", ")
        )
    })
}

fn text(plan: &Plan) -> String {
    let mut lines = vec![format!(
        "document          {} version {} sha256 {}",
        plan.document.name, plan.document.version, plan.document.hash
    )];
    lines.push(format!("agent             sha256 {}", plan.agent_sha256));
    for (name, value) in plan.parameters {
        lines.push(format!("  {name:<16} {}", printable(value.as_bytes())));
    }
    lines.push(format!(
        "estimate          a host: {} stored in {} objects, {} s, {:.2} dollars in the first month",
        bytes(plan.estimate.bytes),
        plan.estimate.objects,
        plan.estimate.seconds,
        plan.estimate.dollars
    ));
    if let Some(session) = plan.session {
        lines.push(format!(
            "lent              {} for {} s, by way of s3://{}",
            printable(session.role.as_bytes()),
            session.seconds,
            printable(session.bucket.as_bytes())
        ));
    }
    for host in plan.hosts.iter().flatten() {
        lines.push(format!(
            "host              {}  {}  {}  SSM agent {}  {}",
            printable(host.id.as_bytes()),
            printable(host.ping.as_bytes()),
            printable(host.platform.as_bytes()),
            printable(host.agent_version.as_bytes()),
            printable(host.name.as_bytes())
        ));
    }
    match &plan.hosts {
        None => lines.push("host              those of the resource group, when it is sent".to_owned()),
        Some(hosts) if hosts.is_empty() => {
            lines.push("host              none that Systems Manager knows".to_owned());
        }
        Some(_) => (),
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_follow_memory() {
        let triage = Estimate::of("triage", 512);
        assert!(triage.bytes < 10 << 20 && triage.dollars < 0.01, "{triage:?}");
        let large = Estimate::of("full", 64);
        assert!((32 << 30..33 << 30).contains(&large.bytes), "{large:?}");
        assert!(
            (600..800).contains(&large.seconds) && large.objects == 40 + (16 << 10),
            "{large:?}"
        );
        assert!((0.8..0.85).contains(&large.dollars), "{large:?}");
        assert_eq!(Estimate::of("memory", 1).objects, 40 + 1024);
    }
}
