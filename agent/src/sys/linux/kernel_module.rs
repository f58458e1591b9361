//! Loading one kernel module that the orderer gave, and taking it out again (finit_module(2), delete_module(2)).

use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with, sockopt};
use std::{
    ffi::CString,
    fs::File,
    io,
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd as _,
    time::Duration,
};

/// Who listens on this host answers at once.
const TO_CONNECT: Duration = Duration::from_secs(1);
/// Bytes that may wait to be read; the kernel doubles it for what goes with them. A sender's own buffer grows with what was once under way
/// (net/ipv4/tcp_input.c, tcp_sndbuf_expand): for 16 KiB here it held 192 KiB on a loaded host, whose pages were in the image twice.
const WAITING: usize = 4 << 10;
/// Bytes of a segment of TCP, as every host must take them (RFC 9293, 3.7.1). What a sender keeps for what was not taken is a multiple of it
/// (net/ipv4/tcp_input.c, tcp_sndbuf_expand); across the loopback many go in one anyway.
const SEGMENT: libc::c_int = 536;

fn result(code: libc::c_long) -> io::Result<()> {
    if code == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Loads the module of `file`. Returns when its init function does.
pub fn load(file: &File, parameters: &str) -> io::Result<()> {
    let parameters = CString::new(parameters)?;
    // SAFETY: the descriptor is open and the string ends with a NUL; the kernel copies both.
    #[allow(unsafe_code)]
    result(unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) })
}

/// Connects to a port of this host over which the kernel will send all of its memory. As little as can be waits on the way: the socket's buffers are pages
/// that nobody has captured yet, and by themselves they grow to megabytes.
pub fn connect_to_module(address: SocketAddr) -> io::Result<TcpStream> {
    let family = AddressFamily::INET;
    let socket = socket_with(
        family,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        Some(ipproto::TCP),
    )?;
    sockopt::set_socket_recv_buffer_size(&socket, WAITING)?;
    // It bounds connecting, too.
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(TO_CONNECT))?;
    let bytes = SEGMENT.to_ne_bytes();
    let size = libc::socklen_t::try_from(bytes.len()).map_err(io::Error::other)?;
    // SAFETY: the value is an int, whose bytes stand in this frame, and its size is told; the kernel copies it.
    #[allow(unsafe_code)]
    let done = unsafe {
        let (level, name) = (libc::IPPROTO_TCP, libc::TCP_MAXSEG);
        libc::setsockopt(socket.as_raw_fd(), level, name, bytes.as_ptr().cast(), size)
    };
    result(done.into())?;
    connect(&socket, &address)?;
    Ok(TcpStream::from(socket))
}

/// Removes the module of that name; never by force.
pub fn remove(name: &str) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: the string ends with a NUL; the kernel copies it.
    #[allow(unsafe_code)]
    result(unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) })
}

/// Makes this process outlive its parent's group, and interruptible: a signal that does nothing but end a wait.
pub fn stand_alone() {
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"stillframe-lime");
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: the structure is initialised in full, and the handler does nothing, which is safe in a signal handler.
    #[allow(unsafe_code)]
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        // No SA_RESTART: a wait in the kernel ends.
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
        for ignored in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGPIPE] {
            libc::signal(ignored, libc::SIG_IGN);
        }
    }
}

/// Ends what the other threads of this process wait for in the kernel.
pub fn interrupt(thread: i32) {
    // SAFETY: a signal with a handler of our own, to a thread of this process.
    #[allow(unsafe_code)]
    unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGUSR1);
    }
}

/// The calling thread, for [`interrupt`].
pub fn this_thread() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}
