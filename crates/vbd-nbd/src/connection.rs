//! A client's connection on its reactor.
//!
//! The ring only says when the socket can be read or written; bytes are moved by plain calls that never wait. A turn
//! reads as many requests as there are, hands them all to the disk, and sends all replies that are there at once.
//! Sockets are not looked at without being ready, but while requests come the reactor stays awake for the next.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use vbd_core::track::Track;
use vbd_core::{Channel, IoVec, Operation, QueueCounters, Request, Result, Session, Sink};
use vbd_ring::{Completion, FileHandle, Local, Op, OpId, TimerId};

use crate::command::{Terms, export_info};
use crate::control::{Control, Order};
use crate::export::{Export, Label};
use crate::memory::{Account, SCRATCH, Thread};
use crate::negotiation::{ExportInfo, Negotiation, Step};
use crate::outbox::{Outbox, Payload};
use crate::protocol::DIRTY_BITMAP_ID;
use crate::server::Shared;
use crate::transmission::{Dirty, Transmission, Turn};
use crate::transport::{Received, Tls, Transport};

/// With so many commands under way others follow soon; with few, staying awake for them gains nothing.
const BUSY: usize = 8;
/// Rounds of a connection before others have their turn.
const ROUNDS: u32 = 32;
/// Pieces of memory in one sendmsg(2).
const PIECES: usize = 128;
/// Bytes of a handshake that are read at once.
const HANDSHAKE: usize = 16 << 10;

/// Tokens of the connection's own operations.
const READABLE: u64 = 0;
const WRITABLE: u64 = 1;
const RUN: u64 = 2;
const DEADLINE: u64 = 3;

enum Phase {
    Handshake(Negotiation),
    /// Waits for a disk to be looked at or opened.
    Asking(Negotiation),
    /// Waits until the consent to TLS was sent.
    Securing(Negotiation),
    Transmission(Box<Transmission>),
    Over,
}

/// What a connection has of its export.
struct Attached {
    channel: Rc<dyn Channel>,
    counters: Arc<QueueCounters>,
    read_only: bool,
    track: Option<Arc<Track>>,
    _label: Label,
}

struct State {
    transport: Transport,
    phase: Phase,
    attached: Option<Attached>,
    outbox: Outbox,
    /// Bytes of requests that could not be taken yet.
    backlog: Vec<u8>,
    readable: bool,
    writable: bool,
    /// Nothing more is read: the client has closed, or is not listened to any more.
    deaf: bool,
    /// Nothing more is sent: the socket has failed.
    broken: bool,
    order: Order,
    /// The flush before the end was made, or is not needed.
    flushed: bool,
    deadline: Option<TimerId>,
    /// A vector for requests on their way to the disk.
    spare: Vec<Request>,
}

pub(crate) struct Connection {
    local: Local,
    file: FileHandle,
    server: Arc<Shared>,
    control: Arc<Control>,
    number: u64,
    thread: Rc<Thread>,
    state: RefCell<State>,
    polls: [Cell<Option<OpId>>; 2],
    running: Cell<bool>,
    scheduled: Cell<bool>,
}

/// What opening a disk or looking at it has come to.
type Answer = std::result::Result<(ExportInfo, Option<(Terms, Attached)>), String>;

impl Connection {
    /// Greets a client. The connection lives on by itself until the client or an order ends it.
    pub(crate) fn start(local: &Local, fd: OwnedFd, server: Arc<Shared>, control: Arc<Control>, number: u64) {
        let mut greeting = Vec::new();
        let negotiation = Negotiation::new(server.tls_mode(), &mut greeting);
        let mut outbox = Outbox::default();
        outbox.raw(Payload::Bytes(greeting));
        let connection = Rc::new(Connection {
            local: local.clone(),
            file: local.file(Arc::new(fd)),
            control: control.clone(),
            number,
            thread: Thread::current(),
            state: RefCell::new(State {
                transport: Transport::Plain,
                phase: Phase::Handshake(negotiation),
                attached: None,
                outbox,
                backlog: Vec::new(),
                readable: false,
                writable: true,
                deaf: false,
                broken: false,
                order: Order::Run,
                flushed: false,
                deadline: None,
                spare: Vec::new(),
            }),
            polls: Default::default(),
            running: Cell::new(false),
            scheduled: Cell::new(false),
            server,
        });
        let deadline = local.now() + connection.server.handshake();
        let timer = local.timer(deadline, connection.clone(), DEADLINE);
        connection.state.borrow_mut().deadline = Some(timer);
        local.spawn(Self::obey(connection.clone(), control));
        connection.run();
    }

    /// Carries out what other threads say.
    async fn obey(self: Rc<Self>, control: Arc<Control>) {
        loop {
            let order = control.changed().await;
            if order == Order::Gone {
                return;
            }
            self.state.borrow_mut().order = order;
            if order == Order::End {
                self.state.borrow_mut().broken = true;
                let _ = rustix::net::shutdown(&self.file, rustix::net::Shutdown::Both);
                let attached = self.state.borrow().attached.as_ref().map(|attached| attached.channel.clone());
                if let Some(channel) = attached {
                    channel.cancel_waiting();
                }
            }
            self.run();
        }
    }

    fn turn_now(self: &Rc<Self>) -> Turn {
        Turn { sink: self.clone(), now: self.local.now() }
    }

    /// Does all there is to do.
    fn run(self: &Rc<Self>) {
        if self.running.replace(true) {
            return;
        }
        let mut rounds = 0;
        loop {
            self.send();
            let worked = self.submit() | self.receive();
            if !worked {
                break;
            }
            rounds += 1;
            if rounds == ROUNDS {
                self.schedule();
                break;
            }
        }
        self.running.set(false);
        if !self.end_if_done() {
            self.wait();
        }
    }

    /// Runs at the end of the reactor's turn, once for all that has happened until then.
    fn schedule(self: &Rc<Self>) {
        if !self.scheduled.replace(true) {
            self.local.defer(self.clone(), RUN, 0);
        }
    }

    /// Sends what the socket takes.
    fn send(&self) {
        let state = &mut *self.state.borrow_mut();
        while state.writable && !state.broken && !state.outbox.is_empty() {
            let mut pieces = [IoVec { iov_base: std::ptr::null_mut(), iov_len: 0 }; PIECES];
            let count = state.outbox.pieces(&mut pieces);
            let pieces = &pieces[..count];
            let total: usize = pieces.iter().map(|piece| piece.iov_len).sum();
            // SAFETY: the outbox owns what they point to and is not changed meanwhile.
            match unsafe { state.transport.send(self.file.as_fd(), pieces) } {
                Ok(sent) => {
                    state.writable = sent == total;
                    state.outbox.sent(sent);
                }
                Err(error) => state.fail(&error),
            }
        }
        if state.writable && !state.broken && state.transport.has_pending() {
            match state.transport.flush(self.file.as_fd()) {
                Ok(all) => state.writable = all,
                Err(error) => state.fail(&error),
            }
        }
        if state.broken {
            state.outbox.clear();
        }
    }

    /// Hands requests to the disk; true if there were some.
    fn submit(&self) -> bool {
        let (channel, mut requests) = {
            let state = &mut *self.state.borrow_mut();
            let (Phase::Transmission(transmission), Some(attached)) = (&mut state.phase, &state.attached)
            else {
                return false;
            };
            if transmission.ready.is_empty() {
                return false;
            }
            let spare = std::mem::take(&mut state.spare);
            (attached.channel.clone(), std::mem::replace(&mut transmission.ready, spare))
        };
        for request in requests.drain(..) {
            channel.clone().submit(request);
        }
        self.state.borrow_mut().spare = requests;
        true
    }

    /// Reads from the socket what can be used; true if something came of it.
    fn receive(self: &Rc<Self>) -> bool {
        let state = &mut *self.state.borrow_mut();
        if state.deaf || state.order != Order::Run {
            return false;
        }
        match &mut state.phase {
            Phase::Handshake(_) if state.outbox.is_empty() => self.negotiate(state),
            Phase::Securing(_) if state.outbox.is_empty() => self.secure(state),
            Phase::Transmission(_) => self.receive_requests(state),
            _ => false,
        }
    }

    fn receive_requests(self: &Rc<Self>, state: &mut State) -> bool {
        let turn = self.turn_now();
        let Phase::Transmission(transmission) = &mut state.phase else { return false };
        // What waited for memory may have it now, whether or not more has come.
        let open = transmission.is_open(&turn, &mut state.outbox);
        let started = !transmission.ready.is_empty();
        if !open || (state.backlog.is_empty() && !state.readable) {
            state.deaf |= transmission.has_ended();
            return started;
        }
        if !state.backlog.is_empty() {
            let taken = transmission.take(&state.backlog, &turn, &mut state.outbox);
            state.backlog.drain(..taken);
            state.deaf |= transmission.has_ended();
            return started || taken > 0;
        }
        let fd = self.file.as_fd();
        let (received, count) = if let Some(space) = transmission.space() {
            let received = state.transport.receive(fd, space);
            let count = count_of(&received);
            if count > 0 {
                transmission.filled(count, &turn, &mut state.outbox);
            }
            (received, count)
        } else {
            let mut scratch = self.thread.scratch.borrow_mut();
            let most = transmission.appetite(SCRATCH);
            let received = state.transport.receive(fd, &mut scratch[..most]);
            let count = count_of(&received);
            let taken = transmission.take(&scratch[..count], &turn, &mut state.outbox);
            state.backlog.extend_from_slice(&scratch[taken..count]);
            (received, count)
        };
        let ended = transmission.has_ended();
        state.received(received);
        state.deaf |= ended;
        count > 0
    }

    fn negotiate(self: &Rc<Self>, state: &mut State) -> bool {
        let Phase::Handshake(negotiation) = &mut state.phase else { return false };
        let mut out = Vec::new();
        let step = negotiation.advance(&*self.server, &mut out);
        if !out.is_empty() {
            state.outbox.raw(Payload::Bytes(out));
        }
        match step {
            Step::Again => true,
            Step::Input if !state.readable => false,
            Step::Input => {
                let mut scratch = self.thread.scratch.borrow_mut();
                let received = state.transport.receive(self.file.as_fd(), &mut scratch[..HANDSHAKE]);
                let count = count_of(&received);
                negotiation.feed(&scratch[..count]);
                state.received(received);
                count > 0
            }
            Step::Inspect(name) => self.ask(state, name, false),
            Step::Open(name) => self.ask(state, name, true),
            Step::StartTls => {
                state.change_phase(Phase::Securing);
                true
            }
            Step::Close | Step::Transmission => {
                state.deaf = true;
                true
            }
        }
    }

    fn secure(self: &Rc<Self>, state: &mut State) -> bool {
        match self.server.tls_session() {
            Some(session) => {
                state.transport = Transport::Tls(Box::new(Tls::new(session)));
                self.server.is_encrypted(self.number);
                state.change_phase(|mut negotiation| {
                    negotiation.secured();
                    Phase::Handshake(negotiation)
                });
            }
            None => state.deaf = true,
        }
        true
    }

    /// Has a disk looked at or opened, off the reactor, and goes on with the answer.
    fn ask(self: &Rc<Self>, state: &mut State, name: String, open: bool) -> bool {
        state.change_phase(Phase::Asking);
        let export = self.server.export(&name, open.then_some(self.number));
        let connection = self.clone();
        self.local.spawn(async move {
            let answer = match export {
                None => Err("there is no such export".to_owned()),
                Some(export) if open => connection.open(export).await,
                Some(export) => connection.inspect(export).await,
            };
            connection.answered(answer);
        });
        true
    }

    async fn inspect(&self, export: Arc<Export>) -> Answer {
        let (disk, read_only) = (export.disk.clone(), export.read_only);
        let (geometry, capabilities) =
            self.local.unblock(move || disk.inspect()).await.map_err(|error| refused(&error))?;
        Ok((export_info(&geometry, &capabilities, read_only), None))
    }

    async fn open(&self, export: Arc<Export>) -> Answer {
        let disk = export.disk.clone();
        let session: Arc<dyn Session> =
            self.local.unblock(move || disk.open()).await.map_err(|error| refused(&error))?;
        let (geometry, capabilities) = (session.geometry(), session.capabilities());
        let terms = Terms::new(&geometry, &capabilities, export.read_only);
        let label = Export::label(&export);
        let attached = Attached {
            channel: session.clone().channel(&self.local).map_err(|error| refused(&error))?,
            counters: export.disk.statistics().queue(&label.to_string()),
            read_only: terms.read_only,
            track: session.track().cloned(),
            _label: label,
        };
        Ok((export_info(&geometry, &capabilities, export.read_only), Some((terms, attached))))
    }

    fn answered(self: &Rc<Self>, answer: Answer) {
        {
            let state = &mut *self.state.borrow_mut();
            let Phase::Asking(mut negotiation) = std::mem::replace(&mut state.phase, Phase::Over) else {
                return;
            };
            let (info, opened) = match answer {
                Ok((info, opened)) => (Ok(info), opened),
                Err(why) => (Err(why), None),
            };
            let mut out = Vec::new();
            let step = negotiation.answer(info.as_ref().copied().map_err(String::as_str), &mut out);
            state.outbox.raw(Payload::Bytes(out));
            state.phase = match (step, opened) {
                (Step::Transmission, Some((terms, attached))) => {
                    if let Some(deadline) = state.deadline.take() {
                        self.local.cancel_timer(deadline);
                    }
                    let agreed = negotiation.finish();
                    state.backlog = agreed.rest;
                    let track = attached.track.iter();
                    let dirty =
                        |((id, name), track): (_, &Arc<Track>)| Dirty { id, name, track: track.clone() };
                    let named = (DIRTY_BITMAP_ID..).zip(agreed.bitmaps);
                    let bitmaps: Vec<_> = named.zip(track.cycle()).map(dirty).collect();
                    let (headers, allocation) = (agreed.headers, agreed.allocation);
                    let terms = Terms { headers, allocation, bitmaps: !bitmaps.is_empty(), ..terms };
                    let mut transmission = Transmission::new(terms, self.account());
                    transmission.bitmaps = bitmaps;
                    state.attached = Some(attached);
                    Phase::Transmission(Box::new(transmission))
                }
                (step, _) => {
                    state.deaf |= step == Step::Close;
                    Phase::Handshake(negotiation)
                }
            };
        }
        self.run();
    }

    fn account(&self) -> Rc<Account> {
        let (total, most) = self.server.memory();
        Account::new(self.thread.pool.clone(), total, most, self.control.clone())
    }

    /// Ends the connection where nothing is left to be done; true if it has ended.
    fn end_if_done(self: &Rc<Self>) -> bool {
        let state = &mut *self.state.borrow_mut();
        let cut_off = state.broken || state.order == Order::End;
        if !(state.deaf || cut_off || state.order == Order::Finish) {
            return false;
        }
        if let Phase::Transmission(transmission) = &mut state.phase {
            transmission.end(&mut state.outbox);
        }
        let sent = cut_off || (state.outbox.is_empty() && !state.transport.has_pending());
        match &mut state.phase {
            Phase::Over => return true,
            Phase::Transmission(transmission) => {
                if !transmission.is_idle() {
                    return false;
                }
                let writable = state.attached.as_ref().is_some_and(|attached| !attached.read_only);
                if state.order == Order::Finish && writable && !state.flushed {
                    state.flushed = true;
                    transmission.flush_quietly(&self.turn_now(), &mut state.outbox);
                    self.schedule();
                    return false;
                }
                if !sent {
                    if state.writable {
                        self.schedule();
                    }
                    return false;
                }
            }
            _ if state.order == Order::Finish => {}
            _ if !sent => return false,
            _ => {}
        }
        state.transport.close(self.file.as_fd());
        let over = (std::mem::replace(&mut state.phase, Phase::Over), state.attached.take());
        (state.deaf, state.broken) = (true, true);
        if let Some(deadline) = state.deadline.take() {
            self.local.cancel_timer(deadline);
        }
        self.polls.iter().filter_map(Cell::take).for_each(|poll| self.local.cancel(poll));
        drop(over);
        self.control.order(Order::Gone);
        self.server.left(self.number);
        true
    }

    /// Asks to be told when the socket can be read or written, where that is waited for.
    fn wait(self: &Rc<Self>) {
        let state = self.state.borrow();
        if let Phase::Transmission(transmission) = &state.phase
            && transmission.under_way() >= BUSY
        {
            self.local.expect();
        }
        let listens = !state.deaf && !state.readable && state.order == Order::Run;
        if listens && !matches!(state.phase, Phase::Asking(_) | Phase::Over) {
            self.poll_for(READABLE, libc::POLLIN);
        }
        if !state.writable && !state.broken {
            self.poll_for(WRITABLE, libc::POLLOUT);
        }
    }

    fn poll_for(self: &Rc<Self>, token: u64, events: i16) {
        let poll = &self.polls[usize::from(token == WRITABLE)];
        if poll.get().is_none() {
            // SAFETY: a poll has no pointers.
            let id = unsafe { self.local.submit(&self.file, &Op::Poll { events }, self.clone(), token) };
            poll.set(Some(id));
        }
    }
}

impl State {
    fn fail(&mut self, error: &std::io::Error) {
        tracing::debug!("a client's connection has failed: {error}");
        self.broken = true;
        self.deaf = true;
    }

    fn received(&mut self, received: std::io::Result<Received>) {
        match received {
            Ok(Received::Bytes(_)) => {}
            Ok(Received::Last(_) | Received::Nothing) => self.readable = false,
            Ok(Received::Closed) => self.deaf = true,
            Err(error) => self.fail(&error),
        }
    }

    /// Moves the negotiation to another phase.
    fn change_phase(&mut self, change: impl FnOnce(Negotiation) -> Phase) {
        self.phase = match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Handshake(negotiation) | Phase::Asking(negotiation) | Phase::Securing(negotiation) => {
                change(negotiation)
            }
            other => other,
        };
    }
}

fn count_of(received: &std::io::Result<Received>) -> usize {
    match received {
        Ok(Received::Bytes(count) | Received::Last(count)) => *count,
        _ => 0,
    }
}

/// What a client is told of a disk that cannot be had; the log has the rest.
fn refused(error: &vbd_core::Error) -> String {
    tracing::warn!("a client cannot have its export: {error}");
    match error.kind() {
        vbd_core::ErrorKind::Busy => "the disk is in use by somebody else".to_owned(),
        _ => "the disk cannot be opened".to_owned(),
    }
}

impl Completion for Connection {
    fn complete(self: Rc<Self>, token: u64, result: i32) {
        match token {
            READABLE | WRITABLE => {
                self.polls[usize::from(token == WRITABLE)].set(None);
                if result == -libc::ECANCELED {
                    return;
                }
                let mut state = self.state.borrow_mut();
                state.readable |= token == READABLE;
                state.writable |= token == WRITABLE;
                drop(state);
                // Together with the requests that come back in the same turn.
                return self.schedule();
            }
            DEADLINE => {
                let mut state = self.state.borrow_mut();
                state.deadline = None;
                state.broken = true;
            }
            _ => self.scheduled.set(false),
        }
        self.run();
    }
}

impl Sink for Connection {
    fn complete(self: Rc<Self>, request: Request, result: Result<()>) {
        let turn = self.turn_now();
        {
            let state = &mut *self.state.borrow_mut();
            if let (Phase::Transmission(transmission), Some(attached)) = (&mut state.phase, &state.attached) {
                if request.operation != Operation::Extents {
                    attached.counters.record(&request, turn.now, result.is_err());
                }
                transmission.complete(request, result, &turn, &mut state.outbox);
            }
        }
        if !self.running.get() {
            self.schedule();
        }
    }
}
