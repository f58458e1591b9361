//! The responder's program: orders a capture, finds it in a store, proves it, shows it.
//!
//! One verb, one file in `command/`. A verb reads what it is asked for through [`stored`], decides nothing about bytes
//! that `stillframe_evidence` decides, and prints through [`ui`], the only place that knows terminals. What it prints
//! as JSON and as text comes from the same values. Everything it reads is hostile: a store may hold anything.

pub mod aws;
pub mod cli;
pub mod command;
pub mod stored;
pub mod ui;
