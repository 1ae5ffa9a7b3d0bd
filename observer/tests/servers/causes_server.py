"""An asyncio server that blocks its event loop on request for a given cause, in a function that is named after it.

The response to GET /CAUSE/MS is JSON: how many seconds the block took, was on a CPU and was in the run queue. Causes:
  spin, hog    uses MS of CPU time; for hog, other processes compete for the CPU
  sleep        sleeps
  flock        waits for a file lock that another thread holds through another descriptor
  futex        waits for a lock of the language that another thread holds
  file         repeatedly reads a file that is not in the page cache, for MS
  dns          sends a query to a resolver that does not respond, and times out after MS
  gc           collects garbage in a large heap for MS
Any other path responds at once.
"""

import asyncio
import fcntl
import gc
import json
import os
import socket
import sys
import tempfile
import threading
import time

SIZE, CHUNK = 16 << 20, 64 << 10

locked = tempfile.NamedTemporaryFile()
lock = threading.Lock()
resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
resolver.bind(("127.0.0.1", 0))
large = tempfile.NamedTemporaryFile()
large.write(os.urandom(SIZE))
os.fsync(large.fileno())
heap = [[number] for number in range(200_000)]


def hold(take, release, seconds):
    """Makes another thread take something; returns once it has."""
    held = threading.Event()

    def holder():
        take()
        held.set()
        time.sleep(seconds)
        release()

    threading.Thread(target=holder).start()
    held.wait()


def cause_spin(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def cause_hog(seconds):
    cause_spin(seconds)


def cause_sleep(seconds):
    time.sleep(seconds)


def cause_flock(_):
    with open(locked.name) as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def cause_futex(_):
    with lock:
        pass


def cause_file(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        os.posix_fadvise(large.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for start in range(0, SIZE, CHUNK):
            os.pread(large.fileno(), CHUNK, start)


def cause_dns(seconds):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        query.connect(resolver.getsockname())
        query.settimeout(seconds)
        # A query for the address of `test.invalid`.
        query.send(b"\0\1\1\0\0\1\0\0\0\0\0\0\4test\7invalid\0\0\1\0\1")
        try:
            query.recv(512)
        except TimeoutError:
            pass


def cause_gc(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        gc.collect()


def prepare(cause, seconds):
    if cause == "flock":
        file = open(locked.name)
        hold(lambda: fcntl.flock(file, fcntl.LOCK_EX), file.close, seconds)
    elif cause == "futex":
        hold(lock.acquire, lock.release, seconds)


def delay():
    """Seconds that the main thread was in the run queue."""
    with open("/proc/self/schedstat") as file:
        return int(file.read().split()[1]) / 1e9


def block(cause, seconds):
    prepare(cause, seconds)
    wall, cpu, before = time.monotonic(), time.thread_time(), delay()
    if function := globals().get(f"cause_{cause}"):
        function(seconds)
    return {"wall": time.monotonic() - wall, "cpu": time.thread_time() - cpu, "delay": delay() - before}


async def serve(reader, writer):
    request = await reader.readuntil(b"\r\n\r\n")
    _, cause, milliseconds = request.split(b" ")[1].decode().split("/")
    body = json.dumps(block(cause, int(milliseconds) / 1000)).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()
    writer.close()


async def main():
    # Collect only on request.
    gc.disable()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


sys.exit(asyncio.run(main()))
