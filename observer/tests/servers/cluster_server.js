// Node.js processes that share a port. First argument: `rr` if the primary process accepts, `none` if each worker does.
// The file given as second argument grows by a byte for each connection that a worker got.
'use strict';
const cluster = require('node:cluster');
const fs = require('node:fs');
const http = require('node:http');

const [policy, file] = process.argv.slice(2);
const WORKERS = 2;

if (cluster.isPrimary) {
  cluster.schedulingPolicy = { rr: cluster.SCHED_RR, none: cluster.SCHED_NONE }[policy];
  let listening = 0;
  cluster.on('listening', (worker, address) => {
    listening += 1;
    if (listening === WORKERS) console.log(address.port);
  });
  for (let i = 0; i < WORKERS; i += 1) cluster.fork();
} else {
  const accepted = fs.openSync(file, 'a');
  const server = http.createServer((request, response) => {
    response.writeHead(200, { Connection: 'close', 'Content-Length': 2 });
    response.end('ok');
  });
  server.on('connection', () => fs.writeSync(accepted, '.'));
  server.listen(0, '127.0.0.1');
}
