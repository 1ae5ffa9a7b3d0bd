"""gunicorn with synchronous workers that share one listener: a connection wakes all waiting workers, and one accepts it.

The file given as argument grows by a byte for each connection that a worker accepted, and the file of the same name with
the suffix `.lost` for each race that a worker lost.
"""

import os
import sys

from gunicorn.app.base import BaseApplication
from gunicorn.workers.sync import SyncWorker

accepted, lost = (
    os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (sys.argv[1], sys.argv[1] + ".lost")
)


class CountingWorker(SyncWorker):
    def accept(self, listener):
        try:
            super().accept(listener)
        except BlockingIOError:
            os.write(lost, b".")
            raise

    def handle(self, listener, client, address):
        os.write(accepted, b".")
        super().handle(listener, client, address)


class Server(BaseApplication):
    def load_config(self):
        self.cfg.set("bind", "127.0.0.1:0")
        self.cfg.set("workers", 4)
        self.cfg.set("worker_class", "__main__.CountingWorker")
        self.cfg.set("loglevel", "error")
        self.cfg.set("when_ready", lambda server: print(server.LISTENERS[0].getsockname()[1], flush=True))

    def load(self):
        return answer


def answer(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]


Server().run()
