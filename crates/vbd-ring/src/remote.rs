//! Objects that live on a reactor's thread, reached from other threads by their number.

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sync::thread_local;
use crate::{Handle, Local};

thread_local! {
    /// The objects of this thread; none where one is being made.
    static OBJECTS: RefCell<HashMap<u64, Option<Rc<dyn Any>>>> = RefCell::default();
}

/// An object's place on the thread where it lives.
#[derive(Debug)]
pub struct Place {
    id: u64,
    /// It means nothing on another thread.
    _stays: PhantomData<*const ()>,
}

impl Place {
    /// Gives the place up: the object is not reached any more, and lives only as long as others hold it.
    pub fn leave(&self) {
        forget(self.id);
    }
}

fn forget(id: u64) {
    // Where the thread ends, the table goes with all that is in it.
    let object = OBJECTS.try_with(|objects| objects.borrow_mut().remove(&id));
    // Not before the table can be used again: the object's end may make use of it.
    drop(object);
}

/// An object on a reactor's thread, as seen from other threads.
pub struct Remote<T> {
    handle: Handle,
    id: u64,
    _object: PhantomData<fn() -> T>,
}

impl<T> Clone for Remote<T> {
    fn clone(&self) -> Self {
        Remote { handle: self.handle.clone(), id: self.id, _object: PhantomData }
    }
}

impl<T: 'static> Remote<T> {
    /// Makes an object on a reactor's thread. It is kept there until it [leaves](Place::leave) its place, or the thread
    /// ends. Must not be called on a reactor's thread.
    ///
    /// # Errors
    /// That of `make`, or that the reactor has ended.
    pub fn new(
        handle: &Handle,
        make: impl FnOnce(&Local, Place) -> Result<Rc<T>, String> + Send + 'static,
    ) -> Result<Self, String> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let made: Option<Result<(), String>> = handle.call(move |local| {
            OBJECTS.with(|objects| objects.borrow_mut().insert(id, None));
            let place = Place { id, _stays: PhantomData };
            let object = make(local, place).inspect_err(|_| forget(id))?;
            OBJECTS.with(|objects| {
                // One that has left already stays away.
                if let Some(place) = objects.borrow_mut().get_mut(&id) {
                    *place = Some(object.clone());
                }
            });
            Ok(())
        });
        made.unwrap_or_else(|| Err("the reactor has ended".into()))?;
        Ok(Remote { handle: handle.clone(), id, _object: PhantomData })
    }

    /// Runs `work` with the object and waits for its answer; none if the object is gone. Must not be called on a
    /// reactor's thread.
    pub fn with<A: Send + 'static>(&self, work: impl FnOnce(&Rc<T>) -> A + Send + 'static) -> Option<A> {
        let id = self.id;
        self.handle.call(move |_| find(id).map(|object| work(&object)))?
    }

    /// Runs `work` with the object, soon, if it is still there.
    pub fn post(&self, work: impl FnOnce(&Rc<T>) + Send + 'static) {
        let id = self.id;
        self.handle.post(move |_| {
            if let Some(object) = find(id) {
                work(&object);
            }
        });
    }
}

fn find<T: 'static>(id: u64) -> Option<Rc<T>> {
    let object = OBJECTS.with(|objects| objects.borrow().get(&id).cloned())??;
    object.downcast().ok()
}
