//! `salvage`: what can be relied on of a capture whose end is missing. It changes nothing of the evidence; the record that it
//! writes stands in the case's folder.

use super::{Which, verify};
use crate::{
    stored::{NoEvent, Store},
    ui::Ui,
};
use anyhow::{Result, bail};
use clap::Args as ClapArgs;
use jiff::Timestamp;
use serde::Serialize;
use stillframe_evidence::verdict::{Report, Salvage, Verdict, count};

/// Its arguments.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    which: Which,
}

/// Salvages.
pub fn run(args: &Args, ui: &Ui) -> Result<u8> {
    let stored = Store::open(&args.which.at)?.find(&args.which.capture)?;
    let report = verify::report(&stored, None);
    // A capture that was still under way when it was salvaged has grown, and gets a new record; one that has shrunk since is
    // what the old record is there to show.
    let fresh = stillframe_evidence::verdict::verify(&stored, stored.id, None, None);
    let grown = || {
        let old: Salvage = serde_json::from_slice(&stored.salvage()?).ok()?;
        Some(fresh.verdict == Verdict::Incomplete && Salvage::of(&fresh)?.continues(&old))
    };
    if report.verdict == Verdict::Incomplete || grown() == Some(true) {
        if fresh.verdict == Verdict::Incomplete
            && fresh.unproven.iter().any(|f| f.why.starts_with("could not be "))
        {
            ui.print(&fresh, || verify::text(&fresh));
            bail!(
                "capture {}: not everything could be read; mend that first, then salvage",
                stored.id
            );
        }
        let Some(salvage) = Salvage::of(&fresh) else {
            return Err(NoEvent(stored.id).into());
        };
        stored.keep_salvage(&salvage.object()?)?;
    }
    let report = verify::report(&stored, None);
    let salvage = Salvage::of(&report).filter(|_| report.verdict == Verdict::Salvaged);
    let done = Done {
        holds: salvage.as_ref().map(|s| Holds {
            segments: s.artifacts.iter().map(|a| a.segments.len()).sum(),
            last_event: s.last_event,
            unfinished: s.unfinished.clone(),
        }),
        report: &report,
    };
    ui.print(&done, || text(&done));
    Ok(report.verdict.exit_code())
}

/// The verdict, and what can be relied on.
#[derive(Serialize)]
struct Done<'a> {
    #[serde(flatten)]
    report: &'a Report,
    holds: Option<Holds>,
}

#[derive(Serialize)]
struct Holds {
    segments: usize,
    /// What the host held after that is not here.
    last_event: Timestamp,
    /// Steps without an outcome.
    unfinished: Vec<String>,
}

fn text(done: &Done) -> String {
    let mut lines = vec![verify::text(done.report)];
    if let Some(holds) = &done.holds {
        let segments = count(holds.segments, "segment");
        lines.push(format!("{:<16}  {segments} up to {}", "holds", holds.last_event));
        if !holds.unfinished.is_empty() {
            lines.push(format!(
                "{:<16}  {}",
                "has no outcome",
                holds.unfinished.join(", ")
            ));
        }
    }
    lines.join("\n")
}
