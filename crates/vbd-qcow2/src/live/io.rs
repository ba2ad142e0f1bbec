//! Reading and writing of the engine's own: tables and what lies beside a guest's data, awaited in a task.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use vbd_core::ask::{Ask, ask};
use vbd_core::file::Backend;
use vbd_core::memory::Buffer;
use vbd_core::{Channel, Error, ErrorKind, Flags, Guard, IoVec, Operation, Result, Session};
use vbd_luks::Encrypted;
use vbd_ring::Local;

/// A task's way to the image's file, and to where guest clusters are.
#[derive(Clone)]
pub(super) struct Io {
    pub(super) local: Local,
    /// The image's file: tables, and guest clusters as a rule.
    pub(super) file: Rc<dyn Channel>,
    /// Guest clusters: the same, an external data file, or what encrypts one of these.
    pub(super) data: Rc<dyn Channel>,
    /// Whether guest clusters are in another file.
    pub(super) apart: bool,
}

/// What the channels of an image lead to.
pub(super) struct Files<'a> {
    pub(super) backend: &'a Arc<Backend>,
    pub(super) data_file: Option<&'a Arc<dyn Session>>,
    pub(super) encrypted: Option<&'a Arc<Encrypted>>,
}

impl Io {
    /// Channels to these files on this thread; `owner` keeps them open.
    pub(super) fn new(files: &Files<'_>, local: &Local, owner: Guard) -> Result<Io> {
        let file: Rc<dyn Channel> = files.backend.clone().channel(local, owner);
        let plain = match files.data_file {
            Some(data) => data.clone().channel(local)?,
            None => file.clone(),
        };
        let data = files.encrypted.map_or(plain.clone(), |encrypted| encrypted.channel(plain, local));
        Ok(Io { local: local.clone(), file, data, apart: files.data_file.is_some() })
    }
}

/// Bytes that were read.
pub(super) struct Bytes(Arc<Buffer>);

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: made when the read has ended, and the buffer is given to nobody afterwards.
        unsafe { self.0.bytes() }
    }
}

impl Bytes {
    /// The buffer that they are in.
    pub(super) fn into_buffer(self) -> Buffer {
        // The request, which held it too, is gone as a rule.
        Arc::try_unwrap(self.0).unwrap_or_else(|shared| {
            let mut copy = Buffer::new(shared.len());
            // SAFETY: as for looking into them.
            copy.bytes_mut().copy_from_slice(unsafe { shared.bytes() });
            copy
        })
    }
}

impl Io {
    /// Reads so many bytes of the image's file.
    pub(super) async fn read(&self, offset: u64, len: usize) -> Result<Bytes> {
        self.start_read(offset, Buffer::new(len)).await
    }

    /// Starts to fill a buffer from the image's file.
    pub(super) fn start_read(
        &self,
        offset: u64,
        buffer: Buffer,
    ) -> impl Future<Output = Result<Bytes>> + use<> {
        let buffer = Arc::new(buffer);
        let read = Ask::transfer(Operation::Read, offset, vec![buffer.whole()], Some(buffer.clone()));
        let answer = ask(&self.file, read, self.local.now());
        async move { answer.await.map(|_| Bytes(buffer)) }
    }

    /// Starts to write a buffer to the image's file. `keep` lives until that has ended, whoever waits for it.
    pub(super) fn write(
        &self,
        offset: u64,
        buffer: Buffer,
        keep: Guard,
    ) -> impl Future<Output = Result<()>> + use<> {
        let buffer = Arc::new(buffer);
        let memory = vec![buffer.whole()];
        let guard: Guard = Arc::new((buffer, keep));
        self.transfer(&self.file, Operation::Write, offset, memory, Some(guard))
    }

    /// Starts a read or write on a channel.
    pub(super) fn transfer(
        &self,
        channel: &Rc<dyn Channel>,
        operation: Operation,
        offset: u64,
        memory: Vec<IoVec>,
        guard: Option<Guard>,
    ) -> impl Future<Output = Result<()>> + use<> {
        let answer = ask(channel, Ask::transfer(operation, offset, memory, guard), self.local.now());
        async move { answer.await.map(drop) }
    }

    /// Starts an operation without memory on a channel.
    pub(super) fn plain(
        &self,
        channel: &Rc<dyn Channel>,
        operation: Operation,
        (offset, len): (u64, u64),
        flags: Flags,
    ) -> impl Future<Output = Result<()>> + use<> {
        let answer = ask(channel, Ask { flags, ..Ask::new(operation, offset, len) }, self.local.now());
        async move { answer.await.map(drop) }
    }

    /// Makes all that has been written durable: guest data first known to be so with the tables that need it.
    pub(super) async fn sync(&self) -> Result<()> {
        let flush = |channel| self.plain(channel, Operation::Flush, (0, 0), Flags::default());
        if !self.apart {
            return flush(&self.file).await;
        }
        let (data, file) = (flush(&self.data), flush(&self.file));
        let (data, file) = (data.await, file.await);
        data.and(file)
    }

    /// Makes a range of guest clusters read as zeroes and gives its space back; false where the storage cannot.
    pub(super) async fn punch(&self, offset: u64, len: u64) -> Result<bool> {
        let flags = Flags { may_unmap: true, fast_only: true, ..Flags::default() };
        match self.plain(&self.file, Operation::WriteZeroes, (offset, len), flags).await {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// One of several operations that are under way.
pub(super) type Part = Pin<Box<dyn Future<Output = Result<()>>>>;

/// Waits for all of them, whatever happens: what one of them writes to or reads from is in use until it has ended.
pub(super) async fn all<F: Future<Output = Result<()>>>(parts: Vec<F>) -> Result<()> {
    let mut result = Ok(());
    for part in parts {
        let outcome = part.await;
        if result.is_ok() {
            result = outcome;
        }
    }
    result
}

/// The most bytes of tables that are read or written at once.
pub(super) const MOST_AT_ONCE: usize = 8 << 20;

type Operating<T> = Pin<Box<dyn Future<Output = Result<T>>>>;

/// Operations that were begun one after the other and are awaited in that order, so many bytes at once.
pub(super) struct Queue<T> {
    under_way: VecDeque<(usize, Operating<T>)>,
    bytes: usize,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Queue { under_way: VecDeque::new(), bytes: 0 }
    }
}

impl<T> Queue<T> {
    /// Whether one of so many bytes may begin now.
    pub(super) fn has_room(&self, len: usize) -> bool {
        self.under_way.is_empty() || self.bytes + len <= MOST_AT_ONCE
    }

    /// Adds one that has begun.
    pub(super) fn push(&mut self, len: usize, operation: impl Future<Output = Result<T>> + 'static) {
        self.bytes += len;
        self.under_way.push_back((len, Box::pin(operation)));
    }

    /// Waits for the first of them, if there is one.
    pub(super) async fn next(&mut self) -> Option<Result<T>> {
        let (_, operation) = self.under_way.front_mut()?;
        let result = operation.await;
        if let Some((len, _)) = self.under_way.pop_front() {
            self.bytes -= len;
        }
        Some(result)
    }
}

/// Writes, so many bytes at once. Whoever has begun some waits for their [end](Self::end), whatever happens.
#[derive(Default)]
pub(super) struct Writes {
    queue: Queue<()>,
    failure: Option<Error>,
}

impl Writes {
    /// Starts a write of so many bytes, when there is room for it.
    pub(super) async fn add<F>(&mut self, len: usize, start: impl FnOnce() -> F)
    where
        F: Future<Output = Result<()>> + 'static,
    {
        while !self.queue.has_room(len) {
            self.wait().await;
        }
        self.queue.push(len, start());
    }

    /// Waits until all have ended.
    pub(super) async fn end(mut self) -> Result<()> {
        while self.wait().await {}
        self.failure.map_or(Ok(()), Err)
    }

    async fn wait(&mut self) -> bool {
        let Some(result) = self.queue.next().await else { return false };
        if let Err(error) = result {
            self.failure.get_or_insert(error);
        }
        true
    }
}

/// Works on several tasks at the same time, until all have ended.
pub(super) async fn together<F: Future<Output = Result<()>>>(tasks: Vec<F>) -> Result<()> {
    let mut tasks: Vec<Pin<Box<F>>> = tasks.into_iter().map(Box::pin).collect();
    let mut result = Ok(());
    poll_fn(move |context| {
        tasks.retain_mut(|task| match task.as_mut().poll(context) {
            Poll::Pending => true,
            Poll::Ready(outcome) => {
                if result.is_ok() {
                    result = outcome;
                }
                false
            }
        });
        if tasks.is_empty() { Poll::Ready(std::mem::replace(&mut result, Ok(()))) } else { Poll::Pending }
    })
    .await
}

/// An error of the image's structures.
pub(super) fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

/// A number of bytes as memory counts them.
pub(super) fn bytes(len: u64) -> usize {
    usize::try_from(len).expect("a 64-bit host")
}
