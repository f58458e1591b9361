//! `stillframe symbols`: a Volatility 3 symbol table out of any Linux memory image, whoever took it, or out of the files of a boot.

use crate::ui::{Ui, bytes};
use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Instant,
};
use stillframe_evidence::{image::Image, text::printable};
use stillframe_symbols::{Files, Kernel, btf::Types, isf::Isf, la57};

/// Its arguments.
#[derive(clap::Args)]
pub struct Args {
    /// A memory image: LiME, AVML (plain or compressed), an ELF core of the kernel, raw
    #[arg(long, conflicts_with_all = ["kallsyms", "vmcoreinfo", "version"], required_unless_present = "kallsyms")]
    image: Option<PathBuf>,
    /// /sys/kernel/btf/vmlinux of the same boot; with --image, types for a kernel that carries none (BTFHub's files)
    #[arg(long)]
    btf: Option<PathBuf>,
    /// /proc/kallsyms of the same boot
    #[arg(long, requires = "version")]
    kallsyms: Option<PathBuf>,
    /// The VMCOREINFO note of the same boot
    #[arg(long)]
    vmcoreinfo: Option<PathBuf>,
    /// /proc/version of the same boot
    #[arg(long)]
    version: Option<PathBuf>,
    /// The table to write: .json, or .json.xz
    #[arg(long)]
    to: PathBuf,
}

#[derive(Serialize)]
struct Done<'a> {
    banner: String,
    release: String,
    symbols: usize,
    types: usize,
    kernel_offset: u64,
    five_level_paging: Option<bool>,
    /// For `vol -p`, where five levels need it.
    plugins: Option<PathBuf>,
    written: &'a Path,
    bytes: u64,
}

/// Files of a boot that are read at most.
const MAX_FILE: u64 = 256 << 20;

fn read(path: &Path) -> Result<Vec<u8>> {
    let metadata = fs::metadata(path).with_context(|| path.display().to_string())?;
    if metadata.len() > MAX_FILE {
        bail!(
            "{}: {} is more than such a file has",
            path.display(),
            bytes(metadata.len())
        );
    }
    fs::read(path).with_context(|| path.display().to_string())
}

/// Makes it.
pub fn run(args: &Args, ui: &Ui) -> Result<u8> {
    let began = Instant::now();
    let btf = args.btf.as_deref().map(read).transpose()?;
    let kernel = match &args.image {
        Some(path) => {
            let file = File::open(path).with_context(|| path.display().to_string())?;
            let image = Image::open(&file).with_context(|| path.display().to_string())?;
            if let Some(why) = image.cut() {
                ui.warn(&format!(
                    "{}: the file was cut off {why}",
                    printable(path.as_os_str().as_encoded_bytes())
                ));
            }
            let mut kernel = Kernel::in_image(&image).with_context(|| path.display().to_string())?;
            kernel.btf = kernel.btf.or(btf);
            kernel
        }
        None => {
            let of = |path: &Option<PathBuf>| path.as_deref().map(read).transpose();
            let (Some(kallsyms), Some(version)) = (of(&args.kallsyms)?, of(&args.version)?) else {
                bail!("--image, or --kallsyms and --version of one boot");
            };
            let vmcoreinfo = of(&args.vmcoreinfo)?;
            Kernel::from_files(&Files {
                btf: btf.as_deref(),
                kallsyms: &kallsyms,
                vmcoreinfo: vmcoreinfo.as_deref(),
                version: &version,
            })?
        }
    };
    let types = kernel.types()?;
    let size = write(&kernel, &types, &args.to)?;
    let plugins = match kernel.five_levels() {
        Some(true) => Some(plugin(&args.to.with_file_name("plugins"))?),
        _ => None,
    };
    let done = Done {
        plugins,
        banner: printable(kernel.banner.trim_ascii_end()),
        release: printable(kernel.release().as_bytes()),
        symbols: kernel.symbols.len(),
        types: types.count(),
        kernel_offset: kernel.offset,
        five_level_paging: kernel.five_levels(),
        written: &args.to,
        bytes: size,
    };
    ui.print(&done, || {
        let mut lines = vec![
            done.banner.clone(),
            format!(
                "{} symbols, {} types, KASLR offset {:#x}   {:.1} s",
                done.symbols,
                done.types,
                done.kernel_offset,
                began.elapsed().as_secs_f64()
            ),
            format!("wrote {} ({})", args.to.display(), bytes(size)),
        ];
        if let Some(plugins) = &done.plugins {
            lines.push(format!(
                "5-level paging: vol -p {}",
                printable(plugins.as_os_str().as_encoded_bytes())
            ));
        }
        lines.join("\n")
    });
    Ok(0)
}

/// Writes what Volatility lacks for five levels of page tables into a folder, and gives the folder back.
pub fn plugin(folder: &Path) -> Result<PathBuf> {
    let file = folder.join(la57::FILE);
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&file, la57::PLUGIN))
        .with_context(|| file.display().to_string())?;
    Ok(folder.to_owned())
}

/// Writes the table, in xz when its name says so; never over a file that is there. Says how many bytes it has.
pub fn write(kernel: &Kernel, types: &Types, to: &Path) -> Result<u64> {
    let isf = Isf::of(kernel, types)?;
    let file = File::create_new(to).with_context(|| to.display().to_string())?;
    let written = match to.extension().is_some_and(|e| e == "xz") {
        true => isf.write_xz(&file),
        false => isf.write(std::io::BufWriter::with_capacity(256 << 10, &file)),
    };
    if let Err(error) = written {
        let _ = fs::remove_file(to);
        return Err(error).with_context(|| to.display().to_string());
    }
    Ok(file.metadata().map_or(0, |m| m.len()))
}
