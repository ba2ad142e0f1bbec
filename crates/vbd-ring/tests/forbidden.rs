//! Where io_uring is forbidden, as in many containers, threads do the work behind the same face.

use vbd_ring::{EngineKind, Reactor, Settings};

/// Lets io_uring_setup fail with EPERM on this thread and those it starts.
fn forbid_io_uring() {
    let code = |code: u32| u16::try_from(code).expect("a BPF code");
    let filter = [
        // The number of the system call.
        libc::sock_filter { code: code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS), jt: 0, jf: 0, k: 0 },
        libc::sock_filter {
            code: code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K),
            jt: 0,
            jf: 1,
            k: u32::try_from(libc::SYS_io_uring_setup).expect("small"),
        },
        libc::sock_filter {
            code: code(libc::BPF_RET | libc::BPF_K),
            jt: 0,
            jf: 0,
            k: libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned(),
        },
        libc::sock_filter {
            code: code(libc::BPF_RET | libc::BPF_K),
            jt: 0,
            jf: 0,
            k: libc::SECCOMP_RET_ALLOW,
        },
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program lives across the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

#[test]
fn threads_take_over_where_io_uring_is_forbidden() {
    std::thread::spawn(|| {
        forbid_io_uring();
        let refused = Reactor::spawn("test", Settings { engine: EngineKind::Uring, ..Settings::default() });
        let error = refused.err().expect("forbidden");
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        let reactor = Reactor::spawn("test", Settings::default()).expect("a reactor all the same");
        assert_eq!(reactor.handle().call(|local| local.is_uring()), Some(false));
    })
    .join()
    .expect("no panic");
}
