//! The host's clocks.

use jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};
use std::mem::MaybeUninit;
use stillframe_evidence::records::host::{Clock, Discipline};

fn micros(clock: ClockId) -> Option<u64> {
    let time = clock_gettime(clock);
    u64::try_from(time.tv_sec)
        .ok()?
        .checked_mul(1_000_000)?
        .checked_add(u64::try_from(time.tv_nsec / 1000).ok()?)
}

/// All clocks at once. `ordered_at` is the orderer's clock when the order was given.
pub fn clock(ordered_at: Option<Timestamp>) -> Clock {
    let realtime = Timestamp::now();
    Clock {
        realtime,
        monotonic_us: micros(ClockId::Monotonic),
        boottime_us: micros(ClockId::Boottime),
        discipline: discipline(),
        behind_order_us: ordered_at.and_then(|at| realtime.as_microsecond().checked_sub(at.as_microsecond())),
        behind_store_us: None,
    }
}

/// The moment of boot by the wall clock as it stands now, for times given in ticks since boot.
pub fn booted() -> Option<Timestamp> {
    let since = i64::try_from(micros(ClockId::Boottime)?).ok()?;
    Timestamp::from_microsecond(Timestamp::now().as_microsecond().checked_sub(since)?).ok()
}

fn discipline() -> Option<Discipline> {
    let mut state = MaybeUninit::<libc::timex>::zeroed();
    // SAFETY: timex is plain numbers, for which zero is a value; modes = 0 makes the call read only.
    #[allow(unsafe_code)]
    let (result, state) = unsafe {
        let result = libc::adjtimex(state.as_mut_ptr());
        (result, state.assume_init())
    };
    if result < 0 {
        return None;
    }
    // STA_NANO: the offset is in nanoseconds.
    let offset_us = if state.status & libc::STA_NANO != 0 {
        state.offset / 1000
    } else {
        state.offset
    };
    Some(Discipline {
        synchronized: state.status & libc::STA_UNSYNC == 0,
        offset_us,
        max_error_us: state.maxerror,
        estimated_error_us: state.esterror,
        status: state.status,
    })
}
