//! `verify`: the verdict on a capture. It needs nothing but the capture.

use super::Which;
use crate::{
    stored::{Store, Stored},
    ui::{Ui, bytes},
};
use anyhow::Result;
use clap::Args as ClapArgs;
use stillframe_evidence::{
    signature::PublicKey,
    verdict::{self, Report, count},
};

/// Its arguments.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    which: Which,
    /// The key that the capture must be signed with, as it was printed when the capture began
    #[arg(long)]
    expect_key: Option<PublicKey>,
}

/// Verifies.
pub fn run(args: &Args, ui: &Ui) -> Result<u8> {
    let stored = Store::open(&args.which.at)?.find(&args.which.capture)?;
    let report = report(&stored, args.expect_key);
    ui.print(&report, || text(&report));
    match stored.keep_witness() {
        Ok(Some(key)) => ui.say(&format!("{:<16}  {key}", "witness")),
        Ok(None) => (),
        Err(error) => ui.warn(&format!("what the store states was not written down: {error:#}")),
    }
    Ok(report.verdict.exit_code())
}

/// The report on a capture, its salvage record included.
pub fn report(stored: &Stored, expect_key: Option<PublicKey>) -> Report {
    verdict::verify(stored, stored.id, expect_key, stored.salvage().as_deref())
}

/// For a person: what is wrong first, the verdict last.
pub fn text(report: &Report) -> String {
    let line = |what: &str, f: &verdict::Finding| format!("{what:<16}  {}: {}", f.object, f.why);
    let mut lines: Vec<String> = report.findings.iter().map(|f| line("not right", f)).collect();
    lines.extend(report.unproven.iter().map(|f| line("not proven", f)));
    lines.push(summary(report));
    lines.push(format!("{:<16}  {}", "because", report.because));
    let case = report
        .chain
        .as_ref()
        .and_then(|c| c.opening())
        .map(|o| &o.order.case);
    let case = case.map_or_else(String::new, |case| format!("  case {case}"));
    lines.push(format!("{:<16}  {}{case}", "capture", report.capture));
    let closing = report.chain.as_ref().and_then(|c| c.closing());
    if let Some(why) = closing.and_then(|c| c.stopped.as_deref()) {
        lines.push(format!(
            "{:<16}  {}",
            "ended early",
            stillframe_evidence::text::printable(why.as_bytes())
        ));
    }
    if let Some(key) = report.key {
        lines.push(format!("{:<16}  {key}", "key"));
    }
    lines.join("\n")
}

/// One line: the verdict, and what was read for it.
pub fn summary(report: &Report) -> String {
    format!(
        "{:<16}  {}, {} stored of {} read, chain of {}, signed",
        report.verdict,
        count(usize::try_from(report.objects).unwrap_or(usize::MAX), "object"),
        bytes(report.stored),
        bytes(report.plain),
        report.events,
    )
}
