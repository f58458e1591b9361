//! `receive`: the other end of `stillframe-agent capture --store -`, over SSH or any pipe. Every object is checked against its
//! own name before it lands, and lands whole or not at all: a stream that breaks leaves a valid beginning.

use super::{At, AwsArgs, verify};
use crate::{stored::Store, ui::Ui};
use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args as ClapArgs;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    io::{self, Read},
    path::PathBuf,
};
use stillframe_evidence::{
    chain::{MAX_EVENT, Outcome},
    frames::MAX_SEGMENT,
    layout::{CaptureId, Key, Writer, parse_evidence_key},
    manifest::MAX_MANIFEST,
    root::Hash,
    text::printable,
    verdict::{Report, Verdict},
};
use stillframe_store::{Directory, Store as _};

/// Its arguments.
#[derive(ClapArgs)]
pub struct Args {
    /// The directory to write into
    #[arg(long)]
    store: PathBuf,
}

/// Receives standard input.
pub fn run(args: &Args, ui: &Ui) -> Result<u8> {
    let mut open: BTreeMap<(Writer, CaptureId), Directory> = BTreeMap::new();
    let ended = receive(args, &mut open, io::stdin().lock(), |why| ui.warn(&why));
    for directory in open.values() {
        directory.finish().context("ending the capture")?;
    }
    if open.is_empty() {
        ended?;
        bail!("no capture in the stream");
    }
    if let Err(error) = &ended {
        ui.warn(&printable(
            format!("the stream ended early: {error:#}").as_bytes(),
        ));
    }
    let at = At {
        store: args.store.clone(),
        aws: AwsArgs::default(),
    };
    let store = Store::open(&at)?;
    let mut code = 0;
    for (_, id) in open.keys() {
        let report = verify::report(&store.find(&id.to_string())?, None);
        ui.say(&format!("capture {id}"));
        let chain = report.chain.as_ref();
        let done = Done {
            outcomes: chain.iter().flat_map(|c| c.outcomes()).collect(),
            report: &report,
        };
        ui.print(&done, || {
            let outcomes = done.outcomes.iter().map(|outcome| format!("  {outcome}\n"));
            outcomes.collect::<String>() + &verify::text(&report)
        });
        let whole = chain.is_some_and(|c| c.outcomes().all(|o| o.is_good()));
        let stopped = chain
            .and_then(|c| c.closing())
            .is_some_and(|c| c.stopped.is_some());
        code = code.max(match report.verdict.exit_code() {
            0 if stopped || !whole => 5,
            code => code,
        });
        if report.verdict == Verdict::Tampered {
            return Ok(report.verdict.exit_code());
        }
    }
    Ok(if ended.is_err() && code == 0 { 5 } else { code })
}

/// The verdict on what came, and the outcome of every step.
#[derive(Serialize)]
struct Done<'a> {
    #[serde(flatten)]
    report: &'a Report,
    outcomes: Vec<&'a Outcome>,
}

fn receive(
    args: &Args,
    open: &mut BTreeMap<(Writer, CaptureId), Directory>,
    input: impl Read,
    mut wrong: impl FnMut(String),
) -> Result<()> {
    let mut archive = tar::Archive::new(input);
    // Raw: long-name extensions, which our streams do not have, would be read into memory whole.
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        let path = entry.path_bytes();
        let name = std::str::from_utf8(&path)
            .map_err(|_| anyhow!("an entry's name is not UTF-8"))?
            .to_owned();
        drop(path);
        let (writer, id, key) = parse_evidence_key(&name).with_context(|| name.clone())?;
        if writer != Writer::local() {
            bail!("{name}: a stream is of writer local; only a store can vouch for another");
        }
        if !entry.header().entry_type().is_file() {
            bail!("{name}: not a regular file");
        }
        let max = match key {
            Key::Event { .. } => MAX_EVENT,
            Key::Segment { .. } => MAX_SEGMENT as u64,
            Key::Sums | Key::Manifest => MAX_MANIFEST,
        };
        let size = entry.header().size()?;
        if size > max {
            bail!("{name}: {size} bytes, more than the format allows");
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).with_context(|| name.clone())?;
        if bytes.len() as u64 != size {
            bail!("{name}: cut off after {} of {size} bytes", bytes.len());
        }
        if key.sha256().is_some_and(|promised| Hash::of(&bytes) != promised) {
            // It does not land; what is behind it does, and the verdict names what is missing.
            wrong(format!(
                "{name}: not stored: its content is not what its name promises"
            ));
            continue;
        }
        let directory = match open.entry((writer, id)) {
            std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::btree_map::Entry::Vacant(new) => {
                let directory = Directory::create(&args.store, &new.key().0, id).map_err(|e| anyhow!(e))?;
                new.insert(directory)
            }
        };
        directory.put(&key, &mut bytes).with_context(|| name.clone())?;
    }
    Ok(())
}
