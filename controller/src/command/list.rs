//! `list`: the captures of a store, oldest first.

use super::At;
use crate::{
    stored::{Store, Summary},
    ui::Ui,
};
use anyhow::Result;
use clap::Args as ClapArgs;

/// Its arguments.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    at: At,
}

/// Lists them.
pub fn run(args: &Args, ui: &Ui) -> Result<u8> {
    let captures: Vec<Summary> = Store::open(&args.at)?
        .captures()?
        .iter()
        .map(|s| s.summary())
        .collect();
    ui.print(&captures, || {
        let line = |s: &Summary| {
            let case = s.case.as_ref().map_or("?", |c| c.as_str());
            let host = s
                .host
                .as_ref()
                .map_or_else(|| "?".to_owned(), ToString::to_string);
            let started = s.started.map_or_else(|| "?".to_owned(), |t| format!("{t:.0}"));
            format!(
                "{}  {started:<20}  {:<10}  {case:<16}  {host}",
                s.id,
                s.state.as_str()
            )
        };
        if captures.is_empty() {
            "no captures".to_owned()
        } else {
            captures.iter().map(line).collect::<Vec<_>>().join("\n")
        }
    });
    Ok(0)
}
