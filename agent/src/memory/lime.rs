//! LiME (1.9.1): a kernel module that the orderer brought for exactly this kernel, for kernels without `/proc/kcore`. It is never
//! compiled here. It writes to a TCP port of the loopback while it loads, so it is loaded by a process of its own, the
//! guardian, which also removes it when this process dies.
//!
//! Two things that LiME does unless told not to: it gives up a page that nobody reads for a second and writes zeros from there
//! on (`timeout=0`), and it listens on every address (`localhostonly=1`). What it writes waits in a socket, which is kept small: its buffers are memory of
//! this host, too.

use super::{Cutter, Held, PAGE, Share, Source};
use crate::collect::describe;
use goblin::elf::Elf;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, Read, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use stillframe_evidence::{image::lime, records::memory::MemoryGap, root::Hash, text::printable};

/// A module that is larger is not LiME.
const MAX_MODULE: u64 = 16 << 20;
/// LiME waits for its reader from the moment that it is loaded.
const TO_LISTEN: Duration = Duration::from_secs(10);
/// What the guardian gets to remove the module, twice over.
const TO_END: Duration = Duration::from_secs(20);
/// Longest silence of the kernel's side before the rest is given up.
const SILENCE: Duration = Duration::from_secs(60);

/// The module, checked.
pub struct Module {
    path: PathBuf,
    /// Its SHA-256.
    pub sha256: Hash,
}

impl Module {
    /// Reads and checks it: the hash that the orderer named, and that it was built for the running kernel. The error is one
    /// line.
    pub fn check(path: &Path, expected: Hash, release: &str) -> Result<Self, String> {
        let wrong = |why: String| format!("--lime-module {}: {why}", path.display());
        let file = File::open(path).map_err(|error| wrong(describe(&error)))?;
        let mut bytes = Vec::new();
        file.take(MAX_MODULE + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| wrong(describe(&error)))?;
        if bytes.len() as u64 > MAX_MODULE {
            return Err(wrong(format!("more than {} MiB", MAX_MODULE >> 20)));
        }
        let sha256 = Hash(Sha256::digest(&bytes).into());
        if sha256 != expected {
            return Err(wrong(format!(
                "its SHA-256 is {sha256}, not the one that was ordered"
            )));
        }
        let info = modinfo(&bytes).map_err(wrong)?;
        let value = |key: &str| {
            info.iter()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        };
        // Kernels before 4.13 do not note the name there.
        if value("name").is_some_and(|name| name != "lime") {
            return Err(wrong("it is not the module lime".to_owned()));
        }
        let vermagic = value("vermagic").unwrap_or_default();
        let built_for = vermagic.split(' ').next().unwrap_or_default();
        if built_for != release {
            let why = format!(
                "built for kernel {}, and this is {}; build it from LiME's source against the headers of this kernel, elsewhere",
                printable(built_for.as_bytes()),
                printable(release.as_bytes())
            );
            return Err(wrong(why));
        }
        Ok(Module {
            path: path.to_owned(),
            sha256,
        })
    }
}

/// The strings of `.modinfo`.
fn modinfo(bytes: &[u8]) -> Result<Vec<String>, String> {
    let elf = Elf::parse(bytes)
        .map_err(|error| format!("not a kernel module: {}", printable(error.to_string().as_bytes())))?;
    let section = elf
        .section_headers
        .iter()
        .find(|s| elf.shdr_strtab.get_at(s.sh_name) == Some(".modinfo"))
        .ok_or("not a kernel module: it has no .modinfo")?;
    let range = section
        .file_range()
        .and_then(|range| bytes.get(range))
        .ok_or("its .modinfo is cut off")?;
    let lines = range.split(|b| *b == 0).filter(|line| !line.is_empty());
    Ok(lines
        .map(|line| String::from_utf8_lossy(line).into_owned())
        .collect())
}

/// What the guardian says, a line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
enum Said {
    /// finit_module came back.
    Loaded(Result<(), String>),
    /// The module is gone, or why not.
    Removed(Result<(), String>),
}

/// What the guardian is told; one line of JSON on its standard input, which then stays open as long as its parent lives.
#[derive(Debug, Serialize, Deserialize)]
struct Job {
    module: PathBuf,
    sha256: Hash,
    port: u16,
}

/// The guardian's whole life.
pub fn guard() -> io::Result<()> {
    crate::sys::stand_alone();
    let mut input = BufReader::new(io::stdin());
    let mut line = String::new();
    input.read_line(&mut line)?;
    let job: Job = serde_json::from_str(&line)?;
    let file = File::open(&job.module)?;
    let mut bytes = Vec::new();
    (&file).take(MAX_MODULE + 1).read_to_end(&mut bytes)?;
    if Hash(Sha256::digest(&bytes).into()) != job.sha256 {
        return Err(io::Error::other("the module was changed"));
    }
    let (tell, told) = std::sync::mpsc::channel();
    let parameters = format!("path=tcp:{} format=lime timeout=0 localhostonly=1", job.port);
    std::thread::spawn(move || {
        let _ = tell.send(Err(crate::sys::this_thread()));
        let _ = tell.send(Ok(crate::sys::load_module(&file, &parameters)));
    });
    let orphaned = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flag = orphaned.clone();
    std::thread::spawn(move || {
        let mut rest = Vec::new();
        let _ = input.read_to_end(&mut rest);
        flag.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let mut loader = None;
    let loaded = loop {
        match told.recv_timeout(Duration::from_millis(200)) {
            Ok(Err(thread)) => loader = Some(thread),
            Ok(Ok(result)) => break result,
            Err(_) if orphaned.load(std::sync::atomic::Ordering::Relaxed) => {
                // Nobody reads any more: what the module waits for in the kernel is ended.
                if let Some(thread) = loader {
                    crate::sys::interrupt(thread);
                }
            }
            Err(_) => (),
        }
    };
    let is_ours = loaded.is_ok();
    say(&Said::Loaded(loaded.map_err(|e| describe(&e))));
    // One that could not be loaded is gone already, and one of that name that is there is somebody else's.
    if !is_ours {
        say(&Said::Removed(Ok(())));
        return Ok(());
    }
    let until = Instant::now() + Duration::from_secs(10);
    let removed = loop {
        match crate::sys::remove_module("lime") {
            // ENOENT: somebody else removed it.
            Err(error) if error.raw_os_error() == Some(2) => break Ok(()),
            Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
            result => break result,
        }
    };
    say(&Said::Removed(removed.map_err(|e| describe(&e))));
    Ok(())
}

fn say(said: &Said) {
    let line = serde_json::to_string(said).unwrap_or_default();
    // The parent may be gone; the work is done all the same.
    let _ = writeln!(io::stdout(), "{line}");
}

/// LiME's stream as a source.
pub struct Lime {
    expected: Vec<(u64, u64)>,
    segment: u64,
    stream: Mutex<Stream>,
    guardian: Mutex<Guardian>,
}

struct Guardian {
    child: Child,
    /// While it is open, the guardian knows that this process lives.
    alive: ChildStdin,
    said: BufReader<std::process::ChildStdout>,
}

struct Stream {
    socket: TcpStream,
    cutter: Option<Cutter>,
    shares: u64,
    /// Why it ended before its end.
    ended: Option<String>,
}

impl Lime {
    /// Loads the module through a guardian and connects. `expected` is what `/proc/iomem` lists as RAM.
    pub fn start(module: &Module, expected: Vec<(u64, u64)>, segment: u64) -> Result<Self, String> {
        let wrong = |what: &str, error: &io::Error| format!("LiME: {what}: {}", describe(error));
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr());
        let port = free.map_err(|e| wrong("no port on the loopback", &e))?.port();
        let mut child = crate::sys::own_program()
            .and_then(|program| {
                Command::new(program)
                    .arg("lime-guardian")
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::null())
                    .spawn()
            })
            .map_err(|e| wrong("no guardian", &e))?;
        let (Some(mut alive), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("LiME: no guardian".to_owned());
        };
        let job = Job {
            module: module.path.clone(),
            sha256: module.sha256,
            port,
        };
        let line = serde_json::to_string(&job).unwrap_or_default();
        writeln!(alive, "{line}").map_err(|e| wrong("no guardian", &e))?;
        let mut guardian = Guardian {
            child,
            alive,
            said: BufReader::new(output),
        };
        let until = Instant::now() + TO_LISTEN;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let socket = loop {
            match crate::sys::connect_to_module(address) {
                Ok(socket) => break socket,
                Err(_) if Instant::now() < until && guardian.child.try_wait().is_ok_and(|s| s.is_none()) => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => {
                    drop(guardian.alive);
                    let mut line = String::new();
                    let why = match guardian
                        .said
                        .read_line(&mut line)
                        .ok()
                        .and_then(|_| serde_json::from_str(&line).ok())
                    {
                        Some(Said::Loaded(Err(why))) => why,
                        _ => describe(&error),
                    };
                    let _ = guardian.child.wait();
                    return Err(format!(
                        "the LiME module could not be loaded: {}",
                        printable(why.as_bytes())
                    ));
                }
            }
        };
        socket
            .set_read_timeout(Some(SILENCE))
            .map_err(|e| wrong("the connection", &e))?;
        Ok(Lime {
            expected,
            segment,
            stream: Mutex::new(Stream {
                socket,
                cutter: None,
                shares: 0,
                ended: None,
            }),
            guardian: Mutex::new(guardian),
        })
    }

    /// Ends the connection, waits for the guardian, and says what became of the module. The error of the first is that of its
    /// loading: what was read is then not from it.
    pub fn finish(self, root: &Path) -> (Result<(), String>, Result<(), String>) {
        let stream = self.stream.into_inner().unwrap_or_else(PoisonError::into_inner);
        drop(stream);
        let Guardian {
            mut child,
            alive,
            said,
        } = self.guardian.into_inner().unwrap_or_else(PoisonError::into_inner);
        // From here on the guardian ends what the module still waits for.
        drop(alive);
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in said.lines().map_while(Result::ok) {
                let _ = serde_json::from_str::<Said>(&line).map(|said| tell.send(said));
            }
        });
        let (mut loaded, mut removed) = (Ok(()), None);
        let until = Instant::now() + TO_END;
        while let Ok(said) = told.recv_timeout(until.saturating_duration_since(Instant::now())) {
            match said {
                Said::Loaded(result) => loaded = result,
                Said::Removed(result) => removed = Some(result),
            }
        }
        let _ = child.try_wait();
        // A guardian that said nothing may have been killed: what the kernel lists decides.
        let removed = removed.unwrap_or_else(|| {
            let modules = std::fs::read_to_string(root.join("proc/modules")).unwrap_or_default();
            match modules.lines().any(|line| line.starts_with("lime ")) {
                true => crate::sys::remove_module("lime").map_err(|e| describe(&e)),
                false => Ok(()),
            }
        });
        (loaded, removed)
    }
}

impl Stream {
    /// What is next of the range under way, or of the one that follows it.
    fn share(&mut self, segment: u64) -> Result<Option<Share>, String> {
        loop {
            if let Some(mut share) = self.cutter.as_mut().and_then(Cutter::next) {
                // Each range has a cutter of its own.
                share.number = self.shares;
                self.shares += 1;
                return Ok(Some(share));
            }
            let mut header = [0; lime::HEADER];
            match read_full(&mut self.socket, &mut header) {
                (_, Ok(())) => (),
                (0, Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                (_, Err(error)) => {
                    return Err(format!("LiME, at the header of a range: {}", describe(&error)));
                }
            }
            let (start, end) = lime::parse(&header).ok_or("LiME sent what is no header of a range")?;
            self.cutter = Some(Cutter::new(&[(start, end - start + 1)], segment));
        }
    }
}

/// How many bytes came, and what came instead of the rest.
fn read_full(from: &mut impl Read, buffer: &mut [u8]) -> (u64, io::Result<()>) {
    let mut filled = 0;
    loop {
        let rest = buffer.get_mut(filled..).unwrap_or_default();
        if rest.is_empty() {
            return (filled as u64, Ok(()));
        }
        match from.read(rest) {
            Ok(0) => return (filled as u64, Err(io::ErrorKind::UnexpectedEof.into())),
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return (filled as u64, Err(error)),
        }
    }
}

impl Source for Lime {
    fn expected(&self) -> Vec<(u64, u64)> {
        self.expected.clone()
    }

    /// Reads the share as well: the stream goes on with the next one, which another thread waits for.
    fn next(&self, held: &mut Held) -> Result<Option<Share>, String> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = &stream.ended {
            return Err(why.clone());
        }
        // Whatever went wrong, where the stream is then is not known: nobody reads on.
        stream
            .next(self.segment, held)
            .inspect_err(|why| stream.ended = Some(why.clone()))
    }

    fn read(&self, held: &Held, address: u64, buffer: &mut [u8]) -> Result<Vec<MemoryGap>, String> {
        held.copy(address, buffer)
            .ok_or("a share was read that LiME did not send")?;
        Ok(Vec::new())
    }

    fn is_this_host(&self) -> bool {
        true
    }
}

impl Stream {
    fn next(&mut self, segment: u64, held: &mut Held) -> Result<Option<Share>, String> {
        let Some(mut share) = self.share(segment)? else {
            return Ok(None);
        };
        let (start, size) = share.stretches.first().copied().unwrap_or_default();
        let buffer = held
            .room(start, size, segment)
            .map_err(|error| format!("LiME: no memory for a buffer: {error}"))?;
        let (read, how) = read_full(&mut self.socket, buffer);
        if let Err(error) = how {
            // What came before the end is a shorter share.
            let why = format!(
                "LiME ended at {:#x}: {}",
                start.saturating_add(read),
                describe(&error)
            );
            let whole = read - read % PAGE;
            if whole == 0 {
                return Err(why);
            }
            self.ended = Some(why);
            share.head = lime::header(start, start.saturating_add(whole - 1)).to_vec();
            share.stretches = vec![(start, whole)];
        }
        Ok(Some(share))
    }
}
