//! The command line.

use crate::{
    command::{capture, cat, doctor, fetch, list, receive, salvage, show, stop, symbols, verify, watch},
    stored::NoEvent,
    ui::{Output, Ui},
};
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Freezes a live host for an investigator: order a capture, read it, prove it.
#[derive(Parser)]
#[command(name = "stillframe", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// How to print
    #[arg(long, value_enum, default_value_t, global = true)]
    output: Output,
}

#[derive(Subcommand)]
enum Verb {
    /// Capture a host
    Capture(Box<capture::Args>),
    /// Watch an order until every host is done
    Watch(watch::Args),
    /// How far each host of an order is
    Status(watch::StatusArgs),
    /// Have a capture end in good order, with what it has
    Stop(stop::Args),
    /// Have a capture killed where it runs
    Cancel(stop::Args),
    /// Say what of an order would fail, and why, before one is given
    Doctor(doctor::Args),
    /// Write the stream of `stillframe-agent capture --store -` into a store
    Receive(receive::Args),
    /// List the captures of a store
    List(list::Args),
    /// Show what a capture holds: processes, sockets, and what was not collected and why
    Show(show::Args),
    /// Prove a capture, or name what is wrong with it
    Verify(verify::Args),
    /// Say what can be relied on of a capture without a manifest
    Salvage(salvage::Args),
    /// Print the records of one kind as JSON lines
    Cat(cat::Args),
    /// Write a capture's memory to a directory, ready for Volatility: the image, its symbols, the command line
    Fetch(fetch::Args),
    /// Make a Volatility 3 symbol table from any Linux memory image, or from the files of a boot
    Symbols(symbols::Args),
}

/// Exit codes of every verb: 0 done and good, 1 done and not good (tampered), 2 wrong use, 3 incomplete, 4 salvaged,
/// 5 partly done.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let ui = Ui::new(cli.output);
    let result = match cli.verb {
        Verb::Capture(args) => capture::run(&args, &ui),
        Verb::Watch(args) => watch::watch(&args, &ui),
        Verb::Status(args) => watch::status(&args, &ui),
        Verb::Stop(args) => stop::stop(&args, &ui),
        Verb::Cancel(args) => stop::cancel(&args, &ui),
        Verb::Doctor(args) => doctor::run(&args, &ui),
        Verb::Receive(args) => receive::run(&args, &ui),
        Verb::List(args) => list::run(&args, &ui),
        Verb::Show(args) => show::run(&args, &ui),
        Verb::Verify(args) => verify::run(&args, &ui),
        Verb::Salvage(args) => salvage::run(&args, &ui),
        Verb::Cat(args) => cat::run(&args, &ui),
        Verb::Fetch(args) => fetch::run(&args, &ui),
        Verb::Symbols(args) => symbols::run(&args, &ui),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            ui.error(&error);
            ExitCode::from(if error.is::<NoEvent>() { 3 } else { 2 })
        }
    }
}
