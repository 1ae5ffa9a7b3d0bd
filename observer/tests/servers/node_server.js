// A Node.js server that blocks its event loop on request, with the same paths and responses as asyncio_server.py. In
// addition, GET /pool/N hashes in N threads of Node's pool, and GET /child/MS waits for a child process that takes MS.
'use strict';
const { execSync } = require('node:child_process');
const { pbkdf2 } = require('node:crypto');
const http = require('node:http');
const { promisify } = require('node:util');

let connections = 0;

function block(kind, milliseconds) {
  const wall = performance.now();
  const cpu = process.cpuUsage();
  if (kind === 'sleep') {
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, milliseconds);
  } else if (kind === 'spin') {
    while (performance.now() - wall < milliseconds);
  } else if (kind === 'child') {
    execSync(`sleep ${milliseconds / 1e3}`);
  }
  const used = process.cpuUsage(cpu);
  return { wall: (performance.now() - wall) / 1e3, cpu: (used.user + used.system) / 1e6 };
}

function hash(threads) {
  return Promise.all(Array.from({ length: threads }, () => promisify(pbkdf2)('', '', 10_000, 64, 'sha512')));
}

const server = http.createServer(async (request, response) => {
  const [, kind, amount] = request.url.split('/');
  if (kind === 'pool') await hash(Number(amount));
  const body = JSON.stringify({ ...block(kind, Number(amount ?? 0)), connections });
  response.writeHead(200, { Connection: 'close', 'Content-Length': Buffer.byteLength(body) });
  response.end(body);
});
server.on('connection', () => { connections += 1; });
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
