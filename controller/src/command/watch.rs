//! `watch` and `status`: how far each host of an order is. Systems Manager says who has begun and ended; the progress objects in the store say how far.
//! Ctrl-C ends the watching, never the capture.

use super::{At, order::Order};
use crate::{
    aws::{
        session::{Lender, Loan},
        ssm::{Invocation, Ssm, State},
    },
    stored::Store,
    ui::{Ui, bytes},
};
use anyhow::{Result, bail};
use clap::Args as ClapArgs;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};
use stillframe_evidence::{
    chain::{Chain, Event, What},
    layout::CaptureId,
    text::printable,
    verdict::count,
};

/// Its arguments.
#[derive(ClapArgs)]
pub struct Args {
    /// The id of the capture that was ordered, a unique beginning of it, or `latest`
    capture: String,
    #[command(flatten)]
    at: At,
    #[command(flatten)]
    stall: Stall,
}

/// Whose state.
#[derive(ClapArgs)]
pub struct StatusArgs {
    /// The id of the capture that was ordered, a unique beginning of it, or `latest`
    capture: String,
    #[command(flatten)]
    at: At,
    #[command(flatten)]
    stall: Stall,
}

/// How long nothing may be heard.
#[derive(ClapArgs)]
pub struct Stall {
    /// Seconds without a new event after which a host that is at work counts as lost, and its capture as incomplete
    #[arg(long, default_value_t = 420, value_parser = clap::value_parser!(u64).range(1..))]
    stall: u64,
}

impl Stall {
    fn patience(&self) -> SignedDuration {
        SignedDuration::from_secs(i64::try_from(self.stall).unwrap_or(i64::MAX))
    }

    fn warn(&self, host: &str, ui: &Ui) {
        ui.warn(&format!(
            "{}: no event for {} s; it may be gone, and its capture is incomplete: stillframe salvage reads what was acknowledged",
            printable(host.as_bytes()),
            self.stall
        ));
    }
}

/// Hosts whose newest event is looked at by who looks once.
const LOOKED_AT: usize = 50;
/// Chains that are kept between two times round.
const KEPT: usize = 64;
/// Hosts whose progress is looked up each time round.
const LOOKED_UP: usize = 4;
const BETWEEN: Duration = Duration::from_secs(2);
/// Failures one after another, each after several tries of the SDK's own, after which watching is given up.
const MISSED: u32 = 60;
/// A command without any host by then has none.
const NOBODY: Duration = Duration::from_secs(60);

/// What is known of an order.
#[derive(Serialize)]
struct View<'a> {
    capture: CaptureId,
    commands: &'a [String],
    store: &'a str,
    /// Hosts in each state.
    counts: BTreeMap<State, usize>,
    hosts: Vec<Line>,
}

/// One host.
#[derive(Clone, Serialize)]
struct Line {
    #[serde(flatten)]
    invocation: Invocation,
    /// The last thing that its chain says.
    progress: Option<Progress>,
    /// At work as Systems Manager has it, and silent for too long; nothing where nobody knows.
    lost: Option<bool>,
}

/// How far its chain is.
#[derive(Clone, Serialize, PartialEq, Eq)]
struct Progress {
    events: u64,
    /// Bytes acknowledged by the store; nothing where the whole chain was not read.
    stored: Option<u64>,
    /// The step under way, or the last that ended.
    step: String,
    /// When the newest event was put, by the store's clock: the host's own may be set to anything.
    put: Option<Timestamp>,
    /// Its chain is closed: whatever Systems Manager says, nothing more is to come.
    closed: bool,
}

impl Progress {
    fn of(newest: &Event, put: Option<Timestamp>, stored: Option<u64>) -> Self {
        Progress {
            events: newest.sequence,
            stored,
            step: match &newest.event {
                What::Opened(_) => "begun".to_owned(),
                What::Progress(p) => {
                    format!("{} {} %", p.kind, p.done.saturating_mul(100) / p.expected.max(1))
                }
                What::Step(outcome) => outcome.kind.to_string(),
                What::Closed(_) => "closed".to_owned(),
            },
            put,
            closed: matches!(newest.event, What::Closed(_)),
        }
    }

    /// Whether nothing came for too long, where the store says when something came.
    fn is_silent(&self, now: Timestamp, patience: SignedDuration) -> Option<bool> {
        if self.closed {
            return Some(false);
        }
        Some(now.duration_since(self.put?) > patience)
    }
}

/// Watches until every host is done.
pub fn watch(args: &Args, ui: &Ui) -> Result<u8> {
    let (store, order) = Order::find(&args.at, &args.capture)?;
    follow(
        &store,
        &order,
        &args.at,
        &args.stall,
        &Ssm::open(&args.at.aws.reach())?,
        ui,
    )
}

/// Looks once.
pub fn status(args: &StatusArgs, ui: &Ui) -> Result<u8> {
    let (store, order) = Order::find(&args.at, &args.capture)?;
    let ssm = Ssm::open(&args.at.aws.reach())?;
    let invocations = order.invocations(&ssm)?;
    let mut known = BTreeMap::new();
    // Of whom nothing is known, nobody says whether it is lost.
    let mut lost: BTreeMap<String, bool> = BTreeMap::new();
    let mut unseen = 0;
    for (turn, one) in invocations
        .iter()
        .filter(|i| i.state == State::InProgress)
        .enumerate()
    {
        if turn >= LOOKED_AT {
            unseen += 1;
            continue;
        }
        let Some(found) = newest(&store, order.capture, &one.host) else {
            continue;
        };
        let silent = found.is_silent(Timestamp::now(), args.stall.patience());
        if silent == Some(true) {
            args.stall.warn(&one.host, ui);
        }
        lost.extend(silent.map(|silent| (one.host.clone(), silent)));
        known.insert(one.host.clone(), found);
    }
    if unseen > 0 {
        ui.warn(&format!(
            "how far {unseen} more are was not looked at: stillframe watch does, by turns"
        ));
    }
    let view = view(&order, &invocations, &known, &lost)?;
    ui.print(&view, || table(&view, true));
    Ok(code(&order, &invocations))
}

/// 0 when every host is complete, 5 when some are not, 3 while any is under way.
fn code(order: &Order, invocations: &[Invocation]) -> u8 {
    if !order.is_over(invocations) {
        3
    } else if invocations.iter().all(|i| i.state == State::Complete) {
        0
    } else {
        5
    }
}

/// Watches an order until every host is done.
pub fn follow(store: &Store, order: &Order, at: &At, stall: &Stall, ssm: &Ssm, ui: &Ui) -> Result<u8> {
    static LEFT: AtomicBool = AtomicBool::new(false);
    let _ = ctrlc::set_handler(|| LEFT.store(true, Ordering::SeqCst));
    let commands = order.commands()?;
    let mut loans = Loans::of(order, at)?;
    let mut known: BTreeMap<String, Progress> = BTreeMap::new();
    let mut told: BTreeMap<String, String> = BTreeMap::new();
    let mut heard: BTreeMap<String, (u64, Instant)> = BTreeMap::new();
    let mut lost: BTreeSet<String> = BTreeSet::new();
    let mut chains: BTreeMap<String, Option<Chain>> = BTreeMap::new();
    let (mut turn, mut missed) = (0, 0);
    let began = Instant::now();
    loop {
        // It is normal that the service knows nothing of a command for a moment.
        let invocations = match order.invocations(ssm) {
            Ok(invocations) => invocations,
            // A network that is gone for a while is no reason to leave hosts without new credentials.
            Err(error) if !told.is_empty() && missed < MISSED => {
                missed += 1;
                ui.warn(&format!("{error:#}; trying again"));
                std::thread::sleep(BETWEEN);
                continue;
            }
            Err(error) => return Err(error),
        };
        missed = 0;
        if invocations.is_empty() && began.elapsed() > NOBODY {
            bail!(
                "Systems Manager knows of no host that got command {}: has any that tag, or is any in that group?",
                commands.join(", ")
            );
        }
        let running: Vec<&Invocation> = invocations
            .iter()
            .filter(|i| i.state == State::InProgress)
            .collect();
        for one in running
            .iter()
            .cycle()
            .skip(turn)
            .take(LOOKED_UP.min(running.len()))
        {
            if chains.len() >= KEPT && !chains.contains_key(&one.host) {
                chains.clear();
            }
            let chain = chains.entry(one.host.clone()).or_default();
            let found = progress(store, order.capture, &one.host, chain);
            let events = found.as_ref().map_or(0, |p| p.events);
            let host = heard.entry(one.host.clone()).or_insert((events, Instant::now()));
            if host.0 != events || found.as_ref().is_some_and(|p| p.closed) {
                *host = (events, Instant::now());
                lost.remove(&one.host);
            } else if host.1.elapsed() > Duration::from_secs(stall.stall) && lost.insert(one.host.clone()) {
                stall.warn(&one.host, ui);
            }
            known.extend(found.map(|p| (one.host.clone(), p)));
        }
        loans.tend(order, &invocations, &known, ui);
        turn = turn.wrapping_add(LOOKED_UP) % running.len().max(1);
        // One line a host whenever something is new, so that a log reads well; a fleet's table comes at the end.
        if invocations.len() <= 50 {
            for one in &invocations {
                let line = line(one, known.get(&one.host));
                if told.insert(one.host.clone(), line.clone()).as_ref() != Some(&line) {
                    ui.say(&line);
                }
            }
        } else {
            let line = counted(&counts(&invocations));
            if told.insert(String::new(), line.clone()).as_ref() != Some(&line) {
                ui.say(&line);
            }
        }
        lost.retain(|host| running.iter().any(|one| one.host == *host));
        let over = order.is_listed(&invocations)
            && invocations
                .iter()
                .all(|i| i.state.is_over() || lost.contains(&i.host));
        if over || LEFT.load(Ordering::SeqCst) {
            let of = |one: &Invocation| (one.host.clone(), lost.contains(&one.host));
            let lost = invocations.iter().map(of).collect();
            let view = view(order, &invocations, &known, &lost)?;
            ui.print(&view, || {
                if over {
                    table(&view, invocations.len() > 50)
                } else {
                    format!(
                        "left; the capture goes on (and nothing that is lent is renewed): stillframe watch {} --store {}",
                        order.capture,
                        printable(order.store.as_bytes())
                    )
                }
            });
            return Ok(code(order, &invocations));
        }
        std::thread::sleep(BETWEEN);
    }
}

/// Credentials that hosts were lent: renewed while they are needed, taken back when they are not.
struct Loans {
    lender: Option<Lender>,
    /// The newest of each host.
    loans: BTreeMap<String, Loan>,
    /// Hosts that were lent others than the first: when an agent has read those, nobody knows.
    renewed: BTreeSet<String>,
    /// Hosts whose order lies in its bucket no longer.
    taken: BTreeSet<String>,
}

impl Loans {
    fn of(order: &Order, at: &At) -> Result<Self> {
        let lender = order.session.as_ref().map(|s| Lender::open(&at.aws.reach(), s));
        Ok(Loans {
            lender: lender.transpose()?,
            loans: order.loans.clone(),
            renewed: BTreeSet::new(),
            taken: BTreeSet::new(),
        })
    }

    fn tend(&mut self, order: &Order, hosts: &[Invocation], known: &BTreeMap<String, Progress>, ui: &Ui) {
        let Some(lender) = &self.lender else { return };
        for one in hosts {
            let host = &one.host;
            let half_over = self.loans.get(host).is_some_and(|loan| {
                Timestamp::now().duration_since(loan.lent) > loan.expires.duration_since(loan.lent) / 2
            });
            // An agent that has told something has read its order; it asks for new credentials when a quarter of their time is left.
            let has_read = known.contains_key(host) && !self.renewed.contains(host);
            let done = if one.state == State::InProgress && half_over {
                self.renewed.insert(host.clone());
                self.taken.remove(host);
                lender
                    .lend(&order.store, order.capture, host)
                    .map(|loan| _ = self.loans.insert(host.clone(), loan))
            } else if (has_read || one.state.is_over()) && self.taken.insert(host.clone()) {
                lender.take_back(order.capture, host)
            } else {
                Ok(())
            };
            if let Err(error) = done {
                ui.warn(&format!("{}: {error:#}", printable(host.as_bytes())));
            }
        }
    }
}

/// How far a host's newest event says that it is.
fn newest(store: &Store, capture: CaptureId, host: &str) -> Option<Progress> {
    let stored = store.of_host(capture, host).ok()??;
    let (event, put) = stored.newest()?;
    Some(Progress::of(&event, put, None))
}

/// How far a host's chain is, read on from where it was read before.
fn progress(store: &Store, capture: CaptureId, host: &str, chain: &mut Option<Chain>) -> Option<Progress> {
    let stored = store.of_host(capture, host).ok()??;
    stored.follow(chain).ok()?;
    let chain = chain.as_ref()?;
    let (_, last) = chain.events().last()?;
    let bytes = chain.segments().map(|s| s.stored).fold(0, u64::saturating_add);
    Some(Progress::of(last, None, Some(bytes)))
}

fn counts(invocations: &[Invocation]) -> BTreeMap<State, usize> {
    let mut counts = BTreeMap::new();
    for one in invocations {
        *counts.entry(one.state).or_insert(0) += 1;
    }
    counts
}

fn counted(counts: &BTreeMap<State, usize>) -> String {
    let list: Vec<String> = counts.iter().map(|(state, n)| format!("{n} {state}")).collect();
    list.join(", ")
}

fn view<'a>(
    order: &'a Order,
    invocations: &[Invocation],
    known: &BTreeMap<String, Progress>,
    lost: &BTreeMap<String, bool>,
) -> Result<View<'a>> {
    Ok(View {
        capture: order.capture,
        commands: order.commands()?,
        store: &order.store,
        counts: counts(invocations),
        hosts: invocations
            .iter()
            .map(|one| Line {
                invocation: one.clone(),
                progress: known.get(&one.host).cloned(),
                lost: lost.get(&one.host).copied(),
            })
            .collect(),
    })
}

fn line(one: &Invocation, progress: Option<&Progress>) -> String {
    let mut line = format!(
        "  {:<24} {:<20}",
        printable(one.host.as_bytes()),
        one.state.to_string()
    );
    match (&one.told, &one.output, progress) {
        (Some(told), ..) => {
            line += &format!(" chain of {}", told.events);
            if let Some(key) = &told.key {
                line += &format!("  key {}", printable(key.as_bytes()));
            }
            if let Some(why) = &told.why {
                line += &format!("  {}", printable(why.as_bytes()));
            }
        }
        (None, Some(output), _) if one.state.is_over() => {
            line += &format!(" {}", printable(output.as_bytes()))
        }
        (None, _, Some(p)) => {
            line += &format!(" {}", printable(p.step.as_bytes()));
            if let Some(stored) = p.stored {
                line += &format!("  {} stored", bytes(stored));
            }
        }
        _ => (),
    }
    line.trim_end().to_owned()
}

/// The sum; and the hosts, where they were not told already.
fn table(view: &View, hosts: bool) -> String {
    let mut lines: Vec<String> = Vec::new();
    if hosts {
        lines.extend(
            view.hosts
                .iter()
                .map(|h| line(&h.invocation, h.progress.as_ref())),
        );
    }
    lines.push(format!(
        "{:<16}  {}{}{}{}",
        "hosts",
        count(view.hosts.len(), "host"),
        if view.hosts.is_empty() { "" } else { ": " },
        counted(&view.counts),
        match view.hosts.iter().filter(|host| host.lost == Some(true)).count() {
            0 => String::new(),
            lost => format!(", {lost} of them lost"),
        }
    ));
    if view.hosts.is_empty() {
        lines.push(format!(
            "{:<16}  Systems Manager knows of a command a moment after it was sent",
            "note"
        ));
    }
    let store = printable(view.store.as_bytes());
    let is_over = |host: &Line| host.invocation.state.is_over();
    let next = if view.hosts.iter().any(|host| host.lost == Some(true)) {
        Some("salvage")
    } else if !view.hosts.iter().all(is_over) || view.hosts.is_empty() {
        Some("watch")
    } else if view.hosts.iter().any(|host| host.invocation.told.is_some()) {
        Some("verify")
    } else {
        // Nobody wrote a capture that could be.
        None
    };
    lines.extend(next.map(|verb| {
        format!(
            "{:<16}  stillframe {verb} {} --store {store}",
            "next", view.capture
        )
    }));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_counted_by_the_store() -> Result<()> {
        let now: Timestamp = "2026-01-01T12:00:00Z".parse()?;
        let mut progress = Progress {
            events: 3,
            stored: None,
            step: String::new(),
            put: Some("2026-01-01T11:50:00Z".parse()?),
            closed: false,
        };
        let patience = SignedDuration::from_secs;
        assert_eq!(progress.is_silent(now, patience(599)), Some(true));
        assert_eq!(progress.is_silent(now, patience(600)), Some(false));
        // What is closed is not waited for.
        progress.closed = true;
        assert_eq!(progress.is_silent(now, patience(1)), Some(false));
        // A store that does not say when leaves it open.
        (progress.closed, progress.put) = (false, None);
        assert_eq!(progress.is_silent(now, patience(1)), None);
        Ok(())
    }
}
