//! Symbols of a Linux kernel for Volatility 3, without debug packages: from an image of its memory alone ([`Kernel::in_image`]) or from the
//! files of its boot ([`Kernel::from_files`]), written as an ISF ([`isf`]).
//!
//! ```text
//! image -> search (VMCOREINFO, BTF, token table) -> kallsyms tables -> symbols ─┐
//!                                                -> banner, types (BTF)        ─┴-> ISF
//! ```
//! What an image holds is hostile: every candidate is validated by parsing all of it, every length is bounded, and nothing is
//! taken for found because it looks alike. This crate opens no file and knows no capture; x86-64, little endian.
#![forbid(unsafe_code)]

pub mod btf;
mod compare;
pub mod isf;
pub mod kallsyms;
pub mod la57;
mod search;
pub mod tables;
pub mod vmcoreinfo;

pub use compare::{Comparison, compare};
pub use kallsyms::Symbol;
pub use vmcoreinfo::Vmcoreinfo;

use stillframe_evidence::image::Image;

/// Where the kernel's own text is linked to start (`__START_KERNEL_map`, `arch/x86/include/asm/page_64_types.h`).
pub const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// Why there are no symbols.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image could not be read.
    #[error("the image could not be read: {0}")]
    Io(#[from] std::io::Error),
    /// No kernel was found.
    #[error("{0}")]
    NotFound(String),
    /// Something claims to be BTF and is not.
    #[error("BTF: {0}")]
    Btf(&'static str),
    /// A file that does not hold what it should.
    #[error("{what}: {why}")]
    File {
        /// Which.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The kernel has no types.
    #[error(
        "this kernel ({release}) carries no BTF, so nothing here says how its structures are laid out; give the BTF of exactly this release \
         (--btf FILE; BTFHub publishes them for older distributions), or make the table from the debug package \
         {package} with dwarf2json"
    )]
    NoTypes {
        /// The release.
        release: String,
        /// What to install.
        package: String,
    },
}

/// A kernel as far as symbols need it.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// `linux_banner`: the text of `/proc/version` with its line feed, without the NUL.
    pub banner: Vec<u8>,
    /// Every symbol of the kernel itself, in the order of kallsyms, at its run-time address.
    pub symbols: Vec<Symbol>,
    /// VMCOREINFO.
    pub vmcoreinfo: Option<Vmcoreinfo>,
    /// The types; nothing when the kernel carries none.
    pub btf: Option<Vec<u8>>,
    /// Where the tables of kallsyms are: name and run-time address. kallsyms does not name them.
    pub tables: Vec<(String, u64)>,
    /// What KASLR added to every address of the kernel's text and data.
    pub offset: u64,
}

/// The files that a kernel's symbols can be made from.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// `/sys/kernel/btf/vmlinux`.
    pub btf: Option<&'a [u8]>,
    /// `/proc/kallsyms`.
    pub kallsyms: &'a [u8],
    /// The VMCOREINFO note.
    pub vmcoreinfo: Option<&'a [u8]>,
    /// `/proc/version`.
    pub version: &'a [u8],
}

impl Kernel {
    /// Searches an image.
    pub fn in_image(image: &Image) -> Result<Self, Error> {
        search::kernel(image)
    }

    /// Takes the files of one boot.
    pub fn from_files(files: &Files) -> Result<Self, Error> {
        let symbols = kallsyms::parse(files.kallsyms);
        if symbols.is_empty() {
            return Err(Error::File {
                what: "kallsyms",
                why: "holds no symbol of the kernel".to_owned(),
            });
        }
        if symbols.iter().all(|s| s.address == 0) {
            return Err(Error::File {
                what: "kallsyms",
                why: "all addresses are zero (kernel.kptr_restrict); the image has them: stillframe symbols --image".to_owned(),
            });
        }
        let vmcoreinfo = files.vmcoreinfo.and_then(Vmcoreinfo::parse);
        let offset = kernel_offset(vmcoreinfo.as_ref(), &symbols);
        if !files.version.starts_with(b"Linux version ") {
            return Err(Error::File {
                what: "version",
                why: "does not start as /proc/version does".to_owned(),
            });
        }
        Ok(Kernel {
            banner: [files.version.trim_ascii_end(), b"\n"].concat(),
            tables: vmcoreinfo.iter().flat_map(Vmcoreinfo::tables).collect(),
            vmcoreinfo,
            btf: files.btf.map(<[u8]>::to_vec),
            symbols,
            offset,
        })
    }

    /// The release, out of the banner.
    pub fn release(&self) -> String {
        let text = String::from_utf8_lossy(&self.banner);
        text.split(' ').nth(2).unwrap_or_default().to_owned()
    }

    /// The address that a symbol was linked at: what ISF and System.map have.
    pub fn linked(&self, address: u64) -> u64 {
        if address >= KERNEL_MAP {
            address.wrapping_sub(self.offset)
        } else {
            address
        }
    }

    /// The run-time address of the first symbol of that name.
    pub fn address(&self, name: &str) -> Option<u64> {
        self.symbols.iter().find(|s| s.name == name).map(|s| s.address)
    }

    /// Whether the kernel runs with five levels of page tables; nothing when VMCOREINFO is missing.
    pub fn five_levels(&self) -> Option<bool> {
        let number = self.vmcoreinfo.as_ref()?.number("pgtable_l5_enabled");
        Some(number == Some(1))
    }

    /// The types, checked, or what to do without them.
    pub fn types(&self) -> Result<btf::Types, Error> {
        match &self.btf {
            Some(btf) => btf::Types::parse(btf),
            None => {
                let release = self.release();
                Err(Error::NoTypes {
                    package: package(&release, &String::from_utf8_lossy(&self.banner)),
                    release,
                })
            }
        }
    }
}

/// `KERNELOFFSET` of VMCOREINFO, else what `_text` is off from where x86-64 kernels are linked.
fn kernel_offset(vmcoreinfo: Option<&Vmcoreinfo>, symbols: &[Symbol]) -> u64 {
    if let Some(offset) = vmcoreinfo.and_then(Vmcoreinfo::kernel_offset) {
        return offset;
    }
    let text = symbols
        .iter()
        .find(|s| s.name == "_text")
        .map_or(0, |s| s.address);
    text.saturating_sub(KERNEL_MAP + 0x100_0000)
}

/// The debug package of a release, by the distribution that its banner names.
fn package(release: &str, banner: &str) -> String {
    let lower = banner.to_lowercase();
    if lower.contains("ubuntu") {
        format!("linux-image-{release}-dbgsym (ddebs)")
    } else if lower.contains("debian") {
        format!("linux-image-{release}-dbg")
    } else if lower.contains("suse") {
        "kernel-default-debuginfo".to_owned()
    } else if ["red hat", "centos", "amzn", "fedora", "rocky", "alma"]
        .iter()
        .any(|name| lower.contains(name))
    {
        format!("kernel-debuginfo-{release}")
    } else {
        format!("with the vmlinux of {release}")
    }
}
