//! Messages of observer and of its programs while the view has the terminal: they wait until it is given back, and the
//! latest is shown in the view.

use std::{
    io::{self, Write, stderr},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::sanitize::clean_lines;

/// Bytes that wait at most; beyond that messages are only counted.
const MOST: usize = 64 * 1024;

static HELD: Mutex<Held> = Mutex::new(Held { text: Vec::new(), lost: 0 });

/// Whether messages wait. A panic may interrupt whoever has the lock, and has to find out.
static ARE_HELD: AtomicBool = AtomicBool::new(false);

struct Held {
    text: Vec<u8>,
    /// Messages for which there was no room.
    lost: usize,
}

/// Standard error, but for the time while the view has the terminal.
pub(crate) struct Messages;

impl Write for Messages {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let clean = clean_lines(&String::from_utf8_lossy(text));
        if are_held() {
            held().add(clean.as_bytes());
        } else {
            stderr().write_all(clean.as_bytes())?;
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        stderr().flush()
    }
}

impl Held {
    fn add(&mut self, text: &[u8]) {
        if self.text.len() + text.len() > MOST {
            self.lost += 1;
        } else {
            self.text.extend_from_slice(text);
        }
    }

    fn latest(&self) -> Option<String> {
        let last = self.text.trim_ascii_end().rsplit(|byte| *byte == b'\n').next()?;
        (!last.is_empty()).then(|| String::from_utf8_lossy(last).into_owned())
    }
}

/// The latest message that waits.
pub(super) fn latest() -> Option<String> {
    held().latest()
}

/// Has messages wait: what is written from now on would be written into the view.
pub(super) fn hold() {
    ARE_HELD.store(true, Ordering::SeqCst);
}

/// Whether messages wait.
pub(super) fn are_held() -> bool {
    ARE_HELD.load(Ordering::SeqCst)
}

/// Has messages wait no longer. Tells whether they did.
pub(super) fn stop_holding() -> bool {
    ARE_HELD.swap(false, Ordering::SeqCst)
}

/// Writes what has waited.
pub(super) fn release() {
    let Held { text, lost } = std::mem::replace(&mut *held(), Held { text: Vec::new(), lost: 0 });
    // Where standard error is gone, nobody wants it.
    let _told = stderr().write_all(&text);
    if lost > 0 {
        let _told = writeln!(stderr(), "and {lost} more messages for which there was no room");
    }
}

fn held() -> MutexGuard<'static, Held> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_wait_within_bounds() {
        let mut held = Held { text: Vec::new(), lost: 0 };
        assert_eq!(held.latest(), None);
        held.add(b"[WARN] one\n");
        held.add(b"[WARN] two\n");
        assert_eq!(held.latest().as_deref(), Some("[WARN] two"));
        held.add(&[b'x'; MOST]);
        assert_eq!((held.lost, held.text.len()), (1, 22));
    }
}
