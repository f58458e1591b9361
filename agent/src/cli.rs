//! The command line, and what is printed. Everything on standard output is either for a person or JSON lines; with
//! `--store -` standard output carries the evidence and the rest goes to standard error.

use crate::{
    cancel::Cancel,
    capture::{self, MemoryOrder, Request},
    memory::probe::probe,
    plan::{Extras, PROFILES, Profile, Step},
    sys::COLLECTORS,
};
use clap::{Args, Parser, Subcommand, ValueEnum};
use jiff::Timestamp;
use std::{
    io::{BufRead as _, IsTerminal as _, Read as _, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};
use stillframe_evidence::{
    SCHEMA,
    chain::{Chain, Event, Order, What},
    layout::{CaptureId, CaseName, Writer},
    root::Hash,
    signature::PublicKey,
    text::{Text, json_line, printable},
};
use stillframe_store::{aws::Reach, s3};

/// Collects, in order of volatility, what this host would lose at power-off.
#[derive(Parser)]
#[command(name = "stillframe-agent", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Capture this host
    Capture(Box<CaptureArgs>),
    /// Have a capture that runs on this host end in good order, with what it has
    Stop {
        /// Its id
        #[arg(long)]
        id: CaptureId,
    },
    /// List what can be collected here
    Kinds {
        /// How to print
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Say what capturing this host's memory would meet: source, lockdown, paging, ranges, expected size and time
    MemoryProbe {
        /// Where the host's root is mounted, when the agent runs in a privileged container
        #[arg(long, default_value = "/")]
        root: PathBuf,
        /// How to print
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Print the version of the program and of the evidence format
    Version,
    /// What the agent runs itself as, for what may hang
    #[command(hide = true)]
    Worker,
    /// What the agent runs itself as, to load a module and remove it whatever happens
    #[command(hide = true)]
    LimeGuardian,
}

#[derive(Args)]
struct CaptureArgs {
    /// A directory, s3://bucket/prefix, or - for a stream on standard output that `stillframe receive` reads
    #[arg(long)]
    store: String,
    #[command(flatten)]
    aws: AwsArgs,
    /// The case that the capture belongs to
    #[arg(long, default_value = "unassigned")]
    case: CaseName,
    /// What to collect: triage; memory, between two looks at what is volatile; full, which is both
    #[arg(long, default_value = "triage", value_parser = profile)]
    profile: Profile,
    /// Print the steps and do nothing
    #[arg(long)]
    plan: bool,
    /// The id of the capture; minted here when nobody ordered it elsewhere
    #[arg(long)]
    id: Option<CaptureId>,
    /// Who orders it
    #[arg(long, default_value = "")]
    ordered_by: String,
    /// When it was ordered, by the orderer's clock
    #[arg(long)]
    ordered_at: Option<Timestamp>,
    /// A value of the orderer's choice that the first event repeats
    #[arg(long, default_value = "")]
    nonce: String,
    /// Where the host's root is mounted, when the agent runs in a privileged container
    #[arg(long, default_value = "/")]
    root: PathBuf,
    /// Processors that collecting may use at once [default: all, at most 4]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=16))]
    cpus: Option<u8>,
    /// Bring in an image that somebody else took (LiME, AVML, raw, ELF core) instead of collecting from this host
    #[arg(long, conflicts_with_all = ["lime_module", "pid"])]
    image: Option<PathBuf>,
    /// Read memory with this LiME module, built for exactly this kernel, instead of /proc/kcore
    #[arg(long, requires = "lime_sha256")]
    lime_module: Option<PathBuf>,
    /// The SHA-256 that the module must have
    #[arg(long, requires = "lime_module")]
    lime_sha256: Option<Hash>,
    /// Capture the memory of this process too; may be given several times
    #[arg(long)]
    pid: Vec<u32>,
    /// Read at most so many MiB of memory a second
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    max_rate: Option<u64>,
    /// Let the memory of this host be written to one of its own disks, which destroys what was deleted there
    #[arg(long)]
    on_this_disk: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// How S3 is reached, where it is not as the SDK's own variables say. Credentials are those of the instance's role.
#[derive(Args)]
#[command(next_help_heading = "For an s3:// store")]
struct AwsArgs {
    /// The region
    #[arg(long)]
    region: Option<String>,
    /// Where requests go instead of AWS
    #[arg(long)]
    endpoint_url: Option<String>,
    /// FIPS endpoints
    #[arg(long)]
    fips: bool,
    /// Endpoints that answer over IPv6 too
    #[arg(long)]
    dual_stack: bool,
    /// PEM certificates to trust instead of the roots built in
    #[arg(long)]
    ca_bundle: Option<PathBuf>,
    /// The store's credentials are lent: the first line of standard input is the address of the order that has them
    #[arg(long)]
    lent: bool,
    /// The KMS key to encrypt under, when it is not the bucket's own
    #[arg(long)]
    kms_key: Option<String>,
    /// The first part of the capture's prefix, which the bucket's policy binds to the credentials [default: asked of STS]
    #[arg(long)]
    writer: Option<Writer>,
    /// Objects that are put at once [default: 4, on a small host 2]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=16))]
    puts: Option<u8>,
}

impl AwsArgs {
    fn options(&self, root: &Path) -> Result<s3::Options, String> {
        let small = crate::sys::total_memory(root).is_none_or(crate::memory::is_small);
        let lent = if self.lent { Some(address()?) } else { None };
        Ok(s3::Options {
            reach: Reach {
                region: self.region.clone(),
                endpoint: self.endpoint_url.clone(),
                fips: self.fips,
                dual_stack: self.dual_stack,
                ca_bundle: self.ca_bundle.clone(),
            },
            kms_key: self.kms_key.clone(),
            credentials: None,
            lent,
            writer: self.writer.clone(),
            at_once: usize::from(self.puts.unwrap_or(if small { 2 } else { 4 })),
        })
    }
}

/// A secret: it stands in no argument and no variable.
fn address() -> Result<String, String> {
    let mut line = String::new();
    let mut input = std::io::stdin().lock().take(MAX_ADDRESS);
    input
        .read_line(&mut line)
        .map_err(|error| format!("--lent: standard input: {error}"))?;
    match line.trim() {
        address if address.starts_with("https://") || address.starts_with("http://") => {
            Ok(address.to_owned())
        }
        _ => Err("--lent: the first line of standard input is no address".to_owned()),
    }
}

/// Bytes of it; with the session token of whoever signed it, it may have some two thousand.
const MAX_ADDRESS: u64 = 8 << 10;

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    #[default]
    Text,
    Json,
    /// One line at the end, for whoever ordered it from afar; what was captured in part exits with 0 as well
    Result,
}

fn profile(name: &str) -> Result<Profile, String> {
    let known: Vec<&str> = PROFILES.iter().map(|p| p.name).collect();
    Profile::named(name).ok_or_else(|| format!("the profiles are: {}", known.join(", ")))
}

fn cpus() -> u8 {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    u8::try_from(all.min(4)).unwrap_or(1)
}

/// Exit codes: 0 done and complete, 1 no manifest, 2 wrong use, 5 done and partly complete.
pub fn run() -> ExitCode {
    crate::sys::spare_memory();
    // Without the parser of the command line, which takes 300 KiB.
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|verb| verb == "worker") && arguments.next().is_none() {
        return worker();
    }
    match Cli::parse().verb {
        Verb::Capture(args) => run_capture(*args),
        Verb::Stop { id } => stop(id),
        Verb::Kinds { output } => {
            for c in COLLECTORS {
                line(
                    &mut std::io::stdout(),
                    output,
                    &serde_json::json!({"kind": c.kind, "about": c.about}),
                    || format!("{:<16} {}", c.kind, c.about),
                );
            }
            ExitCode::SUCCESS
        }
        Verb::MemoryProbe { root, output } => {
            let probe = probe(&root, usize::from(cpus()));
            line(&mut std::io::stdout(), output, &probe, || {
                probe.lines().join("\n")
            });
            match probe.method {
                Some(_) => ExitCode::SUCCESS,
                None => ExitCode::from(5),
            }
        }
        Verb::LimeGuardian => match crate::memory::lime::guard() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Verb::Version => {
            line(&mut std::io::stdout(), Output::Text, &(), || {
                format!("stillframe-agent {} format {SCHEMA}", env!("CARGO_PKG_VERSION"))
            });
            ExitCode::SUCCESS
        }
        Verb::Worker => worker(),
    }
}

fn worker() -> ExitCode {
    crate::sys::die_with_parent();
    match crate::collect::work(std::io::stdin(), Box::new(std::io::stdout())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Prints one line; a reader that has gone is not worth a capture.
fn line<T: serde::Serialize>(out: &mut dyn Write, output: Output, value: &T, text: impl FnOnce() -> String) {
    let line = match output {
        Output::Text => text(),
        Output::Json => json_line(value).unwrap_or_default(),
        Output::Result => return,
    };
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn refuse(why: &str) -> ExitCode {
    eprintln!("stillframe-agent: {}", printable(why.as_bytes()));
    ExitCode::from(2)
}

/// What is wrong with the order, before anything is begun.
fn wrong_use(args: &CaptureArgs) -> Option<String> {
    let streams_memory = args.profile.memory || !args.pid.is_empty();
    if args.image.is_none() && !crate::sys::is_root(&args.root) {
        Some(format!(
            "--root {}: no host's root is mounted there",
            args.root.display()
        ))
    } else if args.lime_module.is_some() && !args.profile.memory {
        Some("--lime-module: the profile does not capture memory; use --profile memory or full".to_owned())
    } else if args.store == "-" && std::io::stdout().is_terminal() {
        Some(
            "--store -: the stream is not for a terminal; pipe it into `stillframe receive` or a file"
                .to_owned(),
        )
    } else if streams_memory
        && args.image.is_none()
        && args.store != "-"
        && !args.store.starts_with("s3://")
        && !args.on_this_disk
        && crate::sys::is_own_disk(args.store.as_ref())
    {
        Some(format!(
            "--store {}: the memory of this host would be written to one of its own disks, over what was deleted there; use --store -, \
             s3:// or a network file system, or say --on-this-disk",
            args.store
        ))
    } else {
        args.image
            .as_ref()
            .and_then(|path| crate::memory::image::open(path).err())
    }
}

fn print_plan(args: &CaptureArgs, steps: &[Step]) {
    let memory = args.profile.memory && args.image.is_none();
    let probe = memory.then(|| probe(&args.root, usize::from(args.cpus.unwrap_or_else(cpus))));
    for step in steps {
        let expected = probe
            .as_ref()
            .filter(|p| step.kind == "memory" && p.method.is_some());
        let value = serde_json::json!({
            "kind": step.kind, "about": step.about, "deadline_s": step.deadline.as_secs(),
            "expected_bytes": expected.map(|p| p.expected_stored), "expected_s": expected.map(|p| p.expected_seconds),
        });
        line(&mut std::io::stdout(), args.output, &value, || {
            let expected = expected.map_or_else(String::new, |p| {
                format!(
                    "; about {} MiB to store, {} s",
                    p.expected_stored >> 20,
                    p.expected_seconds
                )
            });
            format!(
                "{:<16} at most {:>5} s   {}{expected}",
                step.kind,
                step.deadline.as_secs(),
                step.about
            )
        });
    }
}

fn run_capture(args: CaptureArgs) -> ExitCode {
    let steps = args.profile.steps(Extras {
        image: args.image.is_some(),
        processes: !args.pid.is_empty(),
    });
    if args.plan {
        print_plan(&args, &steps);
        return ExitCode::SUCCESS;
    }
    if let Some(why) = wrong_use(&args) {
        return refuse(&why);
    }
    let mut pids = args.pid;
    pids.sort_unstable();
    pids.dedup();
    let id = args.id.unwrap_or_else(CaptureId::mint);
    let options = args.aws.options(&args.root);
    let store = match options.and_then(|options| stillframe_store::open(&args.store, id, options)) {
        Ok(store) => store,
        Err(why) => return refuse(&why),
    };
    let request = Request {
        id,
        order: Order {
            case: args.case,
            profile: if args.image.is_some() {
                "image"
            } else {
                args.profile.name
            }
            .to_owned(),
            nonce: args.nonce,
            ordered_by: Text::from(&args.ordered_by),
            ordered_at: args.ordered_at,
        },
        steps,
        memory: MemoryOrder {
            image: args.image,
            lime: args.lime_module.zip(args.lime_sha256),
            pids,
            rate: args.max_rate.map(|rate| rate << 20),
        },
        root: args.root,
        cpus: args.cpus.unwrap_or_else(cpus),
    };
    let mut out: Box<dyn Write> = if args.store == "-" {
        Box::new(std::io::stderr())
    } else {
        Box::new(std::io::stdout())
    };
    let cancel = Cancel::on_signals();
    let result = capture::run(&request, store.as_ref(), &cancel, |event: &Event| {
        line(&mut out, args.output, event, || describe(event));
    });
    if args.output == Output::Result {
        return tell_result(id, &result);
    }
    match result {
        Ok(chain)
            if chain.closing().is_some_and(|c| c.stopped.is_none())
                && chain.outcomes().all(|o| o.is_good()) =>
        {
            ExitCode::SUCCESS
        }
        Ok(_) => ExitCode::from(5),
        Err(failure) => {
            let why = printable(failure.to_string().as_bytes());
            eprintln!(
                "stillframe-agent: capture {id} has no manifest: {why}; `stillframe salvage` reads what was stored"
            );
            ExitCode::FAILURE
        }
    }
}

/// What the one line says, behind [`RESULT`].
#[derive(serde::Serialize)]
struct Told {
    capture: CaptureId,
    /// `complete`, `partial`, `stopped`; or `failed`, when there is no manifest.
    outcome: &'static str,
    /// The key of the chain, to verify with.
    key: Option<PublicKey>,
    events: usize,
    why: Option<String>,
}

/// What the one line begins with.
const RESULT: &str = "stillframe-result";

/// Characters of the reason: the line must be whole in what Systems Manager shows of an output.
const REASON: usize = 600;

/// What of the capture is not as it was asked for; nothing where all is.
fn missing(chain: &Chain) -> Option<String> {
    let list: Vec<String> = chain
        .outcomes()
        .filter(|outcome| !outcome.is_good())
        .map(|outcome| {
            let reason = outcome.reason.as_ref().map(ToString::to_string);
            let reason = reason.or_else(|| Some(outcome.problems.first()?.to_string()));
            let reason = reason.map_or_else(String::new, |reason| format!(" ({reason})"));
            format!("{} {}{reason}", outcome.kind, outcome.status)
        })
        .collect();
    let all = list.join("; ");
    (!all.is_empty()).then(|| all.chars().take(REASON).collect())
}

fn tell_result(id: CaptureId, result: &Result<Chain, capture::Failure>) -> ExitCode {
    let told = match result {
        Ok(chain) => {
            let stopped = chain.closing().and_then(|c| c.stopped.clone());
            Told {
                capture: id,
                outcome: match (&stopped, chain.outcomes().all(|o| o.is_good())) {
                    (Some(_), _) => "stopped",
                    (None, true) => "complete",
                    (None, false) => "partial",
                },
                key: Some(chain.key()),
                events: chain.events().len(),
                why: stopped.or_else(|| missing(chain)),
            }
        }
        Err(failure) => Told {
            capture: id,
            outcome: "failed",
            key: None,
            events: 0,
            why: Some(failure.to_string()),
        },
    };
    println!("{RESULT} {}", json_line(&told).unwrap_or_default());
    match result {
        Ok(_) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn stop(id: CaptureId) -> ExitCode {
    match crate::sys::stop(&id.to_string()) {
        Ok(0) => {
            eprintln!("stillframe-agent: no capture {id} runs on this host");
            ExitCode::from(3)
        }
        Ok(_) => {
            println!("stillframe-stop {id}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("stillframe-agent: capture {id} could not be stopped: {why}");
            ExitCode::FAILURE
        }
    }
}

fn describe(event: &Event) -> String {
    match &event.event {
        What::Opened(opening) => format!("capture {}  key {}", event.capture, opening.key),
        What::Progress(progress) => format!(
            "  {:<16} {:>3} % of {} MiB",
            progress.kind.as_str(),
            progress.done.saturating_mul(100) / progress.expected.max(1),
            progress.expected >> 20
        ),
        What::Step(outcome) => format!("  {outcome}"),
        What::Closed(closing) => match &closing.stopped {
            Some(why) => format!("closed: {why}"),
            None => format!("closed, chain of {}", event.sequence),
        },
    }
}
