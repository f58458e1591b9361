//! How a guest is handed what Systems Manager sends it: a program of the guest's own shell asks for a script, runs it, and sends back what it said. It stands in
//! for the agent of Systems Manager, whose rendering and whose codes are the lab's.

use super::http::{Reply, Request, Response, Server};
use anyhow::{Result, bail};
use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

#[derive(Debug, Default)]
struct Tray {
    script: Option<String>,
    errors: String,
    ended: Option<(i32, String)>,
}

#[derive(Debug, Default)]
struct Inside {
    tray: Mutex<Tray>,
    moved: Condvar,
}

/// The post of one guest. It takes one script at a time.
#[derive(Clone)]
pub struct Post {
    inside: Arc<Inside>,
    port: u16,
    _server: Arc<Server>,
}

impl std::fmt::Debug for Post {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Post on {}", self.port)
    }
}

impl Post {
    /// Opens it.
    pub fn open() -> Result<Self> {
        let inside: Arc<Inside> = Arc::default();
        let asked = inside.clone();
        let server = Server::start(Arc::new(move |request| Reply::Whole(answer(&asked, &request))))?;
        Ok(Post {
            port: server.port(),
            inside,
            _server: Arc::new(server),
        })
    }

    /// What a guest that has joined the network runs to be reached (busybox's sh, wget).
    pub fn script(&self) -> String {
        let url = format!("http://10.0.2.2:{}", self.port);
        format!(
            "while :; do\nwget -q -O /run/order {url}/next; if ! [ -s /run/order ]; then sleep 1; continue; fi\n\
             sh /run/order > /run/said 2> /run/wrong < /dev/null; code=$?\n\
             wget -q -O /dev/null --post-file=/run/wrong {url}/wrong\nwget -q -O /dev/null --post-file=/run/said {url}/said/$code\ndone\n"
        )
    }

    /// Has the guest run a script: its code, what it said, what went wrong.
    pub fn run(&self, script: &str, patience: Duration) -> Result<(i32, String, String)> {
        let until = Instant::now() + patience;
        let mut tray = lock(&self.inside.tray);
        *tray = Tray {
            script: Some(script.to_owned()),
            ..Tray::default()
        };
        loop {
            if let Some((code, said)) = tray.ended.take() {
                return Ok((code, said, std::mem::take(&mut tray.errors)));
            }
            if Instant::now() > until {
                bail!("the guest did not answer");
            }
            let waited = self.inside.moved.wait_timeout(tray, Duration::from_secs(1));
            tray = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn answer(inside: &Inside, request: &Request) -> Response {
    let mut tray = lock(&inside.tray);
    let text = String::from_utf8_lossy(&request.body).into_owned();
    let answer = match (&request.path[..], request.path.strip_prefix("/said/")) {
        ("/next", _) => tray.script.take().unwrap_or_default(),
        ("/wrong", _) => {
            tray.errors = text;
            String::new()
        }
        (_, Some(code)) => {
            tray.ended = Some((code.parse().unwrap_or(-1), text));
            String::new()
        }
        _ => return Response::new(404, "text/plain", ""),
    };
    inside.moved.notify_all();
    Response::new(200, "text/plain", answer)
}
