//! What waits to be sent: encoded requests in a buffer of limited size, and the task that delivers them one after the
//! other. Whoever has something to send never waits; what there is no room for is dropped, the oldest first, and counted.

use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    select,
    sync::Notify,
    task::JoinHandle,
    time::{Instant, sleep_until, timeout_at},
};

use super::{
    signal::{Batch, Signal},
    transport::{Problem, Transport},
};
use crate::model::delivery::{ExportStats, Reason};

/// Most bytes that wait.
pub(crate) const BUFFER: usize = 16 << 20;

/// How long to wait after the first failure and at most; each wait is between half of that and the whole.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The buffer of one signal, and its way out.
pub(super) struct Queue {
    shared: Arc<Shared>,
    sender: JoinHandle<()>,
}

struct Shared {
    state: Mutex<State>,
    /// Something has come, or the end.
    news: Notify,
    stats: Arc<ExportStats>,
    /// Who is to be told apart in messages.
    signal: &'static str,
    transport: Transport,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Batch>,
    bytes: usize,
    /// Items of the batch that is being sent.
    in_hand: u64,
    /// When all has to be over.
    end: Option<Instant>,
}

impl Queue {
    /// Begins to deliver.
    pub(super) fn start<S: Signal>(transport: Transport, stats: Arc<ExportStats>) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            news: Notify::new(),
            stats,
            signal: S::NAME,
            transport,
        });
        let sender = tokio::spawn(deliver::<S>(Arc::clone(&shared)));
        Self { shared, sender }
    }

    /// Takes something to be delivered.
    pub(super) fn push(&self, batch: Batch) {
        let lost = self.shared.lock().push(batch);
        if lost > 0 {
            self.shared.stats.dropped(Reason::BufferFull, lost);
        }
        self.shared.news.notify_one();
    }

    /// Delivers what is left, but only until then.
    pub(super) async fn drain(&mut self, end: Instant) {
        self.shared.lock().end = Some(end);
        self.shared.news.notify_one();
        let _in_time = timeout_at(end, &mut self.sender).await;
    }

    /// Delivers no more; returns how many items are left.
    pub(super) fn give_up(self) -> u64 {
        self.sender.abort();
        let state = self.shared.lock();
        state.in_hand + state.waiting.iter().map(|batch| batch.items).sum::<u64>()
    }
}

impl State {
    /// Returns how many items had to make room.
    fn push(&mut self, batch: Batch) -> u64 {
        self.bytes += batch.bytes.len();
        self.waiting.push_back(batch);
        let mut lost = 0;
        while self.bytes > BUFFER && self.waiting.len() > 1 {
            lost += self.pop().map_or(0, |batch| batch.items);
        }
        lost
    }

    fn pop(&mut self) -> Option<Batch> {
        let batch = self.waiting.pop_front()?;
        self.bytes -= batch.bytes.len();
        Some(batch)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next one to be sent; `None` when there will be no more.
    async fn next(&self) -> Option<Batch> {
        loop {
            {
                let mut state = self.lock();
                if let Some(batch) = state.pop() {
                    state.in_hand = batch.items;
                    return Some(batch);
                }
                if state.end.is_some() {
                    return None;
                }
            }
            self.news.notified().await;
        }
    }

    /// Waits so long, or until the end comes if that may cut it short; returns whether there is time for another attempt.
    async fn pause(&self, pause: Duration, may_be_cut: bool) -> bool {
        let until = Instant::now() + pause;
        loop {
            let end = self.lock().end;
            if let Some(end) = end {
                return may_be_cut || (until < end && timeout_at(end, sleep_until(until)).await.is_ok());
            }
            select! {
                () = sleep_until(until) => return true,
                () = self.news.notified() => {}
            }
        }
    }
}

/// Delivers until the end.
async fn deliver<S: Signal>(shared: Arc<Shared>) {
    let mut warned = Warned { shared: &shared, is_in_trouble: false };
    while let Some(batch) = shared.next().await {
        let mut longest = FIRST_PAUSE;
        loop {
            let begun_at_the_end = shared.lock().end.is_some();
            match shared.transport.send::<S>(batch.bytes.clone()).await {
                Ok(rejected) => {
                    let lost = rejected.items.min(batch.items);
                    shared.stats.delivered(batch.items - lost);
                    if lost > 0 {
                        shared.stats.dropped(Reason::Refused, lost);
                        warned.of(&format!("{lost} of {} refused: {}", batch.items, rejected.why));
                    } else {
                        warned.over();
                    }
                    break;
                }
                Err(problem) => {
                    shared.stats.failed();
                    let (why, after) = match problem {
                        Problem::Never { why } => {
                            shared.stats.dropped(Reason::Refused, batch.items);
                            warned.of(&format!("refused: {why}"));
                            break;
                        }
                        // Nobody comes back within the time that is left.
                        Problem::Unreachable { why } if begun_at_the_end => {
                            warned.of(&why);
                            return;
                        }
                        Problem::Unreachable { why } => (why, None),
                        Problem::Later { why, after } => (why, after),
                    };
                    warned.of(&format!("{why}; what waits is kept and sent again"));
                    // One last attempt is made, unless the collector asked to be left alone.
                    let may_be_cut = after.is_none() && !begun_at_the_end;
                    let pause = after.unwrap_or_else(|| jittered(longest));
                    longest = (longest * 2).min(LONGEST_PAUSE);
                    if !shared.pause(pause, may_be_cut).await {
                        return;
                    }
                }
            }
        }
        shared.lock().in_hand = 0;
    }
}

/// Between half of a time and the whole, so that those whose collector has failed do not all come back at once.
fn jittered(longest: Duration) -> Duration {
    longest.mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// Tells once that a collector does not take what it should, and once that it does again.
struct Warned<'s> {
    shared: &'s Shared,
    is_in_trouble: bool,
}

impl Warned<'_> {
    fn of(&mut self, why: &str) {
        if !mem::replace(&mut self.is_in_trouble, true) {
            let endpoint = self.shared.transport.endpoint();
            log::warn!("no {} to {}: {why}{}", self.shared.signal, endpoint.uri, endpoint.hint);
        }
    }

    fn over(&mut self) {
        if mem::take(&mut self.is_in_trouble) {
            log::warn!("{} takes {} again", self.shared.transport.endpoint().uri, self.shared.signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::otlp::{signal::MetricsRequest, testing::endpoint};

    fn batch(bytes: usize, items: u64) -> Batch {
        Batch { bytes: vec![0; bytes].into(), items }
    }

    #[test]
    fn the_oldest_make_room() {
        let mut state = State::default();
        assert_eq!(state.push(batch(BUFFER / 2, 1)), 0);
        assert_eq!(state.push(batch(BUFFER / 2, 2)), 0);
        assert_eq!(state.push(batch(1, 4)), 1);
        assert_eq!(state.push(batch(BUFFER, 8)), 6);
        assert_eq!((state.waiting.len(), state.bytes), (1, BUFFER));
    }

    /// Whoever waits before trying again makes one more attempt when the end comes, and nobody is waited for in vain.
    #[test]
    fn the_end_cuts_a_pause_short() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let stats = Arc::new(ExportStats::of(MetricsRequest::NAME));
            let transport = Transport::new(endpoint()).unwrap();
            let mut queue = Queue::start::<MetricsRequest>(transport, Arc::clone(&stats));
            queue.push(batch(10, 3));
            queue.push(batch(10, 4));
            while stats.read().failures == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let begin = Instant::now();
            queue.drain(begin + Duration::from_secs(60)).await;
            assert_eq!(queue.give_up(), 7);
            assert!(begin.elapsed() < FIRST_PAUSE / 2, "{:?}", begin.elapsed());
            assert_eq!(stats.read().failures, 2);
        });
    }

    #[test]
    fn pauses_vary_within_bounds() {
        let pauses: Vec<_> = (0..100).map(|_| jittered(FIRST_PAUSE)).collect();
        assert!(pauses.iter().all(|&pause| (FIRST_PAUSE / 2..=FIRST_PAUSE).contains(&pause)), "{pauses:?}");
        assert!(pauses.iter().max() > pauses.iter().min());
    }
}
