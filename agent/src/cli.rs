//! The command line, and what is printed. Everything on standard output is either for a person or JSON lines; with
//! `--store -` standard output carries the evidence and the rest goes to standard error.

use crate::{
    cancel::Cancel,
    capture::{self, Request},
    plan::{PROFILES, Profile},
    sys::COLLECTORS,
};
use clap::{Args, Parser, Subcommand, ValueEnum};
use jiff::Timestamp;
use std::{
    io::{IsTerminal as _, Write},
    path::PathBuf,
    process::ExitCode,
};
use stillframe_evidence::{
    SCHEMA,
    chain::{Event, Order, What},
    layout::{CaptureId, CaseName},
    text::{Text, json_line},
};

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
    /// List what can be collected here
    Kinds {
        /// How to print
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Print the version of the program and of the evidence format
    Version,
    /// What the agent runs itself as, for what may hang
    #[command(hide = true)]
    Worker,
}

#[derive(Args)]
struct CaptureArgs {
    /// A directory, or - for a stream on standard output that `stillframe receive` reads
    #[arg(long)]
    store: String,
    /// The case that the capture belongs to
    #[arg(long, default_value = "unassigned")]
    case: CaseName,
    /// What to collect
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
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    #[default]
    Text,
    Json,
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
    match Cli::parse().verb {
        Verb::Capture(args) => run_capture(*args),
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
        Verb::Version => {
            line(&mut std::io::stdout(), Output::Text, &(), || {
                format!("stillframe-agent {} format {SCHEMA}", env!("CARGO_PKG_VERSION"))
            });
            ExitCode::SUCCESS
        }
        Verb::Worker => {
            crate::sys::die_with_parent();
            match crate::collect::work(std::io::stdin(), Box::new(std::io::stdout())) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
    }
}

/// Prints one line; a reader that has gone is not worth a capture.
fn line<T: serde::Serialize>(out: &mut dyn Write, output: Output, value: &T, text: impl FnOnce() -> String) {
    let line = match output {
        Output::Text => text(),
        Output::Json => json_line(value).unwrap_or_default(),
    };
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn run_capture(args: CaptureArgs) -> ExitCode {
    if args.plan {
        for c in args.profile.collectors() {
            let value =
                serde_json::json!({"kind": c.kind, "about": c.about, "deadline_s": c.deadline.as_secs()});
            line(&mut std::io::stdout(), args.output, &value, || {
                format!(
                    "{:<16} at most {:>3} s   {}",
                    c.kind,
                    c.deadline.as_secs(),
                    c.about
                )
            });
        }
        return ExitCode::SUCCESS;
    }
    let refused = if !crate::sys::is_root(&args.root) {
        Some(format!(
            "--root {}: no host's root is mounted there",
            args.root.display()
        ))
    } else if args.store == "-" && std::io::stdout().is_terminal() {
        Some(
            "--store -: the stream is not for a terminal; pipe it into `stillframe receive` or a file"
                .to_owned(),
        )
    } else {
        None
    };
    if let Some(why) = refused {
        eprintln!(
            "stillframe-agent: {}",
            stillframe_evidence::text::printable(why.as_bytes())
        );
        return ExitCode::from(2);
    }
    let id = args.id.unwrap_or_else(CaptureId::mint);
    let store = match stillframe_store::open(&args.store, id) {
        Ok(store) => store,
        Err(why) => {
            eprintln!(
                "stillframe-agent: {}",
                stillframe_evidence::text::printable(why.as_bytes())
            );
            return ExitCode::from(2);
        }
    };
    let request = Request {
        id,
        order: Order {
            case: args.case,
            profile: args.profile.name.to_owned(),
            nonce: args.nonce,
            ordered_by: Text::from(&args.ordered_by),
            ordered_at: args.ordered_at,
        },
        profile: args.profile,
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
    match result {
        Ok(chain)
            if chain.closing().is_some_and(|c| c.stopped.is_none())
                && chain.outcomes().all(|o| o.status.is_good()) =>
        {
            ExitCode::SUCCESS
        }
        Ok(_) => ExitCode::from(5),
        Err(failure) => {
            let why = stillframe_evidence::text::printable(failure.to_string().as_bytes());
            eprintln!(
                "stillframe-agent: capture {id} has no manifest: {why}; `stillframe salvage` reads what was stored"
            );
            ExitCode::FAILURE
        }
    }
}

fn describe(event: &Event) -> String {
    match &event.event {
        What::Opened(opening) => format!("capture {}  key {}", event.capture, opening.key),
        What::Step(outcome) => format!("  {outcome}"),
        What::Closed(closing) => match &closing.stopped {
            Some(why) => format!("closed: {why}"),
            None => format!("closed, chain of {}", event.sequence),
        },
    }
}
