//! A real S3 API server: LocalStack, as `tests/run` installs it. It judges checksums, conditions and locks; who may ask, it does not.

use crate::programs;
use anyhow::{Context as _, Result, ensure};
use std::{
    net::{TcpListener, TcpStream},
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// It ends when this is dropped.
pub struct LocalStack {
    child: Child,
    /// Where it listens, on loopback.
    pub port: u16,
    _folder: tempfile::TempDir,
}

/// Its server takes the port of `GATEWAY_LISTEN` and listens on every address of the machine, where nobody judges who asks.
const ON_LOOPBACK: &str = "
import runpy
from twisted.internet.endpoints import TCP4ServerEndpoint as Endpoint
begin = Endpoint.__init__
Endpoint.__init__ = lambda self, reactor, port, backlog=50, interface=None: begin(self, reactor, port, backlog, '127.0.0.1')
runpy.run_module('localstack.runtime.main', run_name='__main__')
";

impl LocalStack {
    /// Starts it and waits until it answers.
    pub fn start() -> Result<Self> {
        let python = programs::target().join("lab/localstack/bin/python");
        ensure!(
            python.exists(),
            "{}: not there; `tests/run` installs it",
            python.display()
        );
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let folder = tempfile::tempdir()?;
        let log = std::fs::File::create(folder.path().join("log"))?;
        // It ends with whoever holds the other end of its standard input: tests keep it in a static, which nothing drops.
        let mut command = Command::new("sh");
        command
            .args([
                "-c",
                "\"$0\" -c \"$2\" < /dev/null & read nothing; kill -9 $!; rm -rf \"$1\"",
            ])
            .arg(python)
            .arg(folder.path())
            .arg(ON_LOOPBACK)
            .current_dir(folder.path())
            .env("GATEWAY_LISTEN", format!("127.0.0.1:{port}"))
            .env("LOCALSTACK_HOST", format!("127.0.0.1:{port}"))
            .env("TMPDIR", folder.path())
            .envs([
                ("SERVICES", "s3"),
                ("DISABLE_EVENTS", "1"),
                ("SKIP_SSL_CERT_DOWNLOAD", "1"),
                ("DNS_ADDRESS", "0"),
            ])
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        let mut local = LocalStack {
            child: command.spawn().context("starting LocalStack")?,
            port,
            _folder: folder,
        };
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            ensure!(
                began.elapsed() < Duration::from_secs(90),
                "LocalStack does not answer"
            );
            ensure!(local.child.try_wait()?.is_none(), "LocalStack ended");
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(local)
    }
}

impl Drop for LocalStack {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}
