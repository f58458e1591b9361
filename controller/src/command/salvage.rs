//! `salvage`: what can be relied on of a capture whose end is missing. It changes nothing of the evidence; the record that it
//! writes stands in the case's folder.

use super::{Which, verify};
use crate::{stored::Store, ui::Ui};
use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use std::{fs, io::Write as _};
use stillframe_evidence::verdict::{Salvage, Verdict};

/// Its arguments.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    which: Which,
}

/// Salvages.
pub fn run(args: &Args, ui: &Ui) -> Result<u8> {
    let stored = Store::open(&args.which.store)?.find(&args.which.capture)?;
    let report = verify::report(&stored, None);
    // A capture that was still under way when it was salvaged has grown, and gets a new record; one that has shrunk since is
    // what the old record is there to show.
    let fresh = stillframe_evidence::verdict::verify(&stored, stored.id, None, None);
    let grown = || {
        let old: Salvage = serde_json::from_slice(&stored.salvage()?).ok()?;
        Some(fresh.verdict == Verdict::Incomplete && Salvage::of(&fresh)?.continues(&old))
    };
    if report.verdict == Verdict::Incomplete || grown() == Some(true) {
        let (Some(salvage), Some(path)) = (Salvage::of(&fresh), stored.salvage_path()) else {
            bail!(
                "capture {}: not even its first event can be read; nothing can be salvaged",
                stored.id
            );
        };
        if fresh.verdict == Verdict::Incomplete
            && fresh
                .unproven
                .iter()
                .any(|f| f.why.starts_with("could not be read"))
        {
            ui.print(&fresh, || verify::text(&fresh));
            bail!(
                "capture {}: not everything could be read; mend that first, then salvage",
                stored.id
            );
        }
        let folder = path.parent().unwrap_or(&path);
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let temporary = path.with_extension("json.partial");
        let mut file = fs::File::create(&temporary).with_context(|| temporary.display().to_string())?;
        file.write_all(&salvage.object()?)
            .and_then(|()| file.sync_all())
            .with_context(|| temporary.display().to_string())?;
        fs::rename(&temporary, &path).with_context(|| path.display().to_string())?;
    }
    let report = verify::report(&stored, None);
    ui.print(&report, || verify::text(&report));
    if report.verdict == Verdict::Salvaged
        && let Some(salvage) = Salvage::of(&report)
    {
        let segments: usize = salvage.artifacts.iter().map(|a| a.segments.len()).sum();
        let counted = stillframe_evidence::verdict::count(segments, "segment");
        ui.say(&format!(
            "{:<16}  {counted} up to {}",
            "holds", salvage.last_event
        ));
        if !salvage.unfinished.is_empty() {
            ui.say(&format!(
                "{:<16}  {}",
                "has no outcome",
                salvage.unfinished.join(", ")
            ));
        }
    }
    Ok(report.verdict.exit_code())
}
