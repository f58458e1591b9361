//! `cat`: the records of one kind as they are stored, for `jq`.

use super::Which;
use crate::{stored::Store, ui::Ui};
use anyhow::{Result, bail};
use clap::Args as ClapArgs;
use stillframe_evidence::{layout::Kind, text::harmless_json};

/// Its arguments.
#[derive(ClapArgs)]
pub struct Args {
    /// The kind, such as `processes`
    kind: Kind,
    #[command(flatten)]
    which: Which,
}

/// Prints them. 5 when a segment could not be read.
pub fn run(args: &Args, ui: &Ui) -> Result<u8> {
    let stored = Store::open(&args.which.at)?.find(&args.which.capture)?;
    let (chain, broken) = stored.chain()?;
    let known: Vec<String> = chain
        .opening()
        .map(|o| o.plan.iter().map(|s| s.kind.to_string()).collect())
        .unwrap_or_default();
    if !known.iter().any(|k| k == args.kind.as_str()) {
        bail!(
            "capture {} has no kind {}; it has {}",
            stored.id,
            args.kind,
            known.join(", ")
        );
    }
    let mut code = 0;
    let mut wrong = |why: String| {
        ui.warn(&why);
        code = 5;
    };
    broken.into_iter().for_each(&mut wrong);
    stored.lines(
        &chain,
        &args.kind,
        |line| {
            // What the agent wrote is escaped already; what somebody else put here may not be.
            ui.raw(&harmless_json(line));
            Ok(())
        },
        wrong,
    )?;
    Ok(code)
}
