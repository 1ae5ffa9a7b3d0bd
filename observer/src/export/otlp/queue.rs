//! Batches that wait to be sent, in a buffer of limited size, and the tasks that send them. Adding a batch never waits:
//! when the buffer is full, the oldest batches are dropped and counted.

use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    select,
    sync::Notify,
    task::JoinSet,
    time::{Instant, sleep_until, timeout_at},
};

use super::client::{Accepted, Batch, Client, Failed, Retry};
use crate::model::delivery::{DropReason, ExportStats};

/// Maximum size of the buffer of a signal in bytes.
pub(crate) const BUFFER: usize = 16 << 20;

/// The delay after the first failure, and the longest one; each is shortened at random by up to half.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The buffer of one signal and the tasks that empty it.
pub(super) struct Queue<C: Client> {
    shared: Arc<Shared<C>>,
    senders: JoinSet<()>,
}

struct Shared<C: Client> {
    state: Mutex<State<C::Request>>,
    /// A batch was added.
    added: Notify,
    /// The end was announced.
    ended: Notify,
    /// Notified when the collector accepts data again.
    recovered: Notify,
    stats: Arc<ExportStats>,
    client: C,
}

struct State<R> {
    waiting: VecDeque<Batch<R>>,
    bytes: usize,
    /// Number of items in the batches that are being sent.
    in_flight: u64,
    /// The deadline for all sending, once the end of the run was announced.
    end: Option<Instant>,
    /// Whether the last attempt failed. A failure is logged only if the attempt before it succeeded.
    is_failing: bool,
}

impl<R> Default for State<R> {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), bytes: 0, in_flight: 0, end: None, is_failing: false }
    }
}

impl<C: Client> Queue<C> {
    /// Starts the sending tasks.
    pub(super) fn start(client: C, stats: Arc<ExportStats>) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            added: Notify::new(),
            ended: Notify::new(),
            recovered: Notify::new(),
            stats,
            client,
        });
        let mut senders = JoinSet::new();
        for _ in 0..C::CONCURRENCY {
            senders.spawn(deliver(Arc::clone(&shared)));
        }
        Self { shared, senders }
    }

    /// Adds a batch.
    pub(super) fn push(&self, batch: Batch<C::Request>) {
        let lost = self.shared.lock().push(batch);
        if lost > 0 {
            self.shared.stats.dropped(DropReason::BufferFull, lost);
        }
        self.shared.added.notify_one();
    }

    /// Sends the buffered batches, until `end` at the latest.
    pub(super) async fn drain(&mut self, end: Instant) {
        self.shared.lock().end = Some(end);
        self.shared.ended.notify_waiters();
        let all_sent = async { while self.senders.join_next().await.is_some() {} };
        let _in_time = timeout_at(end, all_sent).await;
    }

    /// Stops sending. Returns the number of undelivered items.
    pub(super) fn give_up(mut self) -> u64 {
        self.senders.abort_all();
        let state = self.shared.lock();
        state.in_flight + state.waiting.iter().map(|batch| batch.items).sum::<u64>()
    }
}

impl<R> State<R> {
    /// Adds a batch. Returns how many items were dropped to make room for it.
    fn push(&mut self, batch: Batch<R>) -> u64 {
        self.bytes += batch.bytes;
        self.waiting.push_back(batch);
        let mut lost = 0;
        while self.bytes > BUFFER && self.waiting.len() > 1 {
            lost += self.pop().map_or(0, |batch| batch.items);
        }
        lost
    }

    fn pop(&mut self) -> Option<Batch<R>> {
        let batch = self.waiting.pop_front()?;
        self.bytes -= batch.bytes;
        Some(batch)
    }
}

impl<C: Client> Shared<C> {
    fn lock(&self) -> MutexGuard<'_, State<C::Request>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next batch; `None` at the end of the run.
    async fn next(&self) -> Option<Batch<C::Request>> {
        loop {
            let (added, ended) = (self.added.notified(), self.ended.notified());
            {
                let mut state = self.lock();
                if let Some(batch) = state.pop() {
                    state.in_flight += batch.items;
                    return Some(batch);
                }
                if state.end.is_some() {
                    return None;
                }
            }
            select! {
                () = added => {}
                () = ended => {}
            }
        }
    }

    /// Waits for `pause`. If `may_be_cut`, the wait ends early when the end of the run is announced, or when the collector has
    /// accepted another batch. Returns whether there is time for another attempt.
    async fn pause(&self, pause: Duration, may_be_cut: bool) -> bool {
        let until = Instant::now() + pause;
        loop {
            let (ended, recovered) = (self.ended.notified(), self.recovered.notified());
            let end = self.lock().end;
            if let Some(end) = end {
                return may_be_cut || (until < end && timeout_at(end, sleep_until(until)).await.is_ok());
            }
            select! {
                () = sleep_until(until) => return true,
                () = recovered, if may_be_cut => return true,
                () = ended => {}
            }
        }
    }

    /// Logs a failure, unless the previous attempt failed as well.
    fn warn(&self, why: &str) {
        if !mem::replace(&mut self.lock().is_failing, true) {
            let endpoint = self.client.endpoint();
            log::warn!("no {} to {}: {why}{}", C::SIGNAL.name(), endpoint.uri, endpoint.hint);
        }
    }

    /// Logs that the collector accepts data again, if the previous attempt failed. Other batches are retried at once.
    fn recovered(&self) {
        if mem::take(&mut self.lock().is_failing) {
            self.recovered.notify_waiters();
            log::warn!("{} accepts {} again", self.client.endpoint().uri, C::SIGNAL.name());
        }
    }

    /// Sends one batch until it is accepted or refused; returns whether there is time for more.
    async fn send(&self, batch: &Batch<C::Request>) -> bool {
        let mut longest = FIRST_PAUSE;
        loop {
            let begun_at_the_end = self.lock().end.is_some();
            let Failed { why, retry } = match self.client.send(&batch.request, begun_at_the_end).await {
                Ok(accepted) => {
                    self.count(&accepted, batch.items);
                    return true;
                }
                Err(failed) => failed,
            };
            self.stats.failed();
            let after = match retry {
                Retry::Never => {
                    self.stats.dropped(DropReason::Refused, batch.items);
                    self.warn(&format!("refused: {why}"));
                    return true;
                }
                Retry::Unreachable if begun_at_the_end => {
                    self.warn(&why);
                    return false;
                }
                Retry::Unreachable | Retry::Later => None,
                Retry::After(delay) => Some(delay),
            };
            self.warn(&format!("{why}; observer buffers the data and retries"));
            // The end of the run cuts a delay short for a last attempt, unless the collector requested the delay.
            let may_be_cut = after.is_none() && !begun_at_the_end;
            let pause = after.unwrap_or_else(|| jittered(longest));
            longest = (longest * 2).min(LONGEST_PAUSE);
            if !self.pause(pause, may_be_cut).await {
                return false;
            }
        }
    }

    fn count(&self, accepted: &Accepted, items: u64) {
        let lost = accepted.rejected.min(items);
        self.stats.delivered(items - lost);
        if lost > 0 {
            self.stats.dropped(DropReason::Refused, lost);
            self.warn(&format!("{lost} of {items} refused: {}", accepted.why));
        } else {
            self.recovered();
        }
    }
}

/// Sends batches until the end of the run.
async fn deliver<C: Client>(shared: Arc<Shared<C>>) {
    while let Some(batch) = shared.next().await {
        if !shared.send(&batch).await {
            return;
        }
        shared.lock().in_flight -= batch.items;
    }
}

/// A random delay between half of `longest` and all of it, so that many observers do not retry at the same time.
fn jittered(longest: Duration) -> Duration {
    longest.mul_f64(0.5 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::otlp::{
        connection::Connection, metrics_client::MetricsClient, signal::Signal, testing::endpoint,
    };

    fn batch(bytes: usize, items: u64) -> Batch<bytes::Bytes> {
        Batch { request: bytes::Bytes::new(), bytes, items }
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

    /// At the end of a run, the delay before a retry is cut short for a last attempt.
    #[test]
    fn the_end_cuts_a_pause_short() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let stats = Arc::new(ExportStats::of(Signal::Metrics.name()));
            let client = MetricsClient::new(endpoint(), Connection::new(&endpoint()).unwrap());
            let mut queue = Queue::start(client, Arc::clone(&stats));
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
