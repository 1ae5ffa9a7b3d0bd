//! Targets for the kernel's type information, and for what the eBPF programs write to maps and rings.

use std::ptr;

use observer_common::{
    deferred::{Context, REQUEST_ID},
    histogram,
    listener::Listener,
    origin::Request,
    reactor::Stall,
};

use super::input::number;
use crate::{
    kernel::{
        btf::Btf,
        layout::{members, ring_shape, switch_has_state},
    },
    model::{histogram::Histogram, lag::Prober},
    probes::{deferred, listener, origin, reactor},
    read::reactors::Raw,
    stacks::naming::Naming,
};

/// BTF of a kernel.
pub(super) fn btf(data: &[u8]) {
    let Ok(btf) = Btf::parse(data) else { return };
    let _ = members(&btf);
    let _ = (switch_has_state(&btf), ring_shape(&btf));
    for (structure, path) in [("a", "b"), ("a", "b.c"), ("sock", "__sk_common.skc_num")] {
        let _ = btf.offset(structure, path);
    }
    let arguments = btf.tracepoint_arguments("sched_switch");
    assert!(arguments.is_none_or(|arguments| arguments.len() <= data.len() / 8));
}

/// Values of maps and entries of rings, as the eBPF programs write them: the current time, followed by the value.
pub(super) fn record(data: &[u8]) {
    let (now, bytes) = number(data);
    let now = now % COUNTER_LIMIT;
    let counters = counters(bytes);
    let listener =
        listener::decode(&record_of::<Listener>(&counters), listener::Before::default(), Some(now));
    assert!(!listener.address.is_empty());
    let request = origin::decode(&record_of::<Request>(bytes));
    assert!(request.path.is_none_or(|path| !path.contains(['?', '#'])));
    let raw =
        Raw { now: record_of(&counters), waiter: record_of(&counters), durations: record_of(&counters) };
    let lag = reactor::lag(&raw, &mut Prober::default(), now);
    let _ = reactor::decode("7".into(), "name".into(), &raw, lag, now);
    let _ = reactor::stall_in_progress(&raw, raw.now.left_ns, now, now.is_multiple_of(2));
    let _ = reactor::stall(&record_of::<Stall>(&counters), None, now.is_multiple_of(2));
    let _ = deferred::decode("work", true, &record_of(&counters), Some(now));
    if let Some(id) = deferred::request_id(record_of::<[u8; REQUEST_ID]>(bytes)) {
        assert!(!id.is_empty() && id.bytes().all(|byte| byte.is_ascii_graphic()));
    }
    if let Some(context) = deferred::context(&record_of::<Context>(bytes)) {
        assert_eq!((context.trace_id.len(), context.span_id.len()), (32, 16));
    }
    let _ = Naming::of(record_of(bytes));
    let histogram = Histogram::from(&record_of::<histogram::Histogram>(&counters));
    for quantile in [0.0, 0.5, 0.999, 1.0] {
        assert!(histogram.quantile(quantile).is_none_or(f64::is_finite));
    }
}

/// Above every counter that the eBPF programs can reach: about a hundred days in nanoseconds.
const COUNTER_LIMIT: u64 = 1 << 53;

/// Reduces each word of the bytes to less than [`COUNTER_LIMIT`].
fn counters(bytes: &[u8]) -> Vec<u8> {
    let (words, rest) = bytes.as_chunks::<8>();
    let words = words.iter().map(|word| u64::from_le_bytes(*word) % COUNTER_LIMIT);
    words.flat_map(u64::to_le_bytes).chain(rest.iter().copied()).collect()
}

/// Makes a value from its first bytes. Missing bytes are zero.
fn record_of<T: aya::Pod>(bytes: &[u8]) -> T {
    let mut value = vec![0_u8; size_of::<T>()];
    let length = bytes.len().min(value.len());
    value[..length].copy_from_slice(&bytes[..length]);
    // SAFETY: `value` has as many bytes as a `T`, and any bytes are a valid `Pod`.
    unsafe { ptr::read_unaligned(value.as_ptr().cast()) }
}
