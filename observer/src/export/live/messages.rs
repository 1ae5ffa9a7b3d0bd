//! Buffers log messages while the view has the terminal, and writes them when the terminal is released. The view shows the
//! latest one.

use std::{
    io::{self, Write, stderr},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::sanitize::clean_lines;

/// Maximum size of the buffer in bytes; messages beyond it are discarded and counted.
const MAX_BYTES: usize = 64 * 1024;

static BUFFER: Mutex<Buffer> = Mutex::new(Buffer { text: Vec::new(), discarded: 0 });

/// Whether messages are buffered. Not behind the lock: the panic hook reads it, and the panicking thread may hold the lock.
static IS_BUFFERING: AtomicBool = AtomicBool::new(false);

struct Buffer {
    text: Vec<u8>,
    /// Number of messages that did not fit.
    discarded: usize,
}

/// A writer to standard error, or to the buffer while the view has the terminal.
pub(crate) struct Messages;

impl Write for Messages {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let clean = clean_lines(&String::from_utf8_lossy(text));
        if is_buffering() {
            buffer().add(clean.as_bytes());
        } else {
            stderr().write_all(clean.as_bytes())?;
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        stderr().flush()
    }
}

impl Buffer {
    fn add(&mut self, text: &[u8]) {
        if self.text.len() + text.len() > MAX_BYTES {
            self.discarded += 1;
        } else {
            self.text.extend_from_slice(text);
        }
    }

    fn latest(&self) -> Option<String> {
        let last = self.text.trim_ascii_end().rsplit(|byte| *byte == b'\n').next()?;
        (!last.is_empty()).then(|| String::from_utf8_lossy(last).into_owned())
    }
}

/// The latest message in the buffer.
pub(super) fn latest() -> Option<String> {
    buffer().latest()
}

/// Starts buffering: from now on output to the terminal would damage the view.
pub(super) fn start_buffering() {
    IS_BUFFERING.store(true, Ordering::SeqCst);
}

/// Whether messages are buffered.
pub(super) fn is_buffering() -> bool {
    IS_BUFFERING.load(Ordering::SeqCst)
}

/// Stops buffering. Returns whether messages were buffered until now.
pub(super) fn stop_buffering() -> bool {
    IS_BUFFERING.swap(false, Ordering::SeqCst)
}

/// Writes the buffered messages to standard error.
pub(super) fn flush() {
    let Buffer { text, discarded } =
        std::mem::replace(&mut *buffer(), Buffer { text: Vec::new(), discarded: 0 });
    // Standard error may be closed; then there is nowhere to report that.
    let _written = stderr().write_all(&text);
    if discarded > 0 {
        let _written = writeln!(stderr(), "{discarded} more messages were discarded: the buffer was full");
    }
}

fn buffer() -> MutexGuard<'static, Buffer> {
    BUFFER.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_beyond_the_limit_are_counted() {
        let mut buffer = Buffer { text: Vec::new(), discarded: 0 };
        assert_eq!(buffer.latest(), None);
        buffer.add(b"[WARN] one\n");
        buffer.add(b"[WARN] two\n");
        assert_eq!(buffer.latest().as_deref(), Some("[WARN] two"));
        buffer.add(&[b'x'; MAX_BYTES]);
        assert_eq!((buffer.discarded, buffer.text.len()), (1, 22));
    }
}
