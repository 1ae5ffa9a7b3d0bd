// A Node.js loop with the workloads of asyncio_prober.py. It prints the same, and the results of
// `monitorEventLoopDelay`.
//
// Node's clock for timers is truncated to milliseconds, and a timer is due that many milliseconds after the one in
// which it was set. Lateness is measured from then on, with the clock that Node truncates.
'use strict';
const { readSync } = require('node:fs');
const { monitorEventLoopDelay } = require('node:perf_hooks');

const SECONDS = 6;
const TIMERS = 2000;
const NAP = 10;
const [, , workload, lead] = process.argv;
const late = [];
const overslept = [];

function now() {
  return Number(process.hrtime.bigint()) / 1e6;
}

function work(milliseconds) {
  const end = now() + milliseconds;
  while (now() < end);
}

function block(milliseconds) {
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, milliseconds);
}

// Work is started by an immediate, after all timers of the iteration. After work of the same iteration, the prober
// would also measure the loop's queue.
function load() {
  if (workload === 'idle') {
    setTimeout(load, 1000);
  } else if (workload === 'short') {
    work(2);
    setTimeout(setImmediate, 6, load);
  } else if (workload === 'rare') {
    block(200);
    setTimeout(setImmediate, 800, load);
  } else {
    work(10);
    setImmediate(load);
  }
}

// Passes to `callback` how late it is. Sets the timer again if the millisecond changed meanwhile, because it is unknown
// which one Node used.
function after(delay, callback) {
  for (;;) {
    const set = Math.floor(now());
    const timer = setTimeout(() => callback((now() - set - delay) / 1e3), delay);
    if (Math.floor(now()) === set) return;
    clearTimeout(timer);
  }
}

function sleeper() {
  after(NAP, (lateness) => {
    overslept.push(lateness);
    sleeper();
  });
}

function finish() {
  // Measures the time between two runs of a timer of its own with an interval of `resolution`, by default 10 ms.
  const monitor = Object.fromEntries([50, 90, 99].map((part) => [`p${part}`, histogram.percentile(part) / 1e9]));
  monitor.max = histogram.max / 1e9;
  console.log(JSON.stringify({ timers: late, sleeper: overslept, monitor }));
  process.exit();
}

readSync(0, Buffer.alloc(1));
const histogram = monitorEventLoopDelay();
const start = now() + lead * 1e3;
const stretch = SECONDS * 1e3 / TIMERS;
for (let number = 0; number < TIMERS; number += 1) {
  const due = start + (number + Math.random()) * stretch;
  after(Math.round(due - now()), (lateness) => late.push(lateness));
}
setTimeout(() => {
  histogram.enable();
  sleeper();
  setImmediate(load);
  setTimeout(finish, SECONDS * 1e3);
}, start - now());
// Block before the loop waits for the first time: a loop that has not started is not late.
const left = start - now() - 50;
if (!(left > 0)) throw new Error('setting the timers took too long');
block(left);
