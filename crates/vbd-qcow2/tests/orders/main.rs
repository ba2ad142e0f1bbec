//! The engine in orders of events that a machine shows once a year.
//!
//! All threads, reactors among them, run in turns. Whose turn is next is decided at each lock, atomic and message, and so
//! is when an operation takes effect on the file and when it is told of; where nobody can go on, that is an error. Built
//! with `RUSTFLAGS="--cfg shuttle"` only: `.ci/run` says how. `VBD_SEED` repeats a failure, `VBD_ROUNDS` spends more time.
#![cfg(shuttle)]
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

mod case;
mod load;

use std::sync::Arc;

use case::{Case, Killed, Shape};
use vbd_ring::sync::thread;
use vbd_testing::{Random, seeds};

/// Runs `body` once for each seed, in an order that depends on it: one of random turns, or one where threads have
/// priorities that change a few times, which finds what needs one of them to be very late.
fn in_orders(rounds: u64, body: fn(u64)) {
    for seed in seeds(rounds) {
        let mut config = shuttle::Config::new();
        config.stack_size = 1 << 20;
        config.max_steps = shuttle::MaxSteps::FailAfter(20_000_000);
        config.failure_persistence = shuttle::FailurePersistence::None;
        let run = move || {
            let _told = Told(seed);
            body(seed);
        };
        if seed % 3 == 0 {
            let depth = 2 + (seed / 3 % 4) as usize;
            let order = shuttle::scheduler::PctScheduler::new_from_seed(seed, depth, 1);
            shuttle::Runner::new(order, config).run(run);
        } else {
            let order = shuttle::scheduler::RandomScheduler::new_from_seed(seed, 1);
            shuttle::Runner::new(order, config).run(run);
        }
    }
}

/// Names the seed of a run that fails.
struct Told(u64);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed with VBD_SEED={}", self.0);
        }
    }
}

/// Guests write, zero, discard, read and flush the same few clusters, from two reactors.
#[test]
fn what_is_read_was_written_there() {
    in_orders(100, |seed| {
        let mut random = Random::new(seed);
        let case = Case::new(Shape::random(&mut random));
        let session = case.open();
        case.load(&session, &mut random, 3);
        case.close(session, &mut random);
    });
}

/// A request that takes very long ends in its own cluster, however often that was given up and used again meanwhile.
#[test]
fn a_late_request_meets_no_cluster_that_is_used_again() {
    in_orders(150, |seed| {
        let mut random = Random::new(seed);
        let case = Case::new(Shape::random(&mut random));
        let session = case.open();
        case.late(&session, &mut random);
        case.close(session, &mut random);
    });
}

/// The same while snapshots come and go and the disk grows, each of which needs the image alone.
#[test]
fn whoever_is_alone_with_an_image_is_alone() {
    in_orders(100, |seed| {
        let mut random = Random::new(seed);
        let case = Case::new(Shape::random(&mut random));
        let session = case.open();
        case.begin(&session, &mut random);
        let changer = {
            let (case, session, mut random) = (case.clone(), session.clone(), Random::new(seed ^ 1));
            thread::spawn(move || case.change(&session, &mut random))
        };
        case.load(&session, &mut random, 2);
        changer.join().expect("no panic");
        case.close(session, &mut random);
    });
}

/// The process is killed at some moment: what had completed is there when the image is opened again.
#[test]
fn what_has_completed_outlives_the_process() {
    in_orders(100, |seed| {
        let mut random = Random::new(seed);
        let case = Case::new(Shape::new(3, &mut random));
        let session = case.open();
        assert!(session.keeps_unflushed());
        let killer = {
            let (case, mut random) = (case.clone(), Random::new(seed ^ 2));
            thread::spawn(move || -> Vec<Killed> {
                let mut killed = Vec::new();
                for _ in 0..3 {
                    for _ in 0..random.below(300) {
                        thread::yield_now();
                    }
                    killed.push(case.kill());
                }
                killed
            })
        };
        case.load(&session, &mut random, 2);
        let killed = killer.join().expect("no panic");
        case.close(session, &mut random);
        for killed in killed {
            case.open_killed(&killed);
        }
    });
}

/// Nobody closes the disk by name: the last to leave does, whoever that is, and whoever comes next finds all of it.
#[test]
fn an_image_is_closed_by_whoever_leaves_last() {
    in_orders(60, |seed| {
        let mut random = Random::new(seed);
        let case = Case::new(Shape::random(&mut random));
        let session = case.open();
        let handles: Vec<_> = (0..2)
            .map(|number| {
                let (case, session) = (case.clone(), session.clone());
                thread::spawn(move || case.drive(&session, &mut Random::new(seed ^ number << 32), 4))
            })
            .collect();
        let alive = Arc::downgrade(&session);
        drop(session);
        handles.into_iter().for_each(|handle| handle.join().expect("no panic"));
        assert!(alive.upgrade().is_none(), "somebody holds the image");
        case.look(&mut random);
    });
}
