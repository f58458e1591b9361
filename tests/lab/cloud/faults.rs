//! What goes wrong between an agent and a store, on purpose. Which request it hits follows from a seed and a count, so a run can be repeated.

use super::http::{Reply, Response};
use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// What happens to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// 503 SlowDown; nothing took effect.
    SlowDown,
    /// 500 InternalError; nothing took effect.
    Internal,
    /// The connection is reset before anything took effect.
    Reset,
    /// No answer for a while, then a reset; nothing took effect.
    Stall,
    /// It took effect, and the answer is lost.
    AnswerLost,
    /// It took effect, and the answer is cut off.
    AnswerCut,
    /// It took effect, and the answer states another checksum.
    AnswerWrong,
    /// 403 RequestTimeTooSkewed, with the server's own time.
    Skewed,
    /// 400 ExpiredToken.
    Expired,
}

/// Every one.
pub const ALL: [Fault; 9] = [
    Fault::SlowDown,
    Fault::Internal,
    Fault::Reset,
    Fault::Stall,
    Fault::AnswerLost,
    Fault::AnswerCut,
    Fault::AnswerWrong,
    Fault::Skewed,
    Fault::Expired,
];

impl Fault {
    /// True when the request reaches the store all the same.
    pub fn takes_effect(self) -> bool {
        matches!(self, Fault::AnswerLost | Fault::AnswerCut | Fault::AnswerWrong)
    }
}

/// Which requests are hit.
#[derive(Default)]
pub struct Faults {
    list: Mutex<Vec<Fault>>,
    /// One request of so many; none where this is zero.
    one_in: AtomicU64,
    seed: AtomicU64,
    count: AtomicU64,
    hit: AtomicU64,
    /// Puts of one writer that still go through before the others are held back.
    free: Mutex<Option<(String, u64)>>,
    held: AtomicU64,
}

/// Longer than any test waits.
const HELD: Duration = Duration::from_secs(120);

impl Faults {
    /// From here on, one request of `one_in` is hit by one of `list`.
    pub fn set(&self, list: &[Fault], one_in: u64, seed: u64) {
        *self.list.lock().unwrap_or_else(PoisonError::into_inner) = list.to_vec();
        self.seed.store(seed, Ordering::SeqCst);
        self.count.store(0, Ordering::SeqCst);
        self.hit.store(0, Ordering::SeqCst);
        self.one_in.store(one_in, Ordering::SeqCst);
    }

    /// So many more puts of a writer go through; those behind them wait until [`Faults::release`].
    pub fn hold(&self, writer: &str, after: u64) {
        self.held.store(0, Ordering::SeqCst);
        *self.free.lock().unwrap_or_else(PoisonError::into_inner) = Some((writer.to_owned(), after));
    }

    /// Lets go what is held back.
    pub fn release(&self) {
        *self.free.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// How many are or were held back.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::SeqCst)
    }

    /// Waits where puts of this writer are held back.
    pub fn pass(&self, writer: &str) {
        let until = Instant::now() + HELD;
        let mut counted = false;
        while Instant::now() < until {
            match &mut *self.free.lock().unwrap_or_else(PoisonError::into_inner) {
                Some((held, free)) if held == writer && *free == 0 => (),
                None => return,
                Some((held, _)) if held != writer => return,
                Some((_, free)) => {
                    *free -= 1;
                    return;
                }
            }
            if !std::mem::replace(&mut counted, true) {
                self.held.fetch_add(1, Ordering::SeqCst);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// How many were hit.
    pub fn hit(&self) -> u64 {
        self.hit.load(Ordering::SeqCst)
    }

    /// What happens to the next one.
    pub fn next(&self) -> Option<Fault> {
        let one_in = self.one_in.load(Ordering::SeqCst);
        if one_in == 0 {
            return None;
        }
        let count = self.count.fetch_add(1, Ordering::SeqCst);
        // splitmix64
        let mut z = self
            .seed
            .load(Ordering::SeqCst)
            .wrapping_add(count.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if !z.is_multiple_of(one_in) || list.is_empty() {
            return None;
        }
        self.hit.fetch_add(1, Ordering::SeqCst);
        list.get((z / one_in) as usize % list.len()).copied()
    }
}

/// The reply to a request that was hit. `answer` is what the store answered, where it took effect.
pub fn reply(fault: Fault, answer: Option<Response>) -> Reply {
    let error = |status, code| Reply::Whole(super::principals::xml_error(status, code, "on purpose"));
    match (fault, answer) {
        (Fault::SlowDown, _) => error(503, "SlowDown"),
        (Fault::Internal, _) => error(500, "InternalError"),
        (Fault::Skewed, _) => error(403, "RequestTimeTooSkewed"),
        (Fault::Expired, _) => error(400, "ExpiredToken"),
        (Fault::Stall, _) => Reply::Silence(Duration::from_secs(1)),
        (Fault::AnswerCut, Some(answer)) => Reply::Cut(answer, 40),
        (Fault::AnswerWrong, Some(mut answer)) => {
            for (name, value) in &mut answer.headers {
                if name == "x-amz-checksum-sha256" {
                    "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=".clone_into(value);
                }
            }
            Reply::Whole(answer)
        }
        (Fault::AnswerLost | Fault::Reset | Fault::AnswerCut | Fault::AnswerWrong, _) => Reply::Reset,
    }
}
