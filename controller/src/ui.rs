//! What a person sees. Nothing of a guest or a store is printed but through `printable` or as escaped JSON.

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::{
    cell::Cell,
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
    time::Duration,
};
use stillframe_evidence::text::{json_line, printable};

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For a person.
    #[default]
    Text,
    /// For a program.
    Json,
}

/// The one printer.
pub struct Ui {
    output: Output,
    outlive: Cell<bool>,
}

impl Ui {
    /// A printer.
    pub fn new(output: Output) -> Self {
        Ui {
            output,
            outlive: Cell::new(false),
        }
    }

    /// Prints `value` as JSON, or `text` for a person.
    pub fn print<T: Serialize>(&self, value: &T, text: impl FnOnce() -> String) {
        match self.output {
            Output::Json => self.raw(&json_line(value).unwrap_or_default()),
            Output::Text => self.raw(&text()),
        }
    }

    /// Prints a line for a person only.
    pub fn say(&self, line: &str) {
        if self.output == Output::Text {
            self.raw(line);
        }
    }

    /// Lets a job go on when nobody reads what it prints any more.
    pub fn outlive_reader(&self) {
        self.outlive.set(true);
    }

    /// Prints a line that is known to be harmless. A reader that has gone (`| head`) ends the program, quietly; output that
    /// is lost otherwise (a full disk) ends it as a failure.
    pub fn raw(&self, line: &str) {
        let mut out = anstream::stdout();
        match writeln!(out, "{line}").and_then(|()| out.flush()) {
            Ok(()) => (),
            Err(_) if self.outlive.get() => (),
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
            Err(error) => {
                self.warn(&format!("standard output: {error}"));
                std::process::exit(2);
            }
        }
    }

    /// Prints an error.
    pub fn error(&self, error: &anyhow::Error) {
        self.trouble("error", &format!("{error:#}"));
    }

    /// Prints a warning that does not end anything.
    pub fn warn(&self, warning: &str) {
        self.trouble("warning", warning);
    }

    fn trouble(&self, what: &str, text: &str) {
        let line = match self.output {
            Output::Text => format!("stillframe: {}", printable(text.as_bytes())),
            Output::Json => json_line(&BTreeMap::from([(what, text)])).unwrap_or_default(),
        };
        let _ = writeln!(anstream::stderr(), "{line}");
    }

    /// What is being done, on a terminal; nothing elsewhere.
    pub fn activity(&self) -> Activity {
        let shown = self.output == Output::Text && std::io::stdout().is_terminal();
        let bar = if shown {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        if let Ok(style) = ProgressStyle::with_template("  {msg:<16} {spinner} {elapsed}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        Activity { bar }
    }
}

/// A line that says what is being done.
pub struct Activity {
    bar: ProgressBar,
}

impl Activity {
    /// Says it.
    pub fn now(&self, what: &str) {
        self.bar.reset_elapsed();
        self.bar.set_message(printable(what.as_bytes()));
    }

    /// Says how far it is.
    pub fn progress(&self, what: &str) {
        self.bar.set_message(printable(what.as_bytes()));
    }

    /// Prints above it.
    pub fn above(&self, ui: &Ui, line: &str) {
        self.bar.suspend(|| ui.say(line));
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// `1.2 MiB`.
pub fn bytes(n: u64) -> String {
    indicatif::BinaryBytes(n).to_string()
}
