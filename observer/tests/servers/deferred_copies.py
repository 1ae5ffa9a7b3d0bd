"""A server with several copies of a C library for deferred tasks, which enqueues two tasks with each. It logs which
request each task came from. Prints its port.

Arguments: the paths of the copies, and the log file, with a line of JSON for each task. `again:PATH` loads a library
once more that is loaded already, with its own variables. Each copy numbers its tasks from 1, so copies share task keys.
`GET /load` loads the last copy, unless it has been loaded.
"""

import ctypes
import json
import os
import selectors
import socket
import sys
import time
from collections import deque

*paths, truth = sys.argv[1:]
truth = open(truth, "a", buffering=1)


def load(path):
    if not path.startswith("again:"):
        return ctypes.CDLL(path)
    dlmopen = ctypes.CDLL("libdl.so.2").dlmopen
    dlmopen.restype = ctypes.c_void_p
    # In a new link-map namespace, LM_ID_NEWLM.
    handle = dlmopen(ctypes.c_long(-1), os.fsencode(path.removeprefix("again:")), ctypes.c_int(os.RTLD_NOW))
    return ctypes.CDLL(path, handle=handle)


copies = [load(path) for path in paths[:-1]]
counts = [0] * len(paths)
queue = deque()


def enqueue(request):
    for number, copy in enumerate(copies):
        for _ in range(2):
            counts[number] += 1
            enqueued = time.monotonic_ns()
            copy.submit(ctypes.c_ulong(counts[number]))
            queue.append((copy, counts[number], request, enqueued))


def run_next():
    copy, key, request, enqueued = queue.popleft()
    copy.execute(ctypes.c_ulong(key))
    line = {"request": request, "depth": 1, "enqueued": enqueued, "start": time.monotonic_ns()}
    print(json.dumps(line), file=truth)


def serve(client):
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        part = client.recv(4096)
        if not part:
            selector.unregister(client)
            client.close()
            return
        head += part
    path = head.split()[1].decode()
    if path.startswith("/job/"):
        enqueue(path.removeprefix("/job/"))
    elif path == "/load" and len(copies) < len(paths):
        copies.append(load(paths[-1]))
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
selector = selectors.EpollSelector()
selector.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in selector.select(0 if queue else None):
        if key.fileobj is listener:
            client = listener.accept()[0]
            selector.register(client, selectors.EVENT_READ)
        else:
            serve(key.fileobj)
    # A few at a time, interleaved with requests.
    for _ in range(min(4, len(queue))):
        run_next()
