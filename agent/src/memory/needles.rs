//! What must not stand in an image of this host: the credentials with which the image itself is stored. The agent, the TLS library and the kernel's
//! network buffers leave copies that nobody can list, so every frame is searched for them, and a page that has one is left out.
//!
//! Keys that are derived from a secret for signing are not searched for: temporary credentials are of no use without their token, which is.

use memchr::memmem::Finder;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that are searched for: enough to be nobody else's, and few enough that of a secret cut in two by the end of a page one half has them.
const PIECE: usize = 16;

/// Gives the secrets that are known now; more may come, and none is taken back.
pub type Secrets<'a> = dyn Fn() -> Vec<String> + Sync + 'a;

/// Searches for secrets.
pub struct Needles<'a> {
    secrets: &'a Secrets<'a>,
    /// How many secrets there were last, and their pieces.
    known: Mutex<(usize, Arc<Vec<Finder<'static>>>)>,
}

impl<'a> Needles<'a> {
    /// For what `secrets` gives whenever it is asked.
    pub fn new(secrets: &'a Secrets<'a>) -> Self {
        Needles {
            secrets,
            known: Mutex::default(),
        }
    }

    /// Where pieces of secrets stand in `plain`: offsets of their first byte, and of the one behind them.
    pub fn inside(&self, plain: &[u8]) -> Vec<(u64, u64)> {
        let pieces = self.pieces();
        let mut found = Vec::new();
        for piece in pieces.iter() {
            let size = piece.needle().len();
            found.extend(piece.find_iter(plain).map(|at| (at as u64, (at + size) as u64)));
        }
        found
    }

    fn pieces(&self) -> Arc<Vec<Finder<'static>>> {
        let secrets = (self.secrets)();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.0 != secrets.len() {
            let pieces = secrets.iter().flat_map(|secret| pieces(secret.as_bytes()));
            let finders = pieces.map(|piece| Finder::new(piece).into_owned()).collect();
            *known = (secrets.len(), Arc::new(finders));
        }
        known.1.clone()
    }
}

/// Two pieces of a secret, of its second half and of its end: tokens of different people begin alike.
fn pieces(secret: &[u8]) -> impl Iterator<Item = &[u8]> {
    let end = secret.len().checked_sub(PIECE);
    let middle = end.map(|end| (secret.len() / 2).saturating_sub(PIECE).min(end));
    // A secret that is shorter than a piece is no secret.
    [middle, end]
        .into_iter()
        .flatten()
        .filter_map(|at| secret.get(at..at + PIECE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Wherever a page ends in a secret of AWS's length, one of its halves is found.
        #[test]
        fn a_secret_cut_in_two_is_found(secret in "[A-Za-z0-9/+]{40}", cut in 0usize..=40, before in 0usize..100) {
            let secrets = || vec![secret.clone()];
            let needles = Needles::new(&secrets);
            let mut whole = vec![0; before];
            whole.extend(secret.as_bytes());
            prop_assert!(!needles.inside(&whole).is_empty());
            for (start, end) in needles.inside(&whole) {
                prop_assert!(start >= before as u64 && end <= whole.len() as u64);
            }
            let (first, second) = secret.as_bytes().split_at(cut);
            prop_assert!(!needles.inside(first).is_empty() || !needles.inside(second).is_empty());
            prop_assert!(needles.inside(&vec![b'A'; 5000]).is_empty() || secret.contains(&"A".repeat(PIECE)));
        }
    }

    #[test]
    fn what_comes_later_is_searched_for_too() {
        let all = Mutex::new(vec!["0123456789abcdefghij".to_owned()]);
        let secrets = || all.lock().unwrap().clone();
        let needles = Needles::new(&secrets);
        let text = b"...ABCDEFGHIJKLMNOPQRST...";
        assert!(needles.inside(text).is_empty());
        all.lock().unwrap().push("ABCDEFGHIJKLMNOPQRST".to_owned());
        assert!(!needles.inside(text).is_empty());
    }
}
