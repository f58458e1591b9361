//! Whether the host is short of memory while it is captured: the kernel's own measure of tasks that wait for it
//! (`Documentation/accounting/psi.rst`, Linux 4.20). Where a kernel has none, nothing holds the stream back but `--max-rate`.

use std::{fs, path::Path, time::Duration};

/// Percent of the last ten seconds in which some task waited, from which on the stream steps back.
const STEP_BACK: f32 = 10.0;
/// Percent of the last ten seconds in which every task waited, from which on it ends: what the host does is worth more than the rest of
/// its image.
const END: f32 = 40.0;
/// How long a thread that steps back waits before its next frame.
pub const PAUSE: Duration = Duration::from_millis(5);

/// What to do about it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shortage {
    /// Nothing.
    None,
    /// Read more slowly.
    Some,
    /// Stop: every task waited for so many percent of the last ten seconds.
    All(f32),
}

/// As the host below `root` stands now.
pub fn now(root: &Path) -> Shortage {
    fs::read_to_string(root.join("proc/pressure/memory")).map_or(Shortage::None, |text| judge(&text))
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same with `full`.
fn judge(text: &str) -> Shortage {
    let average = |who: &str| -> Option<f32> {
        let line = text.lines().find_map(|line| line.strip_prefix(who))?;
        let ten = line
            .split_ascii_whitespace()
            .find_map(|field| field.strip_prefix("avg10="));
        ten?.parse().ok()
    };
    match (average("some "), average("full ")) {
        (_, Some(full)) if full >= END => Shortage::All(full),
        (Some(some), _) if some >= STEP_BACK => Shortage::Some,
        _ => Shortage::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_kernels_lines_are_understood() {
        let text = |some: &str, full: &str| {
            format!(
                "some avg10={some} avg60=0.00 avg300=0.00 total=7\nfull avg10={full} avg60=0.00 avg300=0.00 total=7\n"
            )
        };
        assert_eq!(judge(&text("9.99", "9.00")), Shortage::None);
        assert_eq!(judge(&text("10.00", "9.00")), Shortage::Some);
        assert_eq!(judge(&text("90.00", "40.00")), Shortage::All(40.0));
        assert_eq!(judge(""), Shortage::None);
    }

    proptest! {
        #[test]
        fn anything_is_read(text in "(some|full|avg10=|[0-9.]|[ \\n]){0,40}") {
            let _ = judge(&text);
        }
    }
}
