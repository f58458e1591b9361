//! `show`: a readable summary of a capture. It reads what the chain acknowledges, each segment checked against it, and says so
//! when something is not there; the proof of the whole is for `verify`.

use super::Which;
use crate::{
    stored::{Store, Stored, Summary},
    ui::Ui,
};
use anyhow::Result;
use clap::Args as ClapArgs;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};
use stillframe_evidence::{
    chain::{Chain, Outcome},
    layout::Kind,
    records::{
        Data, Record,
        host::Host,
        processes::{Mark, Process, ProcessDetails},
        sockets::{Endpoint, Ownership, Socket},
    },
    text::Text,
    verdict::count,
};

/// Its arguments.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    which: Which,
}

/// What is shown.
#[derive(Serialize)]
struct View {
    summary: Summary,
    profile: Option<String>,
    key: String,
    host: Option<Host>,
    outcomes: Vec<Outcome>,
    unfinished: Vec<String>,
    stopped: Option<String>,
    processes: Vec<Line>,
    listening: Vec<SocketLine>,
    connected: Vec<SocketLine>,
    warnings: Vec<String>,
}

/// A process in the tree.
#[derive(Serialize)]
struct Line {
    depth: usize,
    pid: u32,
    ppid: Option<u32>,
    uid: Option<u32>,
    user: Option<Text>,
    name: Text,
    started: Option<jiff::Timestamp>,
    marks: Vec<String>,
}

/// A socket, with the names of its owners.
#[derive(Serialize)]
struct SocketLine {
    protocol: String,
    local: Option<Endpoint>,
    remote: Option<Endpoint>,
    path: Option<Text>,
    state: Option<String>,
    netns: Option<u64>,
    ownership: Ownership,
    owners: Vec<(u32, Text)>,
}

/// Shows it. 5 when something of it could not be read.
pub fn run(args: &Args, ui: &Ui) -> Result<u8> {
    let stored = Store::open(&args.which.at)?.find(&args.which.capture)?;
    let (chain, broken) = stored.chain()?;
    let view = view(&stored, &chain, broken)?;
    ui.print(&view, || text(&view));
    Ok(if view.warnings.is_empty() { 0 } else { 5 })
}

fn view(stored: &Stored, chain: &Chain, broken: Option<String>) -> Result<View> {
    let mut warnings: Vec<String> = broken.into_iter().collect();
    let (mut host, mut processes, mut details, mut sockets) = (
        None,
        BTreeMap::new(),
        BTreeMap::<u32, ProcessDetails>::new(),
        Vec::new(),
    );
    for kind in ["host", "processes", "process-details", "sockets"] {
        let kind: Kind = kind.parse()?;
        let mut unreadable = 0usize;
        let each = |line: &str| {
            match serde_json::from_str::<Record>(line).map(|r| r.data) {
                Ok(Data::Host(read)) => host = Some(*read),
                Ok(Data::Process(process)) => _ = processes.entry(process.pid).or_insert(*process),
                Ok(Data::ProcessDetails(read)) => match details.entry(read.pid) {
                    Entry::Vacant(new) => _ = new.insert(*read),
                    Entry::Occupied(known) => known.into_mut().maps.extend(read.maps),
                },
                Ok(Data::Socket(socket)) => sockets.push(*socket),
                Ok(_) => (),
                Err(_) => unreadable += 1,
            }
            Ok(())
        };
        stored.lines(chain, &kind, each, |why| warnings.push(why))?;
        if unreadable > 0 {
            warnings.push(format!("{kind}: {} of unknown form", count(unreadable, "record")));
        }
    }
    let outcomes: Vec<Outcome> = chain.outcomes().cloned().collect();
    let plan = chain.opening().map(|o| o.plan.as_slice()).unwrap_or_default();
    let names: BTreeMap<u32, Text> = processes.iter().map(|(pid, p)| (*pid, name(p))).collect();
    let (listening, connected) = socket_lines(sockets, &names);
    Ok(View {
        summary: stored.summary(),
        profile: chain.opening().map(|o| o.order.profile.clone()),
        key: chain.key().to_string(),
        host,
        unfinished: plan
            .iter()
            .skip(outcomes.len())
            .map(|s| s.kind.to_string())
            .collect(),
        outcomes,
        stopped: chain.closing().and_then(|c| c.stopped.clone()),
        processes: tree(&processes, &details),
        listening,
        connected,
        warnings,
    })
}

/// The command line, or in brackets the name that the kernel has.
fn name(process: &Process) -> Text {
    let words = process.cmdline.as_deref().unwrap_or_default();
    if words.iter().any(|w| !w.0.is_empty()) {
        return Text(words.iter().map(|w| w.as_bytes()).collect::<Vec<_>>().join(&b' '));
    }
    let comm = process.comm.as_ref().map_or(&b"?"[..], |c| c.as_bytes());
    Text([b"[", comm, b"]"].concat())
}

/// Depth first, from the processes whose parent was not seen. A parent named in a circle is a root of its own.
fn tree(processes: &BTreeMap<u32, Process>, details: &BTreeMap<u32, ProcessDetails>) -> Vec<Line> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let mut roots = Vec::new();
    for (pid, process) in processes {
        match process
            .ppid
            .filter(|ppid| ppid != pid && processes.contains_key(ppid))
        {
            Some(ppid) => children.entry(ppid).or_default().push(*pid),
            None => roots.push(*pid),
        }
    }
    let mut lines = Vec::new();
    let mut seen = BTreeSet::new();
    let everybody = processes.keys().copied();
    for root in roots.into_iter().chain(everybody) {
        let mut stack = vec![(root, 0)];
        while let Some((pid, depth)) = stack.pop() {
            let Some(process) = processes.get(&pid) else {
                continue;
            };
            if !seen.insert(pid) {
                continue;
            }
            lines.push(Line {
                depth,
                pid,
                ppid: process.ppid,
                uid: process.uids.map(|[_, effective, ..]| effective),
                user: process.user.clone(),
                name: name(process),
                started: process.started,
                marks: marks(process, details.get(&pid)),
            });
            stack.extend(
                children
                    .get(&pid)
                    .into_iter()
                    .flatten()
                    .rev()
                    .map(|child| (*child, depth + 1)),
            );
        }
    }
    lines
}

fn marks(process: &Process, details: Option<&ProcessDetails>) -> Vec<String> {
    let mut marks = Vec::new();
    let exe = process.exe.as_ref().map(|e| e.as_bytes()).unwrap_or_default();
    if exe.starts_with(b"/memfd:") {
        marks.push("runs from a memfd".to_owned());
    } else if process.exe_deleted == Some(true) {
        marks.push("deleted program".to_owned());
    }
    if let Some(tracer) = process.tracer {
        marks.push(format!("traced by {tracer}"));
    }
    if let Some(container) = &process.container {
        marks.push(format!(
            "container {}",
            container.id.chars().take(12).collect::<String>()
        ));
    }
    let has = |mark: Mark| details.is_some_and(|d| d.maps.iter().any(|m| m.marks.contains(&mark)));
    if has(Mark::AnonymousExecutable) {
        marks.push("anonymous executable memory".to_owned());
    }
    if has(Mark::WritableExecutable) {
        marks.push("writable executable memory".to_owned());
    }
    marks
}

fn socket_lines(sockets: Vec<Socket>, names: &BTreeMap<u32, Text>) -> (Vec<SocketLine>, Vec<SocketLine>) {
    let (mut listening, mut connected) = (Vec::new(), Vec::new());
    for socket in sockets {
        let udp_server =
            socket.local.is_some() && socket.remote.is_none() && !socket.protocol.starts_with("tcp");
        let listens = socket.state.as_deref() == Some("LISTEN") || udp_server;
        let (is_inet, is_connected) = (socket.local.is_some(), socket.remote.is_some());
        let owner = |pid: u32| (pid, names.get(&pid).cloned().unwrap_or_default());
        let pids: BTreeSet<u32> = socket.owners.iter().map(|o| o.pid).collect();
        let line = SocketLine {
            protocol: socket.protocol,
            local: socket.local,
            remote: socket.remote,
            path: socket.path,
            state: socket.state,
            netns: socket.netns,
            ownership: socket.ownership,
            owners: pids.into_iter().map(owner).collect(),
        };
        if listens {
            listening.push(line);
        } else if is_inet && is_connected {
            connected.push(line);
        }
    }
    (listening, connected)
}

fn text(view: &View) -> String {
    let mut out = Vec::new();
    let s = &view.summary;
    let case = s.case.as_ref().map_or("?", |c| c.as_str());
    let hostname = s.host.clone().unwrap_or_default();
    let profile = stillframe_evidence::text::printable(view.profile.as_deref().unwrap_or("?").as_bytes());
    let started = s.started.map_or_else(|| "?".to_owned(), |t| format!("{t:.0}"));
    out.push(format!(
        "capture {}  {}  host {hostname}  case {case}  profile {profile}",
        s.id,
        s.state.as_str()
    ));
    out.push(format!("begun   {started}, key {}", view.key));
    if let Some(host) = &view.host {
        out.extend(host_lines(host));
    }
    out.push("proof   not looked at here: `stillframe verify` proves or names what is wrong".to_owned());
    if let Some(why) = &view.stopped {
        out.push(format!(
            "ENDED EARLY  {}",
            stillframe_evidence::text::printable(why.as_bytes())
        ));
    }
    for warning in &view.warnings {
        out.push(format!("NOT READ  {warning}"));
    }
    out.push(String::new());
    out.extend(view.outcomes.iter().map(|o| format!("  {o}")));
    out.extend(
        view.unfinished
            .iter()
            .map(|kind| format!("  {kind:<16} no outcome: the capture ended before it")),
    );
    for outcome in view.outcomes.iter().filter(|o| o.problems.len() > 1) {
        out.push(format!("\n{}: what could not be read", outcome.kind));
        out.extend(outcome.problems.iter().map(|p| format!("  {p}")));
    }
    out.push(format!(
        "\n{}",
        count(view.processes.len(), "process").replace("processs", "processes")
    ));
    out.extend(view.processes.iter().map(process_line));
    for (title, sockets) in [("listening", &view.listening), ("connected", &view.connected)] {
        let known = if view.warnings.is_empty() {
            ""
        } else {
            ", as far as it could be read"
        };
        out.push(format!("\n{} {title}{known}", count(sockets.len(), "socket")));
        out.extend(sockets.iter().map(|s| socket_line(s, view.host.as_ref())));
    }
    out.join("\n")
}

fn host_lines(host: &Host) -> Vec<String> {
    let mut lines = Vec::new();
    let name = host
        .distribution
        .get("PRETTY_NAME")
        .map(|n| format!("{n}, "))
        .unwrap_or_default();
    if let Some(kernel) = &host.kernel {
        lines.push(format!("system  {name}{kernel}"));
    }
    if let Some(booted) = host.booted {
        lines.push(format!("booted  {booted:.0}"));
    }
    if let Some(taint) = host.taint.as_ref().filter(|t| t.bits != 0) {
        lines.push(format!("taint   {}", taint.reasons.join(", ")));
    }
    if host.agent_contained == Some(true) {
        lines.push("NOTE    taken inside a container's namespaces: this is not the whole host".to_owned());
    }
    lines
}

fn process_line(line: &Line) -> String {
    let user = line
        .user
        .as_ref()
        .map(ToString::to_string)
        .or(line.uid.map(|u| u.to_string()))
        .unwrap_or_default();
    let indent = "  ".repeat(line.depth.min(20));
    // Long command lines stand whole in `cat processes`.
    let shown: String = line.name.to_string().chars().take(120).collect();
    let marks = if line.marks.is_empty() {
        String::new()
    } else {
        format!("   <- {}", line.marks.join(", "))
    };
    format!("{:>8} {user:>6}  {indent}{shown}{marks}", line.pid)
}

fn socket_line(socket: &SocketLine, host: Option<&Host>) -> String {
    let end = |e: &Endpoint| match e.address.is_ipv6() {
        true => format!("[{}]:{}", e.address, e.port),
        false => format!("{}:{}", e.address, e.port),
    };
    let place = match (&socket.local, &socket.remote, &socket.path) {
        (Some(local), Some(remote), _) => format!("{} -> {}", end(local), end(remote)),
        (Some(local), None, _) => end(local),
        (None, _, Some(path)) => path.to_string(),
        (None, _, None) => String::new(),
    };
    let owner = |(pid, name): &(u32, Text)| {
        format!("{pid} {}", name.to_string().chars().take(60).collect::<String>())
    };
    let owners = match socket.ownership {
        Ownership::Owned => socket.owners.iter().map(owner).collect::<Vec<_>>().join(", "),
        Ownership::Ownerless => "without an owner".to_owned(),
        Ownership::Kernel => "of the kernel".to_owned(),
        Ownership::Unknown => "owner unknown: not every process could be read".to_owned(),
    };
    let agents = host.and_then(|h| h.agent_namespaces.get("net")).map(|n| n.inode);
    let netns = match socket.netns {
        Some(inode) if agents.is_some() && agents != Some(inode) => format!("  net:[{inode}]"),
        _ => String::new(),
    };
    format!(
        "  {:<8} {:<12} {place}{netns}   {owners}",
        socket.protocol,
        socket.state.as_deref().unwrap_or("")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use stillframe_evidence::records::sockets::Owner;

    fn process(pid: u32, ppid: u32, cmdline: &[&[u8]]) -> (u32, Process) {
        let cmdline = Some(cmdline.iter().map(|w| Text(w.to_vec())).collect());
        (
            pid,
            Process {
                pid,
                ppid: Some(ppid),
                uids: Some([0; 4]),
                cmdline,
                ..Process::default()
            },
        )
    }

    #[test]
    fn what_a_person_reads() {
        let (pid, mut evil) = process(9, 1, &[b"evil\x1b[2J\nname", b"\xff"]);
        evil.exe = Some(Text::from("/memfd:x"));
        let processes = BTreeMap::from([
            process(1, 0, &[b"init"]),
            (pid, evil),
            process(10, 9, &[]),
            // Two that name each other as parent.
            process(20, 21, &[b"a"]),
            process(21, 20, &[b"b"]),
        ]);
        let socket = |protocol: &str, port: u16, ownership, owner: &[u32]| Socket {
            protocol: protocol.to_owned(),
            local: Some(Endpoint {
                address: "::1".parse().unwrap(),
                port,
            }),
            state: Some("LISTEN".to_owned()),
            ownership,
            owners: owner
                .iter()
                .map(|pid| Owner {
                    pid: *pid,
                    fd: Some(3),
                })
                .collect(),
            ..Socket::default()
        };
        let names = processes.iter().map(|(pid, p)| (*pid, name(p))).collect();
        let sockets = vec![
            socket("tcp6", 22, Ownership::Owned, &[9]),
            socket("tcp6", 23, Ownership::Ownerless, &[]),
            socket("tcp6", 24, Ownership::Unknown, &[]),
        ];
        let tree: Vec<String> = tree(&processes, &BTreeMap::new())
            .iter()
            .map(process_line)
            .collect();
        let listening: Vec<String> = socket_lines(sockets, &names)
            .0
            .iter()
            .map(|s| socket_line(s, None))
            .collect();
        insta::assert_snapshot!([tree, listening].concat().join("\n"), @r"
             1      0  init
             9      0    evil\x1b[2J\nname \xff   <- runs from a memfd
            10      0      [?]
            20      0  a
            21      0    b
        tcp6     LISTEN       [::1]:22   9 evil\x1b[2J\nname \xff
        tcp6     LISTEN       [::1]:23   without an owner
        tcp6     LISTEN       [::1]:24   owner unknown: not every process could be read
        ");
    }
}
