// A Node loop that collects garbage when told to, as gc_loop.py does. `churn N` makes and keeps so much N times that V8
// collects on its own, in all the ways it has. To be run with --expose-gc, and with --no-memory-reducer lest V8 collect while there is nothing to do.
'use strict';
const { PerformanceObserver, constants } = require('node:perf_hooks');
const readline = require('node:readline');

const { NODE_PERFORMANCE_GC_MINOR: MINOR, NODE_PERFORMANCE_GC_MAJOR: MAJOR } = constants;
// Something to walk through, so that a collection takes longer than a call.
globalThis.ballast = Array.from({ length: 100_000 }, (_, n) => [n]);
const kinds = {};
let count = 0;
let seconds = 0;

function add(entries) {
  for (const { duration, detail } of entries) {
    kinds[detail.kind] = (kinds[detail.kind] ?? 0) + 1;
    // The others are callbacks about a collection, not collections.
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
  // Ends what V8 has begun and would go on with later.
  globalThis.gc();
}

readline.createInterface({ input: process.stdin }).on('line', async (line) => {
  const [command, times] = line.split(' ');
  await (command === 'churn' ? churn : collect)(Number(times));
  await new Promise((resolve) => setTimeout(resolve, 50));
  add(observer.takeRecords());
  console.log(JSON.stringify({ count, seconds, kinds }));
});
