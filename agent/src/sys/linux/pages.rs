//! Pages of this process that must not move to disk, and those that nobody may see: buffers of evidence, and the capture's key.

use ed25519_key::sign_forever;
use rustix::{
    fs::ftruncate,
    mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap, mmap_anonymous, munmap},
};
use std::{
    collections::BTreeSet,
    ffi::c_void,
    fs::File,
    io,
    ops::{Deref, DerefMut},
    os::fd::{FromRawFd as _, OwnedFd},
    ptr::NonNull,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
};
use stillframe_evidence::signature::{PublicKey, Signatory};

const PAGE: usize = 4096;

/// A mapping of this process, unmapped when dropped.
struct Mapping {
    start: NonNull<c_void>,
    size: usize,
}

// SAFETY: the mapping belongs to this value alone; nothing in it is tied to a thread.
#[allow(unsafe_code)]
unsafe impl Send for Mapping {}
// SAFETY: shared references give no access to its bytes but through `LockedBuffer`, which is borrowed as any buffer is.
#[allow(unsafe_code)]
unsafe impl Sync for Mapping {}

impl Mapping {
    fn anonymous(size: usize) -> io::Result<Self> {
        let size = size.max(1).next_multiple_of(PAGE);
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new private mapping at an address of the kernel's choice overlaps nothing.
        #[allow(unsafe_code)]
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), size, protection, flags) }?;
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { start, size })
    }

    /// Memory that the kernel takes out of its own map (memfd_secret(2)).
    fn secret(size: usize) -> io::Result<Self> {
        // SAFETY: the call takes flags alone and gives a new descriptor or an error.
        #[allow(unsafe_code)]
        let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
        let fd = i32::try_from(fd)
            .ok()
            .filter(|fd| *fd >= 0)
            .ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the descriptor was just made and belongs to nobody else.
        #[allow(unsafe_code)]
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        ftruncate(&fd, size as u64)?;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing; the file is this function's alone.
        #[allow(unsafe_code)]
        let start = unsafe { mmap(std::ptr::null_mut(), size, protection, flags, &fd, 0) }?;
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { start, size })
    }

    fn lock(&self) -> io::Result<()> {
        // SAFETY: the range is this mapping, which is there as long as `self` is.
        #[allow(unsafe_code)]
        Ok(unsafe { mlock(self.start.as_ptr(), self.size) }?)
    }

    /// Left out of core dumps, and of children.
    fn keep_private(&self) {
        for advice in [Advice::LinuxDontDump, Advice::LinuxDontFork] {
            // SAFETY: the range is this mapping, and neither advice changes its content.
            #[allow(unsafe_code)]
            let _ = unsafe { madvise(self.start.as_ptr(), self.size, advice) };
        }
    }

    fn place(&self) -> (u64, u64) {
        (self.start.as_ptr().addr() as u64, self.size as u64)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more: whoever borrowed it borrowed `self`.
        #[allow(unsafe_code)]
        let _ = unsafe { munmap(self.start.as_ptr(), self.size) };
    }
}

/// Where a buffer starts in its first page: what is copied into it page by page never lies there as a page, to be taken for the
/// one that it is a copy of.
const OFF: usize = 64;

/// A buffer that is never swapped out. A host that does not let it be locked gets it all the same.
pub struct LockedBuffer {
    mapping: Mapping,
    size: usize,
}

impl LockedBuffer {
    /// Of so many bytes, zero.
    pub fn new(size: usize) -> io::Result<Self> {
        let mapping = Mapping::anonymous(size.saturating_add(OFF))?;
        let _ = mapping.lock();
        Ok(LockedBuffer { mapping, size })
    }

    /// Address and length.
    pub fn place(&self) -> (u64, u64) {
        self.mapping.place()
    }
}

impl Deref for LockedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is readable, initialised by the kernel, at least `OFF + size` long, and borrowed through `self`.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.mapping.start.as_ptr().cast::<u8>().add(OFF), self.size)
        }
    }
}

impl DerefMut for LockedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed for writing.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts_mut(self.mapping.start.as_ptr().cast::<u8>().add(OFF), self.size)
        }
    }
}

/// The physical pages that hold the capture's key, so that they are left out of the image. The kernel may move a page; all
/// that ever held it count.
#[derive(Clone, Default)]
pub struct KeyPages(Option<Arc<Watched>>);

struct Watched {
    place: (u64, u64),
    pagemap: File,
    seen: Mutex<BTreeSet<u64>>,
}

impl KeyPages {
    /// Unknown where the kernel has no page map.
    fn of(mapping: &Mapping) -> Self {
        let watched = |pagemap| Watched {
            place: mapping.place(),
            pagemap,
            seen: Mutex::default(),
        };
        KeyPages(
            File::open("/proc/self/pagemap")
                .ok()
                .map(|pagemap| Arc::new(watched(pagemap))),
        )
    }

    /// Those between `address` and `size` bytes behind it: first address and the one behind the last.
    pub fn inside(&self, address: u64, size: u64) -> Vec<(u64, u64)> {
        let Some(watched) = &self.0 else { return Vec::new() };
        let mut seen = watched.seen.lock().unwrap_or_else(PoisonError::into_inner);
        watched.look(&mut seen);
        let page = PAGE as u64;
        let pages = seen.range(address / page..=address.saturating_add(size.saturating_sub(1)) / page);
        pages
            .map(|frame| {
                (
                    (frame * page).max(address),
                    ((frame + 1) * page).min(address.saturating_add(size)),
                )
            })
            .collect()
    }
}

impl Watched {
    /// Bits 0 to 54 of an entry are the page frame, bit 63 says that there is one (`Documentation/admin-guide/mm/pagemap.rst`).
    fn look(&self, seen: &mut BTreeSet<u64>) {
        let (start, size) = self.place;
        let pages = usize::try_from(size).unwrap_or(0) / PAGE;
        let mut entries = vec![0; pages * 8];
        let Ok(n) = read_at(&self.pagemap, &mut entries, start / PAGE as u64 * 8) else {
            return;
        };
        let (entries, _) = entries.get(..n).unwrap_or_default().as_chunks::<8>();
        let frames = entries
            .iter()
            .map(|e| u64::from_le_bytes(*e))
            .filter(|e| e >> 63 == 1);
        seen.extend(frames.map(|e| e & ((1 << 55) - 1)).filter(|frame| *frame != 0));
    }
}

/// Reads at an offset; as [`std::os::unix::fs::FileExt::read_at`].
pub fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buffer, offset)
}

/// Bytes of the vault: the stack of the thread that signs.
const VAULT: usize = 128 << 10;

/// Holds the key of a capture on the stack of a thread that does nothing but sign, and that stack in memory which is not in
/// the image: in `memfd_secret` where the kernel has it, else in locked pages that the image leaves out. What signing leaves
/// behind on its stack is there too.
pub struct Vault {
    public: PublicKey,
    ask: Option<Sender<String>>,
    answers: Mutex<Receiver<Signed>>,
    pages: KeyPages,
    kind: &'static str,
    seed: Option<[u8; 32]>,
}

impl Vault {
    /// Makes a key. `hidden` allows `memfd_secret`: not where something will read physical memory with no regard to what
    /// the kernel took out of its map.
    pub fn new(hidden: bool) -> io::Result<Self> {
        let secret = match hidden {
            true => Mapping::secret(VAULT).map_err(|_| ()),
            false => Err(()),
        };
        let (mapping, kind) = match secret {
            Ok(mapping) => (mapping, "memfd_secret"),
            Err(()) => (Mapping::anonymous(VAULT)?, "locked pages, left out of the image"),
        };
        let locked = mapping.lock();
        mapping.keep_private();
        // The thread's own record is in there too, and nobody can say when it has left it: the pages stay until the process ends.
        let mapping = std::mem::ManuallyDrop::new(mapping);
        let pages = KeyPages::of(&mapping);
        let (ask, asked) = channel();
        let (answer, answers) = channel();
        let (ready, made) = channel();
        let job = Box::new(Job {
            asked,
            answer,
            ready,
            shown: !hidden,
        });
        start(&mapping, job)?;
        let (public, seed) = made
            .recv()
            .map_err(|_| io::Error::other("no randomness for the key"))?;
        let unknown = pages.inside(0, u64::MAX).is_empty();
        let kind = match (kind, unknown, locked) {
            ("memfd_secret", ..) => kind,
            (_, true, _) => {
                "pages whose physical addresses the kernel does not tell: the key is in the image"
            }
            (_, false, Err(_)) => "pages that could not be locked, left out of the image",
            (_, false, Ok(())) => kind,
        };
        Ok(Vault {
            public,
            ask: Some(ask),
            answers: Mutex::new(answers),
            pages,
            kind,
            seed,
        })
    }

    /// Its pages.
    pub fn pages(&self) -> KeyPages {
        self.pages.clone()
    }

    /// What must be searched for where the pages alone are not enough: a module that reads them leaves copies of them on its way to the
    /// agent. Nothing where they are hidden from everybody.
    pub fn seed(&self) -> Option<[u8; 32]> {
        self.seed
    }

    /// Where the key is, in words.
    pub fn kind(&self) -> &'static str {
        self.kind
    }
}

impl Signatory for Vault {
    fn public(&self) -> PublicKey {
        self.public
    }

    fn sign(&self, message: String) -> (String, [u8; 64]) {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = self.ask.as_ref().and_then(|ask| ask.send(message).ok());
        // Without its thread nothing can be signed: a signature of zeros holds for no key, and the chain refuses it.
        asked
            .and_then(|()| answers.recv().ok())
            .unwrap_or((String::new(), [0; 64]))
    }
}

/// The thread ends, and wipes the key, when nobody can ask it any more.
impl Drop for Vault {
    fn drop(&mut self) {
        self.ask = None;
    }
}

/// A message and its signature.
type Signed = (String, [u8; 64]);

struct Job {
    asked: Receiver<String>,
    answer: Sender<Signed>,
    ready: Sender<(PublicKey, Option<[u8; 32]>)>,
    /// The seed is told.
    shown: bool,
}

/// A thread whose stack is `mapping`.
fn start(mapping: &Mapping, job: Box<Job>) -> io::Result<()> {
    extern "C" fn run(job: *mut c_void) -> *mut c_void {
        // SAFETY: `job` is the box that `start` gave away, and this is the only place that takes it.
        #[allow(unsafe_code)]
        let job = unsafe { Box::from_raw(job.cast::<Job>()) };
        sign_forever(&job.asked, &job.answer, &job.ready, job.shown);
        std::ptr::null_mut()
    }
    let failed = |code: i32| match code {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    };
    let job = Box::into_raw(job);
    // SAFETY: the attributes are initialised before they are used and destroyed after; the stack is a mapping of that size that is
    // never unmapped; `job` goes to the thread, or is taken back when there is none. The thread is detached: joining waits on a
    // futex in the thread's own record, and the kernel has no futexes in secret memory.
    #[allow(unsafe_code)]
    unsafe {
        let mut attributes: libc::pthread_attr_t = std::mem::zeroed();
        let mut thread: libc::pthread_t = std::mem::zeroed();
        let made = failed(libc::pthread_attr_init(&raw mut attributes)).and_then(|()| {
            let made = failed(libc::pthread_attr_setdetachstate(
                &raw mut attributes,
                libc::PTHREAD_CREATE_DETACHED,
            ))
            .and_then(|()| {
                failed(libc::pthread_attr_setstack(
                    &raw mut attributes,
                    mapping.start.as_ptr(),
                    mapping.size,
                ))
            })
            .and_then(|()| {
                failed(libc::pthread_create(
                    &raw mut thread,
                    &raw const attributes,
                    run,
                    job.cast(),
                ))
            });
            libc::pthread_attr_destroy(&raw mut attributes);
            made
        });
        if made.is_err() {
            drop(Box::from_raw(job));
        }
        made
    }
}

/// Leaves nothing of what was computed in the vector registers of this thread.
fn clear_vector_registers() {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx") {
        // SAFETY: the instruction is there, and the registers that it changes are named.
        #[allow(unsafe_code)]
        unsafe {
            std::arch::asm!(
                "vzeroall",
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                options(nomem, nostack, preserves_flags)
            );
        }
    } else {
        // SAFETY: SSE2 is part of x86-64, and the registers that are changed are named.
        #[allow(unsafe_code)]
        unsafe {
            std::arch::asm!(
                "pxor xmm0, xmm0", "pxor xmm1, xmm1", "pxor xmm2, xmm2", "pxor xmm3, xmm3", "pxor xmm4, xmm4", "pxor xmm5, xmm5",
                "pxor xmm6, xmm6", "pxor xmm7, xmm7", "pxor xmm8, xmm8", "pxor xmm9, xmm9", "pxor xmm10, xmm10", "pxor xmm11, xmm11",
                "pxor xmm12, xmm12", "pxor xmm13, xmm13", "pxor xmm14, xmm14", "pxor xmm15, xmm15",
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}

/// What runs on the secret stack.
mod ed25519_key {
    use super::Signed;
    use std::sync::mpsc::{Receiver, Sender};
    use stillframe_evidence::signature::{CaptureKey, PublicKey, Signatory as _};

    /// Leaves nothing of what was computed further down on this stack: what is made of the key to sign with it. The
    /// nonce of a signature is as good as the key (RFC 8032, 5.1.6), and ed25519-dalek leaves it.
    #[inline(never)]
    fn clear_stack() {
        std::hint::black_box(&mut [0u8; super::VAULT / 2]);
    }

    // Both further down on this stack: in the caller's own frame, what is made of the key would not be cleared.

    #[inline(never)]
    fn expand(seed: &[u8; 32]) -> CaptureKey {
        CaptureKey::from_seed(seed)
    }

    #[inline(never)]
    fn sign(key: &CaptureKey, message: String) -> Signed {
        key.sign(message)
    }

    /// What a thread that waits had in its vector registers, the kernel keeps beside its other data: in the image.
    fn clear() {
        clear_stack();
        super::clear_vector_registers();
    }

    /// Makes the key and signs until nobody asks any more.
    pub fn sign_forever(
        asked: &Receiver<String>,
        answer: &Sender<Signed>,
        ready: &Sender<(PublicKey, Option<[u8; 32]>)>,
        shown: bool,
    ) {
        let mut seed = [0; 32];
        if getrandom::fill(&mut seed).is_err() {
            return;
        }
        let key = expand(&seed);
        let told = shown.then_some(seed);
        seed.fill(0);
        clear();
        let _ = ready.send((key.public(), told));
        // What was sent may be the seed.
        clear();
        loop {
            let Ok(message) = asked.recv() else { return };
            let signed = sign(&key, message);
            // Before whoever waits for it is woken, perhaps in this thread's place.
            clear();
            if answer.send(signed).is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stillframe_evidence::signature::seal;

    #[test]
    fn the_vault_signs_with_the_key_that_it_shows() {
        for hidden in [true, false] {
            let vault = Vault::new(hidden).unwrap();
            let sealed = seal(&vault, "{}".to_owned());
            assert_eq!(vault.public().open(&sealed).unwrap(), "{}");
            // The stack in use, at least, is known by its physical address, where this process may know those.
            let known = vault.pages().inside(0, u64::MAX);
            assert!(known.len() <= VAULT / PAGE + 1, "{known:?}");
        }
    }

    #[test]
    fn a_buffer_is_as_long_as_asked_for() {
        let mut buffer = LockedBuffer::new(5000).unwrap();
        buffer.fill(7);
        assert_eq!((buffer.len(), buffer.place().1), (5000, 8192));
    }
}
