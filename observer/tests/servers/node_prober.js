// A Node loop under the workloads of asyncio_prober.py, which prints the same and what `monitorEventLoopDelay` says of it.
//
// Node's clock for timers has whole milliseconds, cut off: a timer is due that many after the one that was going on when
// it was set. Lateness is counted from there, by the clock that Node cuts off.
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

// Work is begun by an immediate, after all timers of the round: behind work of the same round the prober would measure
// the loop's queue beside its lag.
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

// Tells `callback` how late it is. Set again where the millisecond changed meanwhile: nobody knows which one Node took.
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
  // Of the time between two runs of a timer of its own, which are `resolution` apart: 10 ms unless told otherwise.
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
// Before the loop first waits: until then it is not late, for it is no loop yet.
const left = start - now() - 50;
if (!(left > 0)) throw new Error('setting the timers took too long');
block(left);
