// A Node server whose requests leave work behind them, in all ways that Node has for that. It writes down itself which
// request each piece came from, when that was enqueued and when it started. Prints its port.
//
// `node deferred_node.js TRUTH`: the file for that, a JSON line a piece. GET /job/ID starts all kinds of work and is
// answered at once; `through` says how a piece was handed on: in one go by native callbacks, or also by timers or promises.
'use strict';
const { hkdf, pbkdf2, randomBytes } = require('node:crypto');
const { lookup } = require('node:dns');
const fs = require('node:fs');
const http = require('node:http');

const truth = fs.openSync(process.argv[2], 'a');
// Nanoseconds of CLOCK_MONOTONIC.
const now = process.hrtime.bigint;

// Enqueues by `enqueue(callback)`; `next` is what the piece does in its turn.
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
  // A request with a body: the work starts when that has been read.
  if (kind === 'job' && request.method === 'POST') request.on('end', () => { enqueue(id); }).resume();
  else if (kind === 'job') enqueue(id);
  response.end('ok');
});
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
