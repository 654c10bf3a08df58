//! All connections of one guest: names, turns, deadlines, and the budget of promised buffers.
//!
//! A [`Token`] names an entry for epoll and for the queue of turns; it dies with the entry, so that a late event finds nothing instead of
//! a stranger. Nothing here grows beyond a small multiple of [`limits::CONNECTIONS`], whatever guest and host do.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::connection::{Connection, Key};
use crate::limits;

/// Names one entry for its lifetime: the slot in the low 32 bits, its generation in the high ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

impl Token {
    fn new(index: u32, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | u64::from(index))
    }

    fn index(self) -> usize {
        usize::try_from(self.0 & u64::from(u32::MAX)).unwrap_or(usize::MAX)
    }
}

/// What an entry is.
#[derive(Debug)]
pub enum Entry {
    /// A program of the host that has not sent its line yet.
    Handshake(UnixStream),
    /// A connection in any phase.
    Connection(Box<Connection>),
}

impl Entry {
    /// The host's stream, if there is one still.
    pub fn stream(&self) -> Option<&UnixStream> {
        match self {
            Self::Handshake(stream) => Some(stream),
            Self::Connection(connection) => connection.stream(),
        }
    }
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    entry: Option<Entry>,
    /// Does `turns` hold its token?
    queued: bool,
    deadline: Option<Instant>,
    /// Was epoll asked for writability?
    writable_wanted: bool,
}

/// The connections of one guest.
#[derive(Debug, Default)]
pub struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    count: usize,
    by_key: HashMap<Key, Token>,
    turns: VecDeque<Token>,
    deadlines: BTreeSet<(Instant, Token)>,
    promised_bytes: u64,
}

impl Table {
    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// How many bytes of buffers are promised to the guest.
    pub fn promised_bytes(&self) -> u64 {
        self.promised_bytes
    }

    /// Whether another entry fits.
    pub fn has_room(&self) -> bool {
        self.count < limits::CONNECTIONS
    }

    /// The size in bytes of the buffer that a new connection is promised.
    pub fn buffer_for_next(&self) -> u32 {
        let share = limits::BUFFER_BUDGET_BYTES.saturating_sub(self.promised_bytes) / limits::BUFFER_BUDGET_SHARE;
        u32::try_from(share).unwrap_or(u32::MAX).clamp(limits::BUFFER_BYTES_MIN, limits::BUFFER_BYTES)
    }

    /// Takes an entry in; `None` if the table is full.
    pub fn insert(&mut self, entry: Entry) -> Option<Token> {
        if !self.has_room() {
            return None;
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let index = u32::try_from(self.slots.len()).ok()?;
                self.slots.push(Slot::default());
                index
            }
        };
        let slot = self.slots.get_mut(usize::try_from(index).ok()?)?;
        let token = Token::new(index, slot.generation);
        slot.entry = Some(entry);
        self.count += 1;
        self.account(token);
        Some(token)
    }

    /// Books name and buffer of a new connection.
    fn account(&mut self, token: Token) {
        if let Some((key, bytes)) = self.connection(token).map(|connection| (connection.key(), connection.buffer_bytes())) {
            self.by_key.insert(key, token);
            self.promised_bytes += u64::from(bytes);
        }
    }

    fn slot(&self, token: Token) -> Option<&Slot> {
        let slot = self.slots.get(token.index())?;
        let index = u32::try_from(token.index()).ok()?;
        (Token::new(index, slot.generation) == token && slot.entry.is_some()).then_some(slot)
    }

    fn slot_mut(&mut self, token: Token) -> Option<&mut Slot> {
        self.slot(token)?;
        self.slots.get_mut(token.index())
    }

    /// The entry of a token, if it lives.
    pub fn entry(&self, token: Token) -> Option<&Entry> {
        self.slot(token)?.entry.as_ref()
    }

    /// The connection of a token, if it lives and is one.
    pub fn connection(&self, token: Token) -> Option<&Connection> {
        match self.entry(token)? {
            Entry::Connection(connection) => Some(connection),
            Entry::Handshake(_) => None,
        }
    }

    /// The connection of a token for changes.
    pub fn connection_mut(&mut self, token: Token) -> Option<&mut Connection> {
        match self.slot_mut(token)?.entry.as_mut()? {
            Entry::Connection(connection) => Some(connection),
            Entry::Handshake(_) => None,
        }
    }

    /// The token of a name.
    pub fn find(&self, key: Key) -> Option<Token> {
        self.by_key.get(&key).copied()
    }

    /// Every live connection.
    pub fn connections(&self) -> impl Iterator<Item = &Connection> {
        self.slots.iter().filter_map(|slot| match &slot.entry {
            Some(Entry::Connection(connection)) => Some(&**connection),
            _ => None,
        })
    }

    /// Frees the name of a connection that the guest let go, while the entry still drains.
    pub fn forget_key(&mut self, token: Token) {
        let Some(key) = self.connection(token).map(Connection::key) else { return };
        if self.by_key.get(&key) == Some(&token) {
            self.by_key.remove(&key);
        }
    }

    /// Takes an entry out; its token is dead from now on.
    pub fn remove(&mut self, token: Token) -> Option<Entry> {
        self.set_deadline(token, None);
        self.forget_key(token);
        let slot = self.slot_mut(token)?;
        let entry = slot.entry.take()?;
        *slot = Slot { generation: slot.generation.wrapping_add(1), ..Slot::default() };
        self.count -= 1;
        if let Ok(index) = u32::try_from(token.index()) {
            self.free.push(index);
        }
        if let Entry::Connection(connection) = &entry {
            self.promised_bytes -= u64::from(connection.buffer_bytes());
        }
        if self.turns.len() > 2 * limits::CONNECTIONS {
            let mut turns = std::mem::take(&mut self.turns);
            turns.retain(|token| self.slot(*token).is_some());
            self.turns = turns;
        }
        Some(entry)
    }

    /// Takes everything out.
    pub fn clear(&mut self) -> Vec<Entry> {
        self.by_key.clear();
        self.turns.clear();
        self.deadlines.clear();
        self.promised_bytes = 0;
        self.count = 0;
        self.free.clear();
        let mut entries = Vec::new();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            entries.extend(slot.entry.take());
            *slot = Slot { generation: slot.generation.wrapping_add(1), ..Slot::default() };
            self.free.extend(u32::try_from(index));
        }
        entries
    }

    /// Gives a connection a turn at the guest's buffers, at the end of the queue, if it has none yet.
    pub fn queue(&mut self, token: Token) {
        if let Some(slot) = self.slot_mut(token).filter(|slot| !slot.queued) {
            slot.queued = true;
            self.turns.push_back(token);
        }
    }

    /// Whether anyone waits for a turn.
    pub fn has_turns(&self) -> bool {
        !self.turns.is_empty()
    }

    /// Whose turn is it? The token leaves the queue.
    pub fn next_turn(&mut self) -> Option<Token> {
        while let Some(token) = self.turns.pop_front() {
            if let Some(slot) = self.slot_mut(token) {
                slot.queued = false;
                return Some(token);
            }
        }
        None
    }

    /// Sets or clears the time at which [`expired`](Self::expired) gives the entry.
    pub fn set_deadline(&mut self, token: Token, deadline: Option<Instant>) {
        let Some(slot) = self.slot_mut(token) else { return };
        let old = std::mem::replace(&mut slot.deadline, deadline);
        if let Some(old) = old {
            self.deadlines.remove(&(old, token));
        }
        if let Some(new) = deadline {
            self.deadlines.insert((new, token));
        }
    }

    /// Whether a deadline is set.
    pub fn has_deadline(&self, token: Token) -> bool {
        self.slot(token).is_some_and(|slot| slot.deadline.is_some())
    }

    /// The time at which the next entry expires.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// An entry whose deadline is not after `now`, with the deadline cleared.
    pub fn expired(&mut self, now: Instant) -> Option<Token> {
        let (deadline, token) = *self.deadlines.first()?;
        if deadline > now {
            return None;
        }
        self.set_deadline(token, None);
        Some(token)
    }

    /// Notes whether epoll is to tell about writability; `true` if that is a change.
    pub fn writable_changes(&mut self, token: Token, wanted: bool) -> bool {
        self.slot_mut(token).is_some_and(|slot| std::mem::replace(&mut slot.writable_wanted, wanted) != wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handshake() -> Entry {
        Entry::Handshake(UnixStream::pair().unwrap().0)
    }

    #[test]
    fn buffers_shrink_as_the_budget_is_promised_away_but_never_below_the_minimum() {
        let mut table = Table::default();
        let mut sizes = Vec::new();
        for _ in 0..limits::CONNECTIONS {
            let bytes = table.buffer_for_next();
            table.promised_bytes += u64::from(bytes);
            sizes.push(bytes);
        }
        assert_eq!(
            (sizes[0], sizes[100], sizes.last().copied()),
            (limits::BUFFER_BYTES, limits::BUFFER_BYTES, Some(limits::BUFFER_BYTES_MIN))
        );
        assert!(sizes.is_sorted_by(|a, b| a >= b));
        let most = limits::BUFFER_BUDGET_BYTES + limits::CONNECTIONS as u64 * u64::from(limits::BUFFER_BYTES_MIN);
        assert!(table.promised_bytes <= most);
    }

    #[test]
    fn a_token_dies_with_its_entry_even_when_the_slot_is_used_again() {
        let mut table = Table::default();
        let first = table.insert(handshake()).unwrap();
        table.queue(first);
        table.set_deadline(first, Some(Instant::now()));
        table.remove(first).unwrap();
        let second = table.insert(handshake()).unwrap();

        assert_ne!(first, second);
        assert!(table.entry(first).is_none());
        assert_eq!(table.next_turn(), None);
        assert_eq!(table.next_deadline(), None);
        assert!(table.remove(first).is_none());
        assert!(table.entry(second).is_some());
    }

    #[test]
    fn turns_of_the_dead_do_not_pile_up() {
        let mut table = Table::default();
        for _ in 0..10 * limits::CONNECTIONS {
            let token = table.insert(handshake()).unwrap();
            table.queue(token);
            table.remove(token);
        }
        assert!(table.turns.len() <= 2 * limits::CONNECTIONS + 1);
    }

    #[test]
    fn the_table_has_an_end() {
        let mut table = Table { count: limits::CONNECTIONS, ..Table::default() };
        assert!(table.insert(handshake()).is_none());
    }
}
