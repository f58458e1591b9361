//! What commands cost, for the benchmarks.

use anyhow::{Context as _, Result, ensure};
use std::{
    process::{Command, Stdio},
    time::Instant,
};

/// What a command cost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Seconds.
    pub wall: f64,
    /// Seconds.
    pub cpu: f64,
    /// MiB.
    pub resident: f64,
}

/// Runs it to its end, which must be a good one. Its output is not kept.
pub fn run(command: &mut Command) -> Result<Cost> {
    let began = Instant::now();
    let child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("a command of the bench")?;
    let pid = i32::try_from(child.id())?;
    // SAFETY: the structure is plain numbers and initialised; the child is this function's own and waited for here alone.
    #[allow(unsafe_code)]
    let (status, usage) = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        let mut status = 0;
        ensure!(
            libc::wait4(pid, &raw mut status, 0, &raw mut usage) == pid,
            "wait4"
        );
        (status, usage)
    };
    ensure!(status == 0, "{command:?} ended with {status}");
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    Ok(Cost {
        wall: began.elapsed().as_secs_f64(),
        cpu: seconds(usage.ru_utime) + seconds(usage.ru_stime),
        resident: usage.ru_maxrss as f64 / 1024.0,
    })
}

/// The median of one of its numbers.
pub fn median(mut costs: Vec<Cost>, of: impl Fn(&Cost) -> f64) -> f64 {
    costs.sort_by(|a, b| of(a).total_cmp(&of(b)));
    of(&costs[costs.len() / 2])
}
