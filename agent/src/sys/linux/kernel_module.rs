//! Loading one kernel module that the orderer gave, and taking it out again (finit_module(2), delete_module(2)).

use std::{ffi::CString, fs::File, io, os::fd::AsRawFd as _};

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
