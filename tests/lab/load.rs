//! A load: many processes with open files and sockets, as on a busy host.

use anyhow::{Context, Result};
use std::{
    fs::File,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
};

/// The argument by which a program of the lab becomes one process of the load.
pub const ARGUMENT: &str = "one-of-the-load";

/// Running processes; they end when this is dropped.
pub struct Load {
    children: Vec<Child>,
    _files: tempfile::TempDir,
}

impl Load {
    /// Starts `n` processes by running this very program again.
    pub fn start(n: usize) -> Result<Self> {
        Self::of_program(&std::env::current_exe()?, n)
    }

    /// Starts `n` processes of `program`, whose main calls [`serve`], and waits until all of them hold what they should: 16 open
    /// files and a socket pair each, and every second one a listening and a connected TCP socket.
    pub fn of_program(program: &Path, n: usize) -> Result<Self> {
        let files = tempfile::tempdir()?;
        let mut children = Vec::with_capacity(n);
        for i in 0..n {
            let child = Command::new(program)
                .args([ARGUMENT, &i.to_string()])
                .arg(files.path())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .context("starting a process of the load")?;
            children.push(child);
        }
        let mut load = Load {
            children,
            _files: files,
        };
        for child in &mut load.children {
            let mut ready = [0];
            child
                .stdout
                .as_mut()
                .context("no output")?
                .read_exact(&mut ready)
                .context("a process of the load died")?;
        }
        Ok(load)
    }

    /// Their process ids.
    pub fn pids(&self) -> impl Iterator<Item = u32> + '_ {
        self.children.iter().map(Child::id)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
        }
        for child in &mut self.children {
            let _ = child.wait();
        }
    }
}

/// To be called first in the main of a program that starts loads: when it was started as one process of the load, it is that
/// until its standard input closes, and does not return.
pub fn serve() {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some(ARGUMENT) {
        return;
    }
    let number: usize = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(0);
    let folder = arguments.next().unwrap_or_default();
    let files: Vec<_> = (0..16)
        .map(|i| File::create(format!("{folder}/{number}-{i}")))
        .collect();
    let pair = UnixStream::pair();
    let tcp = number.is_multiple_of(2).then(|| {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        let server = listener.accept()?;
        Ok::<_, std::io::Error>((listener, client, server))
    });
    let whole = files.iter().all(Result::is_ok) && pair.is_ok() && tcp.as_ref().is_none_or(Result::is_ok);
    if !whole {
        std::process::exit(1);
    }
    let mut out = std::io::stdout();
    if out.write_all(b"!").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
    let _ = std::io::stdin().read(&mut [0]);
    std::process::exit(0);
}
