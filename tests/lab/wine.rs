//! Windows programs under Wine, in a prefix of their own.

use crate::programs;
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// Wine 8 has no bcryptprimitives.dll, from which Rust's standard library takes its random numbers. This closes that gap and
/// lies beside the program.
const BCRYPTPRIMITIVES: &str = "
#include <windows.h>
BOOLEAN NTAPI SystemFunction036(PVOID buffer, ULONG length);
__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE buffer, SIZE_T length) {
    return SystemFunction036(buffer, (ULONG)length);
}
";

/// A folder with a Windows program, and a prefix to run it in.
pub struct Wine {
    folder: tempfile::TempDir,
    program: PathBuf,
}

impl Wine {
    /// Lays `program` into a folder of its own.
    pub fn with(program: &Path) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let library = folder.path().join("bcryptprimitives.dll");
        compile(BCRYPTPRIMITIVES, &library, &["-shared", "-ladvapi32"])?;
        let copy = folder.path().join(program.file_name().context("no file name")?);
        fs::copy(program, &copy)?;
        Ok(Wine {
            folder,
            program: copy,
        })
    }

    /// The folder, which the program sees as drive Z.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts a program made of this C, inside the same prefix.
    pub fn start(&self, source: &str, libraries: &[&str]) -> Result<Child> {
        let program = self.folder.path().join("helper.exe");
        compile(source, &program, libraries)?;
        let child = self
            .wine(&program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(child)
    }

    /// The program with its surroundings, ready for arguments.
    pub fn command(&self) -> Command {
        self.wine(&self.program)
    }

    fn wine(&self, program: &Path) -> Command {
        let wine = if programs::is_installed("wine64") {
            "wine64"
        } else {
            "wine"
        };
        let mut command = Command::new(wine);
        command
            .arg(program)
            .current_dir(self.folder.path())
            .env("WINEPREFIX", self.folder.path().join("prefix"))
            .env("WINEDEBUG", "-all")
            .env("WINEARCH", "win64")
            .env_remove("DISPLAY");
        command
    }
}

fn compile(source: &str, to: &Path, more: &[&str]) -> Result<()> {
    let file = to.with_extension("c");
    fs::write(&file, source)?;
    let status = Command::new("x86_64-w64-mingw32-gcc")
        .arg("-o")
        .arg(to)
        .arg(&file)
        .args(more)
        .status()
        .context("x86_64-w64-mingw32-gcc")?;
    ensure!(status.success(), "{} could not be built", to.display());
    Ok(())
}

impl Drop for Wine {
    fn drop(&mut self) {
        // Its server lives on for a while and would write into a folder that is gone.
        let _ = Command::new("wineserver")
            .arg("-k")
            .env("WINEPREFIX", self.folder.path().join("prefix"))
            .status();
    }
}
