//! A bounded queue whose blocking ends can look up now and then, so that Ctrl-C is noticed.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

struct State<T> {
    items: VecDeque<T>,
    closed: bool,
    unfinished: usize,
}

/// Work items between one producer and several workers.
pub struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    capacity: usize,
}

impl<T> Queue<T> {
    /// An open queue that holds up to `capacity` waiting items.
    pub fn new(capacity: usize) -> Queue<T> {
        let state = State { items: VecDeque::new(), closed: false, unfinished: 0 };
        Queue { state: Mutex::new(state), changed: Condvar::new(), capacity }
    }

    /// Puts an item in and returns how many are unfinished; gives it back if there is still no room
    /// after `patience`.
    pub fn push(&self, item: T, patience: Duration) -> Result<usize, T> {
        let full = |state: &mut State<T>| state.items.len() >= self.capacity && !state.closed;
        let (mut state, _) = self
            .changed
            .wait_timeout_while(self.lock(), patience, full)
            .unwrap_or_else(PoisonError::into_inner);
        if state.items.len() >= self.capacity && !state.closed {
            return Err(item);
        }
        state.items.push_back(item);
        state.unfinished += 1;
        self.changed.notify_all();
        Ok(state.unfinished)
    }

    /// Takes the next item; `None` once the queue is closed and empty.
    pub fn pop(&self) -> Option<T> {
        let empty = |state: &mut State<T>| state.items.is_empty() && !state.closed;
        let mut state = self.changed.wait_while(self.lock(), empty).unwrap_or_else(PoisonError::into_inner);
        let item = state.items.pop_front();
        self.changed.notify_all();
        item
    }

    /// Says that an item taken earlier is done.
    pub fn finish_one(&self) {
        self.lock().unfinished -= 1;
        self.changed.notify_all();
    }

    /// Lets the workers end once the waiting items are taken.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Drops the waiting items and closes the queue.
    pub fn abandon(&self) {
        let mut state = self.lock();
        state.unfinished -= state.items.len();
        state.items.clear();
        state.closed = true;
        self.changed.notify_all();
    }

    /// Waits until every item is done; false if that takes longer than `patience`.
    pub fn wait_idle(&self, patience: Duration) -> bool {
        let busy = |state: &mut State<T>| state.unfinished > 0;
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), patience, busy)
            .unwrap_or_else(PoisonError::into_inner);
        state.unfinished == 0
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
