//! Processes, as the `sysinfo` library reads them: NtQuerySystemInformation, and each process's own parameters.

use crate::collect::{Collection, Errors, Unsupported};
use jiff::Timestamp;
use std::io;
use stillframe_evidence::{
    records::{Data, processes::Process},
    text::Text,
};
use sysinfo::{ProcessRefreshKind, ProcessesToUpdate, System, UpdateKind};

/// Every process in the order of its id.
pub fn collect(c: &mut Collection) -> Result<(), Unsupported> {
    let read_at = Timestamp::now();
    let mut system = System::new().map_err(|e| Unsupported(e.to_string()))?;
    let kind = ProcessRefreshKind::nothing()
        .with_memory()
        .with_cmd(UpdateKind::Always)
        .with_cwd(UpdateKind::Always)
        .with_exe(UpdateKind::Always)
        .with_user(UpdateKind::Always);
    system.refresh_processes_specifics(ProcessesToUpdate::All, true, kind);
    let mut processes: Vec<_> = system.processes().values().collect();
    processes.sort_by_key(|p| p.pid());
    let text = |s: &std::ffi::OsStr| Text::from(s.as_encoded_bytes());
    for p in processes {
        let pid = p.pid().as_u32();
        if !c.item(u64::from(pid), format!("process {pid}")) {
            continue;
        }
        let started = i64::try_from(p.start_time())
            .ok()
            .and_then(|s| Timestamp::from_second(s).ok());
        let mut errors = Errors::default();
        // The idle process and the kernel have none of these; the others have them, and give them to whoever may know.
        let mut missing = |field: &str, there: bool| {
            if !there && !matches!(pid, 0 | 4) {
                let why = io::Error::other("not given: the process has none, or this user may not read it");
                let _: Option<()> = errors.keep(field, format!("process {pid}"), Err(why));
            }
        };
        missing("exe", p.exe().is_some());
        missing("cmdline", !p.cmd().is_empty());
        missing("user", p.user_id().is_some());
        let process = Process {
            pid,
            ppid: p.parent().map(|parent| parent.as_u32()),
            comm: Some(text(p.name())),
            exe: p.exe().map(|exe| text(exe.as_os_str())),
            cmdline: (!p.cmd().is_empty()).then(|| p.cmd().iter().map(|w| text(w)).collect()),
            cwd: p.cwd().map(|cwd| text(cwd.as_os_str())),
            user: p.user_id().map(|uid| Text::from(&uid.to_string())),
            resident: Some(p.memory()),
            started: started.filter(|t| t.as_second() > 0),
            ..Process::default()
        };
        c.record(
            "NtQuerySystemInformation",
            read_at,
            Data::Process(Box::new(process)),
            errors.list,
        );
        c.done();
    }
    Ok(())
}
