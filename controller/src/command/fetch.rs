//! `stillframe fetch`: what a capture has of memory, on disk and ready to be analysed: the image, its symbols, what Volatility lacks,
//! and the command line. Every frame is checked against the signed chain on the way; what is damaged is left out and told.

use super::{Which, symbols};
use crate::{
    stored::{Store, Stored},
    ui::{Ui, bytes},
};
use anyhow::{Context as _, Result, anyhow, bail};
use clap::ValueEnum;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Seek as _, SeekFrom, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::sync_channel,
    },
    time::Instant,
};
use stillframe_evidence::{
    chain::{Chain, What},
    frames::{MAX_SEGMENT, Segment},
    image::{Image, elf, lime},
    layout::Artifact,
    root::{Hash, root},
    segments::SegmentEntry,
    text::printable,
    verdict::Objects as _,
};
use stillframe_symbols::{Comparison, Files, Kernel, btf::Types, compare, la57};

/// Its arguments.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: Which,
    /// The directory to write to; made when it is missing
    #[arg(long)]
    to: PathBuf,
    /// The format of the image
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Types for a kernel that carries none: the BTF of exactly its release
    #[arg(long)]
    btf: Option<PathBuf>,
    /// Write the image alone, without looking for the kernel's symbols in it
    #[arg(long)]
    no_symbols: bool,
}

/// What an image is written as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// LiME: Volatility
    #[default]
    Lime,
    /// ELF core with the VMCOREINFO note: drgn, crash, Volatility
    Elf,
    /// Physical memory from address 0, with holes
    Raw,
}

#[derive(Serialize, Default)]
struct Done {
    image: Option<PathBuf>,
    bytes: u64,
    sha256: Option<Hash>,
    segments: usize,
    /// Why there is no image, where one was asked for.
    no_image: Option<String>,
    damaged: Vec<String>,
    holes: Vec<(u64, u64)>,
    /// False when the chain was never closed: what the agent had still to say is not here.
    complete: bool,
    symbols: Option<PathBuf>,
    no_symbols: Option<String>,
    /// How what the image says of its kernel differs from what the agent read from that kernel; nothing when there was nothing
    /// to compare with.
    differences: Option<Vec<String>>,
    /// True when the running kernel hid its addresses, so that names alone could be compared.
    names_only: bool,
    plugins: Option<PathBuf>,
    processes: Vec<PathBuf>,
    companions: Vec<PathBuf>,
    volatility: Option<String>,
}

/// Companions that are read into memory at most; the agent reads no more of one either.
const MAX_COMPANION: u64 = 256 << 20;
/// Plaintext of a segment: the agent's largest have 16 MiB.
const MAX_PLAIN: u64 = 64 << 20;
/// Bytes of notes of an ELF core: VMCOREINFO has a page at most.
const NOTES: usize = 8 << 10;

/// Writes it.
pub fn run(args: &Args, ui: &Ui) -> Result<u8> {
    let began = Instant::now();
    let stored = Store::open(&args.which.at)?.find(&args.which.capture)?;
    let (chain, broken) = stored.chain()?;
    let mut artifacts: BTreeMap<String, Vec<SegmentEntry>> = BTreeMap::new();
    for entry in chain.segments() {
        if let Artifact::Memory(name) = &entry.artifact {
            artifacts.entry(name.to_string()).or_default().push(entry.clone());
        }
    }
    if artifacts.is_empty() {
        bail!(
            "capture {} has no memory; its profile did not ask for it, or it could not be read: stillframe show",
            stored.id
        );
    }
    private_folder(&args.to)?;
    let mut done = Done {
        complete: chain.closing().is_some(),
        ..Done::default()
    };
    let activity = ui.activity();
    for (name, entries) in &artifacts {
        let (path, into) = match name.as_str() {
            "image" => continue,
            name if name.starts_with("process-") => {
                (args.to.join(format!("{name}.core")), &mut done.processes)
            }
            name => (args.to.join("companions").join(name), &mut done.companions),
        };
        if let Some(parent) = path.parent() {
            private_folder(parent)?;
        }
        activity.now(name);
        let (entries, gap) = without_gap(entries);
        done.damaged.extend(gap);
        let written = Written::new(&path, Layout::Core, entries)?.all(&stored, entries)?;
        done.damaged.extend(written.damaged);
        into.push(path);
    }
    if let Some(entries) = artifacts.get("image") {
        activity.now("image");
        image(args, &stored, &chain, entries, &mut done)?;
    }
    let outcome = chain.outcomes().find(|o| o.kind.as_str() == "memory");
    if let Some(outcome) = outcome
        && !artifacts.contains_key("image")
    {
        let why = outcome.reason.clone().unwrap_or_default();
        done.no_image = Some(format!("{}: {why}", outcome.status));
    }
    drop(activity);
    done.damaged.extend(broken);
    let whole = done.no_image.is_none() && done.damaged.is_empty() && done.holes.is_empty() && done.complete;
    let code = if whole && done.no_symbols.is_none() && done.differences.as_ref().is_none_or(Vec::is_empty) {
        0
    } else {
        5
    };
    ui.print(&done, || text(&done, began));
    Ok(code)
}

/// What stands behind a segment that was never stored has no place of its own in such a file; only an image's segments do.
fn without_gap(entries: &[SegmentEntry]) -> (&[SegmentEntry], Option<String>) {
    let whole = (1u64..)
        .zip(entries)
        .take_while(|(number, entry)| entry.number == *number)
        .count();
    let behind = entries.get(whole).map(|entry| {
        format!(
            "{}: what comes before segment {} was not stored; the file ends there",
            entry.artifact, entry.number
        )
    });
    (entries.get(..whole).unwrap_or_default(), behind)
}

fn image(
    args: &Args,
    stored: &Stored,
    chain: &Chain,
    entries: &[SegmentEntry],
    done: &mut Done,
) -> Result<()> {
    let (name, layout) = match args.format {
        Format::Lime => ("image.lime", Layout::Stream),
        Format::Elf => ("image.elf", Layout::Elf),
        Format::Raw => ("image.raw", Layout::Raw),
    };
    let path = args.to.join(name);
    let mut written = Written::new(&path, layout, entries)?.all(stored, entries)?;
    let note = fs::read(args.to.join("companions/vmcoreinfo")).ok();
    if layout == Layout::Elf {
        written.head(note.as_deref())?;
    }
    let file = File::open(&path).with_context(|| path.display().to_string())?;
    done.holes = holes(chain, &written.ranges);
    let found = match args.no_symbols {
        true => None,
        false => Some(
            Image::open(&file)
                .map_err(anyhow::Error::from)
                .and_then(|image| Ok(Kernel::in_image(&image)?)),
        ),
    };
    match found {
        None => (),
        Some(Ok(mut kernel)) => {
            if layout == Layout::Elf
                && note.is_none()
                && let Some(info) = &kernel.vmcoreinfo
            {
                written.head(Some(info.text()))?;
            }
            let compared = differences(&args.to.join("companions"), &kernel);
            done.names_only = compared.as_ref().is_some_and(|c| c.names_only);
            done.differences = compared.map(|c| c.differences);
            if kernel.btf.is_none()
                && let Some(path) = &args.btf
            {
                kernel.btf = Some(fs::read(path).with_context(|| path.display().to_string())?);
            }
            match kernel
                .types()
                .map_err(anyhow::Error::from)
                .and_then(|types| table(&kernel, &types, &args.to))
            {
                Ok(path) => done.symbols = Some(path),
                Err(error) => done.no_symbols = Some(format!("{error:#}")),
            }
            if kernel.five_levels() == Some(true) {
                let plugins = args.to.join("plugins");
                private_folder(&plugins)?;
                done.plugins = Some(symbols::plugin(&plugins)?);
            }
        }
        Some(Err(error)) => done.no_symbols = Some(format!("{error:#}")),
    }
    done.sha256 = Some(match written.sha256 {
        Some(sha256) => sha256,
        None => hash(&path)?,
    });
    done.bytes = file.metadata().map_or(0, |m| m.len());
    done.segments = written.segments;
    done.damaged.append(&mut written.damaged);
    let plugins = done
        .plugins
        .as_ref()
        .map_or(String::new(), |p| format!(" -p {}", quoted(p)));
    if done.symbols.is_some() {
        done.volatility = Some(format!(
            "vol --offline{plugins} -s {} -f {} linux.pslist",
            quoted(&args.to.join("symbols")),
            quoted(&path)
        ));
    }
    done.image = Some(path);
    Ok(())
}

/// The table, under a name that says which kernel it is for and that no other kernel has: Volatility remembers tables by name.
fn table(kernel: &Kernel, types: &Types, to: &Path) -> Result<PathBuf> {
    let folder = to.join("symbols").join("linux");
    private_folder(&folder)?;
    let safe: String = kernel
        .release()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || ".-+_".contains(*c))
        .take(100)
        .collect();
    let banner = Hash::of(&kernel.banner).to_string();
    let path = folder.join(format!("{safe}-{}.json.xz", banner.get(..12).unwrap_or_default()));
    symbols::write(kernel, types, &path)?;
    Ok(path)
}

/// Addresses that the chain expected and that were not written, given what was as address, offset and size.
fn holes(chain: &Chain, written: &[(u64, u64, u64)]) -> Vec<(u64, u64)> {
    let outcome = chain.outcomes().find(|o| o.kind.as_str() == "memory");
    let mut expected: Vec<(u64, u64)> = outcome
        .iter()
        .flat_map(|o| &o.ranges)
        .map(|r| (r.start, r.end))
        .collect();
    if expected.is_empty() {
        // The agent did not live to account for them.
        let announced = chain.events().iter().find_map(|(_, event)| match &event.event {
            What::Progress(progress) if progress.kind.as_str() == "memory" => Some(progress.ranges.clone()),
            _ => None,
        });
        expected = announced.unwrap_or_default();
    }
    let mut have: Vec<(u64, u64)> = written
        .iter()
        .map(|(start, _, size)| (*start, start.saturating_add(*size)))
        .collect();
    have.sort_unstable();
    let mut holes = Vec::new();
    for (start, end) in expected {
        let mut at = start;
        for (from, to) in &have {
            if *to <= at || *from > end {
                continue;
            }
            if *from > at {
                holes.push((at, from - 1));
            }
            at = *to;
        }
        if at <= end {
            holes.push((at, end));
        }
    }
    holes
}

/// What the agent read from the running kernel, against what the image has of it.
fn differences(companions: &Path, kernel: &Kernel) -> Option<Comparison> {
    let read = |name: &str| {
        let path = companions.join(name);
        let small = fs::metadata(&path).is_ok_and(|m| m.len() <= MAX_COMPANION);
        if small { fs::read(path).ok() } else { None }
    };
    let (kallsyms, version) = (read("kallsyms")?, read("version")?);
    let (btf, vmcoreinfo) = (read("btf"), read("vmcoreinfo"));
    let files = Files {
        btf: btf.as_deref(),
        kallsyms: &kallsyms,
        vmcoreinfo: vmcoreinfo.as_deref(),
        version: &version,
    };
    Some(compare(kernel, &files))
}

fn text(done: &Done, began: Instant) -> String {
    let mut lines = Vec::new();
    let mut line =
        |what: &str, text: String| lines.push(format!("{what:<16}  {}", printable(text.as_bytes())));
    if let (Some(path), Some(sha256)) = (&done.image, done.sha256) {
        let took = began.elapsed().as_secs_f64();
        line(
            "image",
            format!(
                "{}   {} of {} segments   {took:.1} s",
                path.display(),
                bytes(done.bytes),
                done.segments
            ),
        );
        line("SHA-256", sha256.to_string());
    }
    if !done.complete {
        line(
            "incomplete",
            "the chain was never closed: the agent was killed, or its end was deleted; stillframe salvage"
                .to_owned(),
        );
    }
    for (start, end) in &done.holes {
        line("hole", format!("{start:#x}-{end:#x} is not in the image"));
    }
    if let Some(why) = &done.no_image {
        line("no image", why.clone());
    }
    if let Some(folder) = done.companions.first().and_then(|path| path.parent()) {
        line("companions", folder.display().to_string());
    }
    for path in &done.processes {
        line("process", path.display().to_string());
    }
    if let Some(path) = &done.symbols {
        line("symbols", format!("{}, from the image itself", path.display()));
    }
    if let Some(why) = &done.no_symbols {
        line("no symbols", why.clone());
    }
    match &done.differences {
        Some(list) if list.is_empty() && done.names_only => line(
            "compared",
            "names of kallsyms and types are those of the running kernel, which hid its addresses (kernel.kptr_restrict)".to_owned(),
        ),
        Some(list) if list.is_empty() => line(
            "compared",
            "kallsyms, types and banner are those that the agent read from the running kernel".to_owned(),
        ),
        Some(list) => list.iter().for_each(|why| line("DIFFERS", why.clone())),
        None => (),
    }
    if let Some(path) = &done.plugins {
        line("paging", format!("5 levels: {}", path.join(la57::FILE).display()));
    }
    for why in &done.damaged {
        line("damaged", why.clone());
    }
    if let Some(command) = &done.volatility {
        line("next", command.clone());
    }
    lines.join("\n")
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    match text
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "/._-+=:@".contains(c))
        && !text.is_empty()
    {
        true => text,
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

fn hash(path: &Path) -> Result<Hash> {
    let mut sha256 = Sha256::new();
    let mut file = File::open(path)?;
    std::io::copy(&mut file, &mut Digesting(&mut sha256)).with_context(|| path.display().to_string())?;
    Ok(Hash(sha256.finalize().into()))
}

struct Digesting<'a>(&'a mut Sha256);

impl std::io::Write for Digesting<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Where the plaintext of segments goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// One after another, as they are: LiME.
    Stream,
    /// The same, but each at its place, whatever happened to those before it.
    Core,
    /// Without the header of each range, one after another behind the head of an ELF core.
    Elf,
    /// Each at its physical address.
    Raw,
}

/// A file that is being written.
struct Written {
    path: PathBuf,
    file: File,
    layout: Layout,
    /// Where the content of an ELF core starts.
    from: u64,
    /// Ranges written: physical address, offset in the file, bytes.
    ranges: Vec<(u64, u64, u64)>,
    sha256: Option<Hash>,
    segments: usize,
    damaged: Vec<String>,
}

/// A segment, unpacked.
struct Plain {
    bytes: Vec<u8>,
    /// Its first physical address, where it starts with the header of a range.
    address: Option<u64>,
}

impl Written {
    fn new(path: &Path, layout: Layout, entries: &[SegmentEntry]) -> Result<Self> {
        let file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .with_context(|| {
                format!(
                    "{}: give a directory in which nothing was fetched yet",
                    path.display()
                )
            })?;
        let from = match layout {
            Layout::Elf => elf::head_bound(entries.len(), NOTES).next_multiple_of(4096),
            _ => 0,
        };
        Ok(Written {
            path: path.to_owned(),
            file,
            layout,
            from,
            ranges: Vec::new(),
            sha256: None,
            segments: 0,
            damaged: Vec::new(),
        })
    }

    /// Unpacks all segments, on every core, and writes them in order. A segment that is not what the chain says is left out.
    fn all(mut self, stored: &Stored, entries: &[SegmentEntry]) -> Result<Self> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        let next = AtomicUsize::new(0);
        let written = AtomicUsize::new(0);
        let mut sha256 = Sha256::new();
        let mut at = self.from;
        let spare: Mutex<Vec<Vec<u8>>> = Mutex::default();
        std::thread::scope(|scope| -> Result<()> {
            let (give, take) = sync_channel(threads);
            for _ in 0..threads {
                let (give, next, written, spare) = (give.clone(), &next, &written, &spare);
                scope.spawn(move || {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(entry) = entries.get(index) else { return };
                        // What is unpacked and not written yet is bounded.
                        while index > written.load(Ordering::Relaxed) + 2 * threads {
                            std::thread::sleep(std::time::Duration::from_micros(200));
                        }
                        let buffer = spare
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .pop()
                            .unwrap_or_default();
                        if give.send((index, unpack(stored, entry, buffer))).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(give);
            let mut waiting = BTreeMap::new();
            let mut result = Ok(());
            for (index, plain) in take {
                waiting.insert(index, plain);
                while let Some(plain) = waiting.remove(&written.load(Ordering::Relaxed)) {
                    let number = written.fetch_add(1, Ordering::Relaxed);
                    match plain {
                        Ok(plain) if result.is_ok() => {
                            result = self.put(&plain, &mut at, &mut sha256);
                            spare
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .push(plain.bytes);
                        }
                        Ok(_) => (),
                        Err(why) => {
                            self.damaged.push(why);
                            // The places of a core's segments are fixed by its head: a hole of zeros, which was told.
                            if self.layout == Layout::Core {
                                let size = entries.get(number).map_or(0, |e| e.plain);
                                at = at.saturating_add(size);
                            }
                        }
                    }
                }
            }
            result
        })
        .with_context(|| self.path.display().to_string())?;
        if matches!(self.layout, Layout::Stream | Layout::Core) {
            // Zeros at the end were never written.
            self.file.set_len(at)?;
            self.sha256 = Some(Hash(sha256.finalize().into()));
        }
        if self.layout == Layout::Elf {
            self.file.set_len(at)?;
            self.head(None)?;
        }
        if self.layout == Layout::Raw {
            let end = self
                .ranges
                .iter()
                .map(|(_, at, size)| at.saturating_add(*size))
                .max();
            self.file.set_len(end.unwrap_or(0))?;
        }
        Ok(self)
    }

    fn put(&mut self, plain: &Plain, at: &mut u64, sha256: &mut Sha256) -> Result<()> {
        self.segments += 1;
        let content = match (self.layout, plain.address) {
            (Layout::Stream | Layout::Core, _) => {
                sha256.update(&plain.bytes);
                plain.bytes.as_slice()
            }
            (_, Some(_)) => plain.bytes.get(lime::HEADER..).unwrap_or_default(),
            (_, None) => bail!("a segment of the image does not start with the header of a range"),
        };
        let offset = match (self.layout, plain.address) {
            (Layout::Raw, Some(address)) => address,
            _ => *at,
        };
        // Zeros need not be written: the file is as long without them, and reads the same.
        for (index, piece) in (0u64..).zip(content.chunks(64 << 10)) {
            if piece.iter().any(|b| *b != 0) {
                self.file.write_all_at(piece, offset + index * (64 << 10))?;
            }
        }
        let size = content.len() as u64;
        if let Some(address) = plain.address {
            let size = size
                - if self.layout == Layout::Stream {
                    lime::HEADER as u64
                } else {
                    0
                };
            match self.ranges.last_mut() {
                Some((start, from, length)) if *start + *length == address && *from + *length == offset => {
                    *length += size
                }
                _ => self.ranges.push((address, offset, size)),
            }
        }
        *at = at.saturating_add(size);
        Ok(())
    }

    /// Writes the head of an ELF core.
    fn head(&mut self, vmcoreinfo: Option<&[u8]>) -> Result<()> {
        let load = |(address, _, size): &(u64, u64, u64)| elf::Segment {
            load: true,
            flags: 7,
            offset: 0,
            virtual_address: 0,
            physical_address: *address,
            size: *size,
        };
        let mut loads: Vec<elf::Segment> = self.ranges.iter().map(load).collect();
        let notes: Vec<(&str, u32, &[u8])> = vmcoreinfo
            .filter(|v| v.len() < NOTES / 2)
            .map(|v| ("VMCOREINFO", 0, v))
            .into_iter()
            .collect();
        let head = elf::head(&notes, &mut loads, 1, self.from);
        let fits = loads
            .iter()
            .zip(&self.ranges)
            .all(|(load, (_, offset, _))| load.offset == *offset);
        if !fits {
            return Err(anyhow!(
                "{}: the head of the core does not fit before its content",
                self.path.display()
            ));
        }
        self.file.seek(SeekFrom::Start(0))?;
        self.file
            .write_all(&head)
            .with_context(|| self.path.display().to_string())
    }
}

/// For nobody but their owner: memory holds every secret that the host had.
fn private_folder(path: &Path) -> Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| path.display().to_string())
}

/// The plaintext of a segment, if it is what the signed chain says.
fn unpack(stored: &Stored, entry: &SegmentEntry, mut buffer: Vec<u8>) -> Result<Plain, String> {
    let key = entry.key().to_string();
    let wrong = |why: String| format!("{key}: {why}");
    if entry.plain > MAX_PLAIN {
        return Err(wrong(format!(
            "{} of plaintext, more than the agent puts into one",
            bytes(entry.plain)
        )));
    }
    let object = stored.get(&key, MAX_SEGMENT as u64).map_err(wrong)?;
    let segment = Segment::open(&object).map_err(|e| wrong(e.to_string()))?;
    let leaves: Vec<Hash> = segment.frames().map(|f| f.sha256).collect();
    let plain: u64 = segment.frames().map(|f| u64::from(f.plain)).sum();
    // The chain signs the hashes of the frames, and each frame is checked against its own: that is all of the plaintext.
    if root(&leaves) != entry.frames_root || plain != entry.plain {
        return Err(wrong("its frames are not those in the chain".to_owned()));
    }
    buffer.clear();
    segment
        .read(|_, plain| {
            buffer.extend_from_slice(plain);
            Ok::<_, stillframe_evidence::Error>(())
        })
        .map_err(|e| wrong(e.to_string()))?;
    let address = buffer.first_chunk::<{ lime::HEADER }>().and_then(lime::parse);
    let whole = address.filter(|(start, end)| end - start + 1 == (buffer.len() - lime::HEADER) as u64);
    Ok(Plain {
        address: whole.map(|(start, _)| start),
        bytes: buffer,
    })
}
