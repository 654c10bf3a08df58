//! Those who read an enclave's console while it runs.
//!
//! Each has a thread that copies from the ring to a socket. A reader that does not read blocks its own thread and nothing else; how many there may
//! be is bounded by whoever starts them.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nitroxide_world::Listener;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::console::Console;

/// How much a reader is given at a time, in bytes.
const PIECE_BYTES: usize = 64 << 10;

/// How often a thread that waits for output looks whether its reader is still there.
const LOOK: Duration = Duration::from_millis(500);

/// How many readers a console listener serves at a time.
const MOST_READERS: usize = 16;

/// Copies the console from its oldest byte to `write`: up to what is there now or, with `until_end`, up to its end.
///
/// # Errors
///
/// What `write` gave; `BrokenPipe` when `reader` has hung up while there was nothing to write.
pub(crate) fn copy(
    console: &Console,
    reader: &UnixStream,
    until_end: bool,
    mut write: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    // Without following, a guest that prints faster than its reader reads would keep the reader for ever.
    let goal = if until_end { u64::MAX } else { console.position() };
    let mut position = 0;
    while position < goal {
        let limit = usize::try_from(goal - position).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        let piece = console.read(position, limit, if until_end { LOOK } else { Duration::ZERO });
        position = piece.next_position();
        if !piece.bytes.is_empty() {
            write(&piece.bytes)?;
        } else if !until_end {
            return Ok(());
        } else if !piece.ended && has_hung_up(reader) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if piece.ended {
            return Ok(());
        }
    }
    Ok(())
}

/// Whether the other end of a connection is gone.
pub(crate) fn has_hung_up(stream: &UnixStream) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::empty())];
    // HUP and ERR are reported without being asked for.
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}

/// Serves the raw console to whoever connects to `listener`, as CID 0 does on EC2, until the listener is shut down.
pub(crate) fn serve(listener: &Listener, console: &Arc<Console>, active: &Arc<AtomicUsize>) {
    while let Some(mut reader) = next_connection(|| listener.accept().map(|(stream, _)| stream)) {
        let more = |readers| (readers < MOST_READERS).then_some(readers + 1);
        if active.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_err() {
            continue; // Closing it is the refusal.
        }
        let (console, count) = (Arc::clone(console), Arc::clone(active));
        let started = std::thread::Builder::new().name("console-reader".to_owned()).spawn(move || {
            if let Ok(writer) = reader.try_clone() {
                let _gone = copy(&console, &writer, true, |bytes| reader.write_all(bytes));
            }
            count.fetch_sub(1, Ordering::Relaxed);
        });
        if started.is_err() {
            active.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Accepts until the listener is shut down (`None`); passes over what goes wrong with single connections.
pub(crate) fn next_connection(mut accept: impl FnMut() -> io::Result<UnixStream>) -> Option<UnixStream> {
    loop {
        match accept() {
            Ok(stream) => return Some(stream),
            // shutdown() of a listening UNIX socket makes accept() answer EINVAL (unix_accept() in net/unix/af_unix.c).
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return None,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::warn!(%error, "A connection could not be accepted.");
                // Out of file descriptors, most likely: without a pause this would spin.
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_reader_that_does_not_read_holds_up_neither_guest_nor_other_readers() {
        let console = Arc::new(Console::default());
        let (stuck, other) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        std::thread::scope(|scope| {
            for (mut server, _) in [&stuck, &other].map(|(a, b)| (a.try_clone().unwrap(), b)) {
                let console = &console;
                scope.spawn(move || {
                    let reader = server.try_clone().unwrap();
                    let _ = copy(console, &reader, true, |bytes| server.write_all(bytes));
                    server.shutdown(std::net::Shutdown::Both).unwrap();
                });
            }
            console.push(b"begin");
            let mut begin = [0; 5];
            (&other.1).read_exact(&mut begin).unwrap();
            for _ in 0..64 {
                console.push(&[b'x'; 64 << 10]); // Four times what the ring keeps: this returns, whoever reads.
            }
            console.end();
            let mut rest = Vec::new();
            (&other.1).read_to_end(&mut rest).unwrap();
            assert!(rest.len() >= crate::console::RING_BYTES && rest.iter().all(|byte| *byte == b'x'));
            stuck.1.shutdown(std::net::Shutdown::Both).unwrap();
        });
    }

    #[test]
    fn without_following_only_what_is_there_is_copied() {
        let console = Console::default();
        console.push(b"now");
        let (server, _client) = UnixStream::pair().unwrap();
        let mut copied = Vec::new();
        copy(&console, &server, false, |bytes| {
            copied.extend_from_slice(bytes);
            Ok(())
        })
        .unwrap();
        assert_eq!(copied, b"now");
    }

    #[test]
    fn without_following_a_guest_that_goes_on_printing_does_not_keep_its_reader() {
        let console = Console::default();
        console.push(b"now");
        let (server, _client) = UnixStream::pair().unwrap();
        let mut copied = Vec::new();
        copy(&console, &server, false, |bytes| {
            copied.extend_from_slice(bytes);
            console.push(b"more"); // Faster than the reader, always.
            if copied.len() > 1000 { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
        })
        .unwrap();
        assert_eq!(copied, b"now");
    }

    #[test]
    fn a_reader_that_left_ends_its_copying() {
        let console = Console::default();
        let (server, client) = UnixStream::pair().unwrap();
        drop(client);
        assert!(copy(&console, &server, true, |_| Ok(())).is_err());
    }
}
