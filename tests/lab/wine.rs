//! Windows programs under Wine, in a prefix of their own.

use crate::programs;
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
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
        let source = folder.path().join("bcryptprimitives.c");
        fs::write(&source, BCRYPTPRIMITIVES)?;
        let status = Command::new("x86_64-w64-mingw32-gcc")
            .args(["-shared", "-o"])
            .arg(folder.path().join("bcryptprimitives.dll"))
            .arg(&source)
            .arg("-ladvapi32")
            .status()
            .context("x86_64-w64-mingw32-gcc")?;
        ensure!(status.success(), "the library that Wine lacks could not be built");
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

    /// The program with its surroundings, ready for arguments.
    pub fn command(&self) -> Command {
        let wine = if programs::is_installed("wine64") {
            "wine64"
        } else {
            "wine"
        };
        let mut command = Command::new(wine);
        command
            .arg(&self.program)
            .current_dir(self.folder.path())
            .env("WINEPREFIX", self.folder.path().join("prefix"))
            .env("WINEDEBUG", "-all")
            .env("WINEARCH", "win64")
            .env_remove("DISPLAY");
        command
    }
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
