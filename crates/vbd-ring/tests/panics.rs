//! A reactor that panics ends its process: seen from outside, on a process of its own.

use std::future::Future;
use std::os::unix::process::ExitStatusExt;
use std::pin::Pin;
use std::process::{Command, Output};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use vbd_ring::{Completion, EngineKind, Local, Poller, Reactor, Settings};

const ENGINE: &str = "VBD_TEST_ENGINE";
const PLACE: &str = "VBD_TEST_PLACE";
/// Where a reactor runs the code of others.
const PLACES: [&str; 6] = ["post", "completion", "timer", "poller", "task", "drop"];

struct Panics;

impl Completion for Panics {
    fn complete(self: Rc<Self>, _token: u64, _result: i32) {
        panic!("on purpose, in a completion");
    }
}

impl Poller for Panics {
    fn poll(self: Rc<Self>) -> bool {
        panic!("on purpose, in a poller");
    }

    fn arm(self: Rc<Self>) -> bool {
        false
    }
}

/// A task that never ends, and panics when it is dropped at the reactor's stop.
struct PanicsAtTheEnd;

impl Future for PanicsAtTheEnd {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }
}

impl Drop for PanicsAtTheEnd {
    fn drop(&mut self) {
        panic!("on purpose, at the end");
    }
}

fn panic_in(place: &str, local: &Local) {
    match place {
        "post" => panic!("on purpose, in a post"),
        "completion" => local.blocking(|| 0, Rc::new(Panics), 0),
        "timer" => {
            local.timer(local.now(), Rc::new(Panics), 0);
        }
        "poller" => local.activate(Rc::new(Panics)),
        "task" => {
            let local = local.clone();
            local.clone().spawn(async move {
                local.sleep(Duration::from_millis(1)).await;
                panic!("on purpose, in a task");
            });
        }
        "drop" => local.spawn(PanicsAtTheEnd),
        other => unreachable!("{other}"),
    }
}

/// Not a test by itself: the test starts it as a process of its own, which has to end before the line it would print.
#[test]
fn a_process_whose_reactor_panics() {
    let (Ok(place), Ok(engine)) = (std::env::var(PLACE), std::env::var(ENGINE)) else { return };
    // Ended on purpose: no core file is of use to anybody.
    let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(rustix::process::Resource::Core, none).expect("a lower limit");
    let engine = if engine == "uring" { EngineKind::Uring } else { EngineKind::Threads };
    let reactor = Reactor::spawn("test", Settings { engine, ..Settings::default() }).expect("a reactor");
    let handle = reactor.handle();
    let at_the_end = place == "drop";
    handle.post(move |local| panic_in(&place, local));
    if at_the_end {
        drop(reactor);
    } else {
        // The end comes from the other thread.
        std::thread::sleep(Duration::from_secs(10));
    }
    eprintln!("{SURVIVED}");
}

const SURVIVED: &str = "the process goes on without its reactor";

fn run(place: &str, engine: &str) -> Output {
    Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "a_process_whose_reactor_panics", "--nocapture"])
        .env(PLACE, place)
        .env(ENGINE, engine)
        .output()
        .expect("started")
}

#[test]
fn a_reactor_that_panics_ends_the_process_and_says_so() {
    for engine in ["uring", "threads"] {
        for place in PLACES {
            let Output { status, stderr, .. } = run(place, engine);
            let stderr = String::from_utf8_lossy(&stderr);
            assert_eq!(status.signal(), Some(libc::SIGABRT), "{place}, {engine}: {status}\n{stderr}");
            assert!(stderr.contains("on purpose"), "{place}, {engine}: another panic\n{stderr}");
            assert!(stderr.contains("vbd: a reactor has panicked; ending the process"), "{stderr}");
            assert!(!stderr.contains(SURVIVED), "{stderr}");
        }
    }
}
