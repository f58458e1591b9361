//! A server of HTTP/1.1 that can misbehave on purpose: it answers by bytes, so an answer can be cut, held back or thrown away.

use anyhow::{Context as _, Result, bail, ensure};
use std::{
    collections::BTreeMap,
    io::{BufReader, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// Bodies are held in memory.
const MAX_BODY: usize = 512 << 20;

/// What a caller asks.
#[derive(Clone, Debug)]
pub struct Request {
    /// `PUT`.
    pub method: String,
    /// The path as it was sent, without the query.
    pub path: String,
    /// The query as it was sent, without its question mark.
    pub query: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The whole body.
    pub body: Vec<u8>,
}

impl Request {
    /// A header, or nothing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// What is answered.
#[derive(Clone, Debug)]
pub struct Response {
    /// The status.
    pub status: u16,
    /// Headers; the length of the body is added.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Response {
    /// With a body of one type.
    pub fn new(status: u16, kind: &str, body: impl Into<Vec<u8>>) -> Self {
        Response {
            status,
            headers: vec![("content-type".to_owned(), kind.to_owned())],
            body: body.into(),
        }
    }
}

/// What becomes of the connection.
pub enum Reply {
    /// The answer.
    Whole(Response),
    /// So many bytes of the answer, then the end.
    Cut(Response, usize),
    /// Nothing: the connection is reset.
    Reset,
    /// Nothing for so long, then a reset.
    Silence(Duration),
}

/// Answers a request. It may run many times at once.
pub type Handler = Arc<dyn Fn(Request) -> Reply + Send + Sync>;

/// Listens until it is dropped.
pub struct Server {
    address: SocketAddr,
    ended: Arc<AtomicBool>,
}

impl Server {
    /// On a free port of loopback.
    pub fn start(handler: Handler) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let ended = Arc::new(AtomicBool::new(false));
        let over = ended.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let (handler, over) = (handler.clone(), over.clone());
                std::thread::spawn(move || {
                    let _ = serve(stream, &handler, &over);
                });
            }
        });
        Ok(Server { address, ended })
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // Wakes the listener, which then ends.
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(stream: TcpStream, handler: &Handler, ended: &AtomicBool) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    let mut reader = BufReader::with_capacity(64 << 10, stream.try_clone()?);
    let mut writer = stream;
    while let Some(request) = read_request(&mut reader, &mut writer)? {
        if ended.load(Ordering::SeqCst) {
            return Ok(());
        }
        match handler(request) {
            Reply::Whole(response) => writer.write_all(&head_and_body(&response))?,
            Reply::Cut(response, bytes) => {
                let whole = head_and_body(&response);
                writer.write_all(&whole[..bytes.min(whole.len())])?;
                return Ok(writer.shutdown(Shutdown::Both)?);
            }
            Reply::Reset => return reset(&writer),
            Reply::Silence(long) => {
                std::thread::sleep(long);
                return reset(&writer);
            }
        }
    }
    Ok(())
}

/// Closes without the handshake that says that all was read: the caller sees a reset.
fn reset(stream: &TcpStream) -> Result<()> {
    use std::os::fd::AsRawFd as _;
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // SAFETY: the descriptor is the stream's own, and the structure lives through the call with its true size.
    #[allow(unsafe_code)]
    unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as libc::socklen_t,
        );
    }
    Ok(())
}

fn head_and_body(response: &Response) -> Vec<u8> {
    let mut bytes = format!("HTTP/1.1 {} x\r\n", response.status).into_bytes();
    for (name, value) in &response.headers {
        bytes.extend(format!("{name}: {value}\r\n").bytes());
    }
    bytes.extend(format!("content-length: {}\r\n\r\n", response.body.len()).bytes());
    bytes.extend(&response.body);
    bytes
}

fn read_head(reader: &mut impl std::io::BufRead) -> Result<Option<(String, BTreeMap<String, String>)>> {
    let mut first = String::new();
    if reader.read_line(&mut first)? == 0 {
        return Ok(None);
    }
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(Some((first.trim_end().to_owned(), headers)));
        }
        let (name, value) = line.split_once(':').context("a header without a colon")?;
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
}

fn read_body(reader: &mut impl std::io::BufRead, headers: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    if headers.get("transfer-encoding").is_some_and(|v| v == "chunked") {
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let size = usize::from_str_radix(line.trim().split(';').next().unwrap_or(""), 16)?;
            ensure!(body.len() + size <= MAX_BODY, "a body too large");
            let start = body.len();
            body.resize(start + size, 0);
            reader.read_exact(&mut body[start..])?;
            reader.read_line(&mut line)?;
            if size == 0 {
                return Ok(body);
            }
        }
    }
    let size: usize = headers.get("content-length").map_or(Ok(0), |v| v.parse())?;
    ensure!(size <= MAX_BODY, "a body too large");
    body.resize(size, 0);
    reader.read_exact(&mut body)?;
    Ok(body)
}

fn read_request(reader: &mut impl std::io::BufRead, writer: &mut TcpStream) -> Result<Option<Request>> {
    let Some((first, headers)) = read_head(reader)? else {
        return Ok(None);
    };
    let mut words = first.split(' ');
    let (Some(method), Some(target)) = (words.next(), words.next()) else {
        bail!("not a request: {first}");
    };
    if headers.get("expect").is_some_and(|v| v == "100-continue") {
        writer.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    Ok(Some(Request {
        method: method.to_owned(),
        path: path.to_owned(),
        query: query.to_owned(),
        body: read_body(reader, &headers)?,
        headers,
    }))
}

/// Asks another server the same, and gives its answer. `host` stands in the request as it was.
pub fn forward(request: &Request, port: u16) -> Result<Response> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut writer = stream.try_clone()?;
    let query = if request.query.is_empty() {
        String::new()
    } else {
        format!("?{}", request.query)
    };
    let mut head = format!("{} {}{query} HTTP/1.1\r\n", request.method, request.path);
    for (name, value) in &request.headers {
        if !["connection", "transfer-encoding", "content-length", "expect"].contains(&&name[..]) {
            head += &format!("{name}: {value}\r\n");
        }
    }
    head += &format!(
        "content-length: {}\r\nconnection: close\r\n\r\n",
        request.body.len()
    );
    writer.write_all(head.as_bytes())?;
    writer.write_all(&request.body)?;
    let mut reader = BufReader::new(stream);
    let (first, headers) = read_head(&mut reader)?.context("no answer")?;
    let status = first.split(' ').nth(1).context("no status")?.parse()?;
    let body = if request.method == "HEAD" || status == 204 || status == 304 {
        Vec::new()
    } else if headers.contains_key("content-length") || headers.contains_key("transfer-encoding") {
        read_body(&mut reader, &headers)?
    } else {
        let mut body = Vec::new();
        reader.read_to_end(&mut body)?;
        body
    };
    let headers = headers
        .into_iter()
        .filter(|(name, _)| !["content-length", "transfer-encoding", "connection"].contains(&&name[..]))
        .collect();
    Ok(Response {
        status,
        headers,
        body,
    })
}
