//! A request to stop: the capture ends the item that it is at, signs what it has and exits.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Set once, by Ctrl-C, SIGTERM or SIGHUP.
#[derive(Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// A request that those signals make. A second one while it is under way changes nothing: SIGKILL remains.
    pub fn on_signals() -> Self {
        let cancel = Cancel::default();
        let flag = cancel.0.clone();
        // Without a handler the default action ends the agent; what was acknowledged stays valid then too.
        let _ = ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed));
        cancel
    }

    /// Why, if it was requested.
    pub fn requested(&self) -> Option<&'static str> {
        self.0.load(Ordering::Relaxed).then_some("asked to by a signal")
    }
}
