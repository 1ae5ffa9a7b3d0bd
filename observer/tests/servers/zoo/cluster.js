// A primary and two workers: `/stall` blocks for 150 ms.
const cluster = require('cluster');
const http = require('http');

if (cluster.isPrimary) {
  cluster.fork();
  cluster.fork();
} else {
  http.createServer((request, response) => {
    const end = Date.now() + (request.url === '/stall' ? 150 : 0);
    while (Date.now() < end);
    response.end('ok');
  }).listen(Number(process.argv[2]), '127.0.0.1');
}
