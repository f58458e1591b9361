//! Physical memory of a guest with a real kernel: what is in the image against what was there, and what real Volatility makes of it.

use std::{fs::File, path::Path, process::Command, time::Duration};
use stillframe_tests::guest::Machine;
use stillframe_tests::programs;

const SCRIPT: &str = r#"
mkfifo /run/hold
for n in one two three; do cp /lab /run/marker-$n; (exec 3<>/run/hold; exec /run/marker-$n wait <&3) & done
(exec 3<>/run/hold; /lab fill 600 <&3 > /run/filled) &
until grep -q FILLED /run/filled 2>/dev/null; do sleep 1; done
cat /proc/modules > /run/modules
/stillframe-agent memory-probe
echo READY
read go
/stillframe-agent capture --case guest --profile memory --store - > "$1" 2> /run/said &
agent=$!
tail -f /run/said & 
wait $agent
echo "AGENT ENDED $?"
grep -E 'Rss|HWM' /proc/$agent/status
read go
"#;

#[test]
fn smoke() {
    let agent = programs::static_agent().unwrap();
    let lab = programs::static_lab().unwrap();
    let mut guest = Machine {
        disk: 1024,
        ..Machine::default()
    }
    .boot(SCRIPT, &[("stillframe-agent", &agent), ("lab", &lab)], &[])
    .unwrap();
    guest.wait_for("READY").unwrap();
    println!("{}", guest.console());
    guest.truth(Path::new("/tmp/prep/before")).unwrap();
    guest.say("go").unwrap();
    guest.wait_for("AGENT ENDED").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    guest.truth(Path::new("/tmp/prep/after")).unwrap();
    guest.say("go").unwrap();
    let ran = guest.ended().unwrap();
    println!("{}", ran.console);
    let base = Path::new("/tmp/prep/store");
    let _ = std::fs::remove_dir_all(base);
    let received = Command::new(programs::controller().unwrap())
        .args(["receive", "--store"])
        .arg(base)
        .stdin(File::open(&ran.disk).unwrap())
        .output()
        .unwrap();
    println!(
        "{}{}",
        String::from_utf8_lossy(&received.stdout),
        String::from_utf8_lossy(&received.stderr)
    );
}
