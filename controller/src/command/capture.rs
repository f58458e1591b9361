//! `capture`: orders a capture and follows it to its verdict. `--local` runs the agent that lies beside this program.

mod remote;

pub use remote::Credentials;

use super::{At, verify};
use crate::{
    stored::Store,
    ui::{Activity, Ui, bytes},
};
use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args as ClapArgs;
use jiff::Timestamp;
use serde::Serialize;
use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::PathBuf,
    process::{Command, Stdio},
    time::Instant,
};
use stillframe_evidence::{
    chain::{Closing, Event, MAX_EVENT, What},
    layout::{CaptureId, CaseName},
    text::printable,
    verdict::{Report, Verdict, count},
};

/// Its arguments.
#[derive(ClapArgs)]
pub struct Args {
    /// Capture this machine
    #[arg(long)]
    local: bool,
    #[command(flatten)]
    remote: remote::Remote,
    #[command(flatten)]
    at: At,
    /// The case that the capture belongs to
    #[arg(long, default_value = "unassigned")]
    case: CaseName,
    /// What to collect: triage; memory, between two looks at what is volatile; full, which is both
    #[arg(long, default_value = "triage", value_parser = ["triage", "memory", "full"])]
    profile: String,
    /// The agent to run, when it is not the one beside this program
    #[arg(long)]
    agent: Option<PathBuf>,
    /// Bring in an image that somebody else took (LiME, AVML, raw, ELF core) instead of collecting from this host
    #[arg(long)]
    image: Option<PathBuf>,
    /// Capture the memory of this process too; may be given several times
    #[arg(long)]
    pid: Vec<u32>,
    /// Read memory with this LiME module, built for exactly this kernel, instead of /proc/kcore
    #[arg(long, requires = "lime_sha256")]
    lime_module: Option<PathBuf>,
    /// The SHA-256 that the module must have
    #[arg(long, requires = "lime_module")]
    lime_sha256: Option<String>,
    /// Read at most so many MiB of memory a second
    #[arg(long)]
    max_rate: Option<u64>,
    /// Let the memory of this host be written to one of its own disks, which destroys what was deleted there
    #[arg(long)]
    on_this_disk: bool,
}

impl Args {
    /// What the agent is told of memory.
    fn memory(&self) -> Vec<std::ffi::OsString> {
        let mut list: Vec<std::ffi::OsString> = Vec::new();
        let mut add = |flag: &str, value: std::ffi::OsString| list.extend([flag.into(), value]);
        self.image.iter().for_each(|path| add("--image", path.into()));
        self.pid
            .iter()
            .for_each(|pid| add("--pid", pid.to_string().into()));
        self.lime_module
            .iter()
            .for_each(|path| add("--lime-module", path.into()));
        self.lime_sha256
            .iter()
            .for_each(|hash| add("--lime-sha256", hash.into()));
        self.max_rate
            .iter()
            .for_each(|rate| add("--max-rate", rate.to_string().into()));
        if self.on_this_disk {
            list.push("--on-this-disk".into());
        }
        list
    }
}

#[derive(Serialize)]
struct Done<'a> {
    report: &'a Report,
    outcomes: Vec<&'a stillframe_evidence::chain::Outcome>,
    closing: Option<&'a Closing>,
}

/// Orders it.
pub fn run(args: &Args, ui: &Ui) -> Result<u8> {
    match (args.local, args.remote.whom.is_meant()) {
        (true, false) if args.remote.plan => {
            bail!("--plan is for hosts; of this machine: stillframe-agent capture --plan --store DIR")
        }
        (true, false) => local(args, ui),
        (false, true) => remote::run(args, ui),
        (true, true) => bail!(
            "--local is this machine, and --instance, --tag and --resource-group are others: one of them"
        ),
        _ => bail!("say who: --local, or --instance, --tag or --resource-group"),
    }
}

fn local(args: &Args, ui: &Ui) -> Result<u8> {
    let agent = match &args.agent {
        Some(agent) => agent.clone(),
        None => beside()?,
    };
    if args.at.store.as_os_str() == "-" {
        bail!(
            "--store -: a stream is what the agent gives: stillframe-agent capture --store - | stillframe receive --store DIR"
        );
    }
    ui.outlive_reader();
    // Ctrl-C reaches the agent too, which then ends in good order; this program waits for it and reports.
    ctrlc::set_handler(|| ()).context("no handler for Ctrl-C")?;
    let id = CaptureId::mint();
    let began = Instant::now();
    let mut child = Command::new(&agent)
        .args([
            "capture",
            "--output",
            "json",
            "--id",
            &id.to_string(),
            "--case",
            args.case.as_str(),
        ])
        .args([
            "--profile",
            &args.profile,
            "--ordered-by",
            &orderer(),
            "--ordered-at",
            &Timestamp::now().to_string(),
        ])
        .args(["--nonce", &uuid::Uuid::now_v7().simple().to_string()])
        .arg("--store")
        .arg(&args.at.store)
        .args(args.memory())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{}: the agent cannot be started", agent.display()))?;
    let output = child
        .stdout
        .take()
        .ok_or_else(|| anyhow!("the agent has no output"))?;
    let followed = follow(BufReader::new(output), args, ui);
    let status = child.wait().context("waiting for the agent")?;
    if status.code() == Some(2) {
        // It has said why.
        return Ok(2);
    }
    followed?;
    let stored = Store::open(&args.at)?.find(&id.to_string())?;
    let report = verify::report(&stored, None);
    let closing = report.chain.as_ref().and_then(|c| c.closing());
    let outcomes = report.chain.iter().flat_map(|c| c.outcomes()).collect();
    ui.print(
        &Done {
            report: &report,
            outcomes,
            closing,
        },
        || {
            let mut cost = format!("   {:.1} s", began.elapsed().as_secs_f64());
            if let Some(footprint) = closing.map(|c| &c.footprint) {
                let cpu = footprint.cpu_us.map_or(0.0, |us| us as f64 / 1e6);
                cost += &format!(
                    ", {} resident, {cpu:.1} s CPU",
                    bytes(footprint.peak_resident.unwrap_or(0))
                );
            }
            let mut text: Vec<String> = Vec::new();
            if report.verdict != Verdict::SelfConsistent {
                text.push(verify::text(&report));
            } else {
                text.push(verify::summary(&report) + &cost);
            }
            let store = printable(args.at.store.as_os_str().as_encoded_bytes());
            if args.image.is_some() {
                text.push(format!(
                    "{:<16}  stillframe fetch {id} --store {store} --to DIR",
                    "next"
                ));
            } else {
                text.push(format!(
                    "{:<16}  written to this machine's own disk; for a suspect host use --store - over SSH",
                    "note"
                ));
                text.push(format!("{:<16}  stillframe show {id} --store {store}", "next"));
            }
            text.join("\n")
        },
    );
    Ok(match (report.verdict, status.code()) {
        (Verdict::SelfConsistent | Verdict::Verified, Some(0)) => 0,
        (Verdict::SelfConsistent | Verdict::Verified, _) => 5,
        (verdict, _) => verdict.exit_code(),
    })
}

/// Where the agent lies that came with this program.
pub fn beside() -> Result<PathBuf> {
    let own = std::env::current_exe().context("where this program lies")?;
    let name = format!("stillframe-agent{}", std::env::consts::EXE_SUFFIX);
    let agent = own.with_file_name(name);
    if agent.is_file() {
        Ok(agent)
    } else {
        Err(anyhow!(
            "no agent at {}: build it (`cargo build --release`) or name one with --agent",
            agent.display()
        ))
    }
}

fn orderer() -> String {
    let user = std::env::var("SUDO_USER")
        .or_else(|_| std::env::var("USER"))
        .or_else(|_| std::env::var("LOGNAME"));
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!(
        "{}@{}",
        user.unwrap_or_else(|_| "unknown".to_owned()),
        host.trim()
    )
}

/// Shows each event of the chain as the agent tells it.
fn follow(mut output: impl std::io::BufRead, args: &Args, ui: &Ui) -> Result<()> {
    let activity = ui.activity();
    let mut plan: Vec<String> = Vec::new();
    loop {
        let mut line = Vec::new();
        let read = output
            .by_ref()
            .take(MAX_EVENT)
            .read_until(b'\n', &mut line)
            .context("reading from the agent")?;
        if read == 0 {
            return Ok(());
        }
        let event: Event = serde_json::from_slice(&line).context("the agent said what is no event")?;
        show(&event, &mut plan, &activity, args, ui);
    }
}

fn show(event: &Event, plan: &mut Vec<String>, activity: &Activity, args: &Args, ui: &Ui) {
    match &event.event {
        What::Opened(opening) => {
            *plan = opening.plan.iter().map(|step| step.kind.to_string()).collect();
            let kinds = count(plan.len(), "kind");
            activity.above(
                ui,
                &format!(
                    "capture {}  {}  {kinds}{}",
                    event.capture,
                    match &args.image {
                        Some(image) =>
                            format!("the image {}", printable(image.as_os_str().as_encoded_bytes())),
                        None => format!("this machine  profile {}", printable(args.profile.as_bytes())),
                    },
                    if plan.iter().any(|kind| kind == "memory") {
                        ""
                    } else {
                        ", no memory"
                    }
                ),
            );
            activity.above(ui, &format!("key     {}", opening.key));
        }
        What::Progress(progress) => {
            let share = progress.done.saturating_mul(100) / progress.expected.max(1);
            activity.progress(&format!(
                "{} {share} % of {}",
                progress.kind,
                bytes(progress.expected)
            ));
        }
        What::Step(outcome) => activity.above(ui, &format!("  {outcome}")),
        What::Closed(closing) => {
            if let Some(why) = &closing.stopped {
                activity.above(ui, &format!("  {}", printable(why.as_bytes())));
            }
        }
    }
    let done = match &event.event {
        What::Progress(_) => return,
        What::Opened(_) => Some(0),
        What::Step(outcome) => usize::try_from(outcome.step).ok().map(|n| n + 1),
        What::Closed(_) => None,
    };
    activity.now(done.and_then(|n| plan.get(n)).map_or("manifest", String::as_str));
}
