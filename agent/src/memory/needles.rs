//! What must not stand in an image of this host: the credentials with which the image itself is stored, and the capture's key where a module
//! sends the pages that hold it to the agent. The agent, the TLS library and the kernel's
//! network buffers leave copies that nobody can list, so every frame is searched for them, and they are blanked.
//!
//! Keys that are derived from a secret for signing are not searched for: temporary credentials are of no use without their token, which is.

use memchr::memmem::Finder;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that are searched for: enough to be nobody else's, and few enough that of a secret cut in two by the end of a page one half has them.
const PIECE: usize = 16;

/// Gives the secrets that are known now; more may come, and none is taken back.
pub type Secrets<'a> = dyn Fn() -> Vec<Vec<u8>> + Sync + 'a;

/// Searches for secrets.
pub struct Needles<'a> {
    secrets: &'a Secrets<'a>,
    /// How many secrets there were last, and their pieces.
    known: Mutex<(usize, Arc<Vec<Needle>>)>,
}

/// A piece of a secret.
struct Needle {
    finder: Finder<'static>,
    secret: Arc<[u8]>,
    /// Where the piece stands in it.
    at: usize,
}

impl<'a> Needles<'a> {
    /// For what `secrets` gives whenever it is asked.
    pub fn new(secrets: &'a Secrets<'a>) -> Self {
        Needles {
            secrets,
            known: Mutex::default(),
        }
    }

    /// Where secrets, or what is left of them, stand in `plain`: offsets of the first byte, and of the one behind the last. Not a byte more: whoever knows the
    /// secrets could hide what stands beside them.
    pub fn inside(&self, plain: &[u8]) -> Vec<(usize, usize)> {
        let mut found = Vec::new();
        for needle in self.needles().iter() {
            for at in needle.finder.find_iter(plain) {
                let size = needle.finder.needle().len();
                let (before, behind) = (plain.get(..at), plain.get(at + size..));
                let (head, tail) = (
                    needle.secret.get(..needle.at),
                    needle.secret.get(needle.at + size..),
                );
                let same = |a: (&u8, &u8)| a.0 == a.1;
                let left = before.zip(head).map_or(0, |(plain, head)| {
                    plain
                        .iter()
                        .rev()
                        .zip(head.iter().rev())
                        .take_while(|a| same(*a))
                        .count()
                });
                let right = behind.zip(tail).map_or(0, |(plain, tail)| {
                    plain.iter().zip(tail).take_while(|a| same(*a)).count()
                });
                found.push((at - left, at + size + right));
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    fn needles(&self) -> Arc<Vec<Needle>> {
        let secrets = (self.secrets)();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.0 != secrets.len() {
            let needles = secrets.iter().flat_map(|secret| needles(secret)).collect();
            *known = (secrets.len(), Arc::new(needles));
        }
        known.1.clone()
    }
}

/// Two pieces of a secret, of its second half and of its end: tokens of different people begin alike. A secret that is shorter than a piece is none.
fn needles(secret: &[u8]) -> impl Iterator<Item = Needle> {
    let whole: Arc<[u8]> = secret.into();
    let end = secret.len().checked_sub(PIECE);
    let middle = end.map(|end| (secret.len() / 2).saturating_sub(PIECE).min(end));
    [middle, end].into_iter().flatten().filter_map(move |at| {
        let piece = whole.get(at..at + PIECE)?;
        Some(Needle {
            finder: Finder::new(piece).into_owned(),
            secret: whole.clone(),
            at,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    proptest! {
        /// Wherever a page ends in a secret of AWS's length, one of its halves is found.
        #[test]
        fn a_secret_cut_in_two_is_found(secret in "[A-Za-z0-9/+]{40}", cut in 0usize..=40, before in 0usize..100) {
            let secrets = || vec![secret.clone().into_bytes()];
            let needles = Needles::new(&secrets);
            let mut whole = vec![0; before];
            whole.extend(secret.as_bytes());
            whole.extend(vec![b'A'; 20]);
            let ends = (before, before + secret.len());
            prop_assert!(needles.inside(&whole).contains(&ends), "all of it");
            prop_assert!(needles.inside(&whole).iter().all(|found| ends.0 <= found.0 && found.1 <= ends.1), "and nothing else");
            let (first, second) = secret.as_bytes().split_at(cut);
            prop_assert!(!needles.inside(first).is_empty() || !needles.inside(second).is_empty());
            prop_assert!(needles.inside(&vec![b'A'; 5000]).is_empty() || secret.contains(&"A".repeat(PIECE)));
        }
    }

    #[test]
    fn what_comes_later_is_searched_for_too() {
        let renewed = AtomicBool::new(false);
        let secrets = || {
            let mut all = vec![b"0123456789abcdefghij".to_vec()];
            all.extend(
                renewed
                    .load(Ordering::Relaxed)
                    .then(|| b"ABCDEFGHIJKLMNOPQRST".to_vec()),
            );
            all
        };
        let needles = Needles::new(&secrets);
        let text = b"...ABCDEFGHIJKLMNOPQRST...";
        assert!(needles.inside(text).is_empty());
        renewed.store(true, Ordering::Relaxed);
        assert!(!needles.inside(text).is_empty());
    }
}
