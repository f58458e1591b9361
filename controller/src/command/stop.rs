//! `stop` and `cancel`. Stopping is asked of the agent, which ends the segment that it is at, signs, and closes the capture. Cancelling is Systems Manager's SIGKILL: what
//! was acknowledged by then is salvaged.

use super::{At, order::Order};
use crate::{
    aws::session::Lender,
    aws::ssm::{Invocation, Spread, Ssm, State, Targets},
    ui::Ui,
};
use anyhow::{Result, bail};
use clap::Args as ClapArgs;
use serde::Serialize;
use std::collections::BTreeMap;
use stillframe_evidence::text::printable;

/// Their arguments.
#[derive(ClapArgs)]
pub struct Args {
    /// The id of the capture that was ordered, a unique beginning of it, or `latest`
    capture: String,
    #[command(flatten)]
    at: At,
    /// The document that stops
    #[arg(long, default_value = "Stillframe-Stop")]
    document: String,
}

#[derive(Serialize)]
struct Done<'a> {
    capture: String,
    commands: &'a [String],
    hosts: Vec<String>,
}

/// Asks the agents.
pub fn stop(args: &Args, ui: &Ui) -> Result<u8> {
    let (_, order) = Order::find(&args.at, &args.capture)?;
    let ssm = Ssm::open(&args.at.aws.reach())?;
    let invocations = order.invocations(&ssm)?;
    let of = |states: &[State]| -> Vec<&Invocation> {
        invocations.iter().filter(|i| states.contains(&i.state)).collect()
    };
    let names = |of: &[&Invocation]| of.iter().map(|one| one.host.clone()).collect::<Vec<_>>();
    // Who has not begun must not begin: there is nothing to close there.
    let waiting = of(&[State::Pending, State::Delayed]);
    if !waiting.is_empty() {
        match order.cancel(&ssm, Some(&waiting)) {
            Ok(()) => ui.say(&format!(
                "cancelled before it began on {}",
                printable(names(&waiting).join(", ").as_bytes())
            )),
            // Those that are at work are asked to stop all the same.
            Err(error) => ui.warn(&format!("{error:#}")),
        }
    }
    let running = names(&of(&[State::InProgress]));
    if running.is_empty() && !waiting.is_empty() {
        return Ok(0);
    }
    if running.is_empty() && !order.is_listed(&invocations) {
        bail!(
            "Systems Manager does not know of every host of capture {} yet: try again in a moment",
            order.capture
        );
    }
    if running.is_empty() {
        bail!(
            "no host is at capture {} any more; stillframe status",
            order.capture
        );
    }
    let document = ssm.document(&args.document)?;
    let parameters: BTreeMap<&str, String> = [
        ("CaptureId", order.capture.to_string()),
        ("Agent", order.agent.clone()),
        ("AgentSha256", order.agent_sha256.clone()),
    ]
    .into();
    let spread = Spread {
        max_concurrency: "100%".to_owned(),
        max_errors: "100%".to_owned(),
        delivery_seconds: 60,
    };
    for hosts in running.chunks(crate::aws::ssm::MOST_INSTANCES) {
        let comment = format!("Stillframe stop {}", order.capture);
        let command = ssm.send(
            &document,
            &Targets::Instances(hosts.to_vec()),
            &parameters,
            &spread,
            &comment,
        )?;
        let done = Done {
            capture: order.capture.to_string(),
            commands: &[command],
            hosts: hosts.to_vec(),
        };
        ui.print(&done, || {
            format!(
                "stopping {} on {}; stillframe watch {} --store {} shows it end",
                order.capture,
                printable(hosts.join(", ").as_bytes()),
                order.capture,
                printable(order.store.as_bytes())
            )
        });
    }
    Ok(0)
}

/// Has them killed.
pub fn cancel(args: &Args, ui: &Ui) -> Result<u8> {
    let (_, order) = Order::find(&args.at, &args.capture)?;
    let ssm = Ssm::open(&args.at.aws.reach())?;
    let invocations = order.invocations(&ssm)?;
    if order.is_over(&invocations) {
        bail!(
            "no host is at capture {} any more; stillframe status",
            order.capture
        );
    }
    ui.warn("cancelling is SIGKILL: the capture is not closed, and `stillframe salvage` reads what was acknowledged; `stillframe stop` closes it");
    order.cancel(&ssm, None)?;
    if let Some(session) = &order.session {
        let lender = Lender::open(&args.at.aws.reach(), session)?;
        for host in order.loans.keys() {
            if let Err(error) = lender.take_back(order.capture, host) {
                ui.warn(&format!("{}: {error:#}", printable(host.as_bytes())));
            }
        }
    }
    let done = Done {
        capture: order.capture.to_string(),
        commands: order.commands()?,
        hosts: Vec::new(),
    };
    ui.print(&done, || {
        format!(
            "cancelled {}; stillframe status {} --store {}",
            order.capture,
            order.capture,
            printable(order.store.as_bytes())
        )
    });
    Ok(0)
}
