//! `cargo bench -p stillframe-tests --bench upload`: a stream of 2 GiB into a real S3 API server beside `zstd -1 -T2 | aws s3 cp -`, what the agent takes in a guest
//! of 1 GiB meanwhile, and how long after an order the first event lands. Needs what `tests/run` fetches. `-- native`, `-- guest` or `-- order` runs one part.
//!
//! Both upload straight into the server, which is slower than S3 and runs on the same processors.

use anyhow::{Context as _, Result, ensure};
use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use stillframe_tests::{
    captured::{self, FILL, MARKERS},
    cloud::{BUCKET, Cloud, INSTANCE, localstack::LocalStack},
    cost::{median, run},
    guest::{JOIN_NETWORK, Machine},
    programs,
};

const TURNS: usize = 3;
const KEYS: [(&str, &str); 3] = [
    ("AWS_ACCESS_KEY_ID", "bench"),
    ("AWS_SECRET_ACCESS_KEY", "bench"),
    ("AWS_REGION", "us-east-1"),
];

fn main() -> Result<()> {
    programs::require(&["zstd"])?;
    let asked: Vec<String> = std::env::args().collect();
    let parts = ["native", "guest", "order"];
    let all = !asked.iter().any(|a| parts.contains(&&a[..]));
    let wanted = |part: &str| all || asked.iter().any(|a| a == part);
    if wanted("native") {
        native()?;
    }
    if wanted("guest") {
        guest()?;
    }
    if wanted("order") {
        order()?;
    }
    Ok(())
}

fn aws(server: &LocalStack) -> Result<Command> {
    let program = programs::target().join("lab/awscli/bin/aws");
    ensure!(
        program.exists(),
        "{}: not there; `tests/run` installs it",
        program.display()
    );
    let mut aws = Command::new(program);
    aws.envs(KEYS)
        .env("AWS_ENDPOINT_URL", url(server))
        .stdout(Stdio::null());
    Ok(aws)
}

fn url(server: &LocalStack) -> String {
    format!("http://127.0.0.1:{}", server.port)
}

fn native() -> Result<()> {
    let folder = captured::scratch()?;
    let (image, stream) = (
        folder.path().join("guest.lime"),
        folder.path().join("stream.lime"),
    );
    captured::guest_image(&image)?;
    captured::repeat(&image, 2, &stream)?;
    let server = LocalStack::start()?;
    ensure!(
        aws(&server)?.args(["s3", "mb", "s3://bench"]).status()?.success(),
        "no bucket"
    );
    let (agent, cli) = (
        programs::static_agent()?,
        programs::target().join("lab/awscli/bin/aws"),
    );
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for turn in 0..TURNS {
        let target = format!("s3://bench/turn-{turn}");
        let capture = run(Command::new(&agent)
            .args([
                "capture",
                "--profile",
                "memory",
                "--writer",
                "bench",
                "--store",
                &target,
                "--image",
            ])
            .arg(&stream)
            .envs(KEYS)
            .env("AWS_ENDPOINT_URL", url(&server)))?;
        empty(&server, &target)?;
        let copy = run(Command::new("sh")
            .args([
                "-c",
                "zstd -1 -T2 -q -c \"$0\" | \"$1\" s3 cp - s3://bench/peer.zst",
            ])
            .arg(&stream)
            .arg(&cli)
            .envs(KEYS)
            .env("AWS_ENDPOINT_URL", url(&server)))?;
        empty(&server, "s3://bench")?;
        ours.push(capture);
        theirs.push(copy);
    }
    let wall = |costs: &[_]| median(costs.to_vec(), |c| c.wall);
    println!("2 GiB of a guest's memory to an S3 API server, {TURNS} turns");
    println!(
        "  stillframe-agent           {:6.2} s  {:4.0} MiB resident (limit 48)",
        wall(&ours),
        median(ours.clone(), |c| c.resident)
    );
    println!(
        "  zstd -1 -T2 | aws s3 cp -  {:6.2} s                    ours takes {:.2} of it (limit 1.00)",
        wall(&theirs),
        wall(&ours) / wall(&theirs)
    );
    Ok(())
}

fn empty(server: &LocalStack, what: &str) -> Result<()> {
    let done = aws(server)?
        .args(["s3", "rm", "--recursive", "--quiet", what])
        .status()?;
    ensure!(done.success(), "{what} was not emptied");
    Ok(())
}

/// The agent's processes in a full guest of 1 GiB.
fn guest() -> Result<()> {
    let server = LocalStack::start()?;
    ensure!(
        aws(&server)?.args(["s3", "mb", "s3://bench"]).status()?.success(),
        "no bucket"
    );
    let machine = Machine {
        cpus: 1,
        disk: 16,
        network: true,
        ..Machine::default()
    };
    let keys: String = KEYS
        .iter()
        .map(|(name, value)| format!("export {name}={value}\n"))
        .collect();
    let script = format!(
        "FILL=600\n{MARKERS}{FILL}{JOIN_NETWORK}sleep 1\n{keys}\
         (while sleep 0.2; do for p in $(pidof stillframe-agent); do grep -E 'RssAnon|VmHWM' /proc/$p/status; done; done) > /run/watched 2>/dev/null &\nwatch=$!\n\
         /stillframe-agent capture --profile memory --writer bench --store s3://bench --endpoint-url http://10.0.2.2:{} > /run/told 2>&1\n\
         code=$?\nkill $watch\ntail -1 /run/told\n\
         echo \"PEAK $(grep RssAnon /run/watched | awk '{{print $2}}' | sort -n | tail -1) KiB anonymous, $(grep VmHWM /run/watched | awk '{{print $2}}' | sort -n | tail -1) KiB in all, code $code\"\n",
        server.port
    );
    let (agent, lab) = (programs::static_agent()?, programs::static_lab()?);
    let ran = machine
        .boot(
            &script,
            &[("stillframe-agent", &agent), ("lab", &lab)],
            &["virtio_net"],
        )?
        .ended()?;
    let peak = ran.console.lines().find_map(|line| line.strip_prefix("PEAK "));
    let peak = peak.with_context(|| ran.console.clone())?;
    ensure!(peak.ends_with("code 0"), "{}", ran.console);
    println!("a guest of 1 GiB, 600 MiB filled, to an S3 API server");
    println!("  stillframe-agent           {peak} (limit 12 MiB)");
    Ok(())
}

/// From the start of `stillframe capture` to the moment at which the first event is put.
fn order() -> Result<()> {
    let cloud = Cloud::start()?;
    let (agent, url, store) = (programs::agent()?, cloud.gate.url(), format!("s3://{BUCKET}"));
    let first = |seen: usize| {
        let log = cloud
            .gate
            .log
            .lock()
            .map_err(|_| anyhow::anyhow!("the gate's log"))?;
        let evidence = format!("{BUCKET}/evidence/");
        let mut puts = log.iter().skip(seen);
        Ok::<_, anyhow::Error>(puts.any(|d| d.action == "s3:PutObject" && d.resource.contains(&evidence)))
    };
    let mut took = Vec::new();
    for _ in 0..TURNS {
        let seen = cloud.gate.log.lock().map_or(0, |log| log.len());
        let began = Instant::now();
        let mut order = cloud.responder()?;
        order
            .args([
                "capture",
                "--instance",
                INSTANCE,
                "--watch",
                "--store",
                &store,
                "--host-endpoint-url",
                &url,
                "--agent-path",
            ])
            .arg(&agent)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut order = order.spawn()?;
        while !first(seen)? {
            ensure!(began.elapsed() < Duration::from_secs(60), "no event");
            std::thread::sleep(Duration::from_millis(2));
        }
        took.push(began.elapsed().as_secs_f64());
        order.wait()?;
    }
    took.sort_by(f64::total_cmp);
    println!(
        "from `stillframe capture --instance` to the first event in the lab: {:.2} s (limit 2)",
        took[took.len() / 2]
    );
    Ok(())
}
