// A Node.js server whose requests defer tasks in all the ways that Node.js supports. It logs which request each task
// came from, when it was enqueued and when it started. Prints its port.
//
// `node deferred_node.js LOG`: the log file, with a line of JSON for each task. GET /job/ID enqueues all kinds of tasks
// and responds at once. `through` says what the chain of the task consists of: native callbacks only, or also timers or
// promises.
'use strict';
const { hkdf, pbkdf2, randomBytes } = require('node:crypto');
const { lookup } = require('node:dns');
const fs = require('node:fs');
const http = require('node:http');

const truth = fs.openSync(process.argv[2], 'a');
// CLOCK_MONOTONIC in nanoseconds.
const now = process.hrtime.bigint;

// Enqueues a task with `enqueue(callback)`. The task runs `next` when it has been logged.
function defer(request, name, through, enqueue, depth = 1, next = () => {}) {
  const enqueued = now();
  enqueue(() => {
    const start = now();
    const line = `{"request": "${request}", "name": "${name}", "through": "${through}", "depth": ${depth}, "enqueued": ${enqueued}, "start": ${start}}\n`;
    fs.writeSync(truth, line);
    next();
  });
}

const stat = (callback) => fs.stat('/', callback);
const hash = (callback) => pbkdf2('', '', 1000, 64, 'sha512', callback);
const timer = (callback) => setTimeout(callback, 2);

async function awaiting(request) {
  await new Promise((resolve) => { defer(request, 'awaited', 'native', stat, 1, resolve); });
  defer(request, 'after_await', 'promise', stat);
}

function enqueue(request) {
  defer(request, 'stat', 'native', stat);
  defer(request, 'lookup', 'native', (callback) => lookup('localhost', callback));
  defer(request, 'pbkdf2', 'native', hash);
  defer(request, 'random', 'native', (callback) => randomBytes(16, callback));
  defer(request, 'hkdf', 'native', (callback) => hkdf('sha512', 'key', 'salt', 'info', 64, callback));
  defer(request, 'chain', 'native', stat, 1, () => {
    defer(request, 'chain', 'native', hash, 2, () => { defer(request, 'chain', 'native', stat, 3); });
  });
  defer(request, 'immediate', 'timer', setImmediate, 1, () => { defer(request, 'after_immediate', 'timer', stat, 2); });
  defer(request, 'timer', 'timer', timer, 1, () => {
    defer(request, 'timer', 'timer', timer, 2, () => { defer(request, 'after_timers', 'timer', stat, 3); });
  });
  defer(request, 'tick', 'tick', process.nextTick, 1, () => { defer(request, 'after_tick', 'native', stat, 2); });
  awaiting(request);
}

const server = http.createServer((request, response) => {
  const [, kind, id] = request.url.split('/');
  // A request with a body: tasks are enqueued when it has been read.
  if (kind === 'job' && request.method === 'POST') request.on('end', () => { enqueue(id); }).resume();
  else if (kind === 'job') enqueue(id);
  response.end('ok');
});
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
