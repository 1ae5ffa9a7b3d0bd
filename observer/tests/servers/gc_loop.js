// A Node.js loop that collects garbage on request, like gc_loop.py. `churn N` allocates and keeps so many objects N
// times that V8 collects by its own heuristics, in all of its ways. Run it with --expose-gc, and with
// --no-memory-reducer so that V8 does not collect while it is idle.
'use strict';
const { PerformanceObserver, constants } = require('node:perf_hooks');
const readline = require('node:readline');

const { NODE_PERFORMANCE_GC_MINOR: MINOR, NODE_PERFORMANCE_GC_MAJOR: MAJOR } = constants;
// A large heap, so that a collection takes longer than a call.
globalThis.ballast = Array.from({ length: 100_000 }, (_, n) => [n]);
const kinds = {};
let count = 0;
let seconds = 0;

function add(entries) {
  for (const { duration, detail } of entries) {
    kinds[detail.kind] = (kinds[detail.kind] ?? 0) + 1;
    // The other kinds are callbacks of a collection, not collections.
    if (detail.kind === MINOR || detail.kind === MAJOR) {
      count += 1;
      seconds += duration / 1e3;
    }
  }
}

const observer = new PerformanceObserver((list) => add(list.getEntries()));
observer.observe({ entryTypes: ['gc'] });

async function collect(times) {
  for (let n = 0; n < times; n += 1) {
    globalThis.garbage = Array.from({ length: 50_000 }, () => ({}));
    globalThis.gc();
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

async function churn(times) {
  globalThis.kept = [];
  for (let n = 0; n < times; n += 1) {
    globalThis.kept[n % 8] = Array.from({ length: 100_000 }, (_, m) => ({ m, text: `${n} ${m}` }));
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  // Finishes an incremental collection that V8 would continue later.
  globalThis.gc();
}

readline.createInterface({ input: process.stdin }).on('line', async (line) => {
  const [command, times] = line.split(' ');
  await (command === 'churn' ? churn : collect)(Number(times));
  await new Promise((resolve) => setTimeout(resolve, 50));
  add(observer.takeRecords());
  console.log(JSON.stringify({ count, seconds, kinds }));
});
