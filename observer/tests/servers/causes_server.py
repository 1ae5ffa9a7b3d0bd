"""An asyncio server that blocks its event loop on request, each time for one of many causes, in a function named after it.

GET /CAUSE/MS is answered, as JSON, by the seconds that the block took, was on a CPU and waited for one. Causes:
  spin, hog    computes for MS of CPU time; for a hog, others compete for the CPU
  sleep        sleeps
  flock        waits for a file's lock, held by another thread with a descriptor of its own
  futex        waits for a lock of the language, held by another thread
  file         reads a file that the page cache does not hold, again and again until MS have passed
  dns          asks a resolver that does not answer, and gives up after MS
  gc           collects garbage in a large heap, until MS have passed
Anything else is answered at once.
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
    """Makes another thread hold something; returns when it does."""
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
        # A question for the address of `test.invalid`.
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
    """For how long the main thread has been runnable without a CPU."""
    with open("/proc/self/schedstat") as figures:
        return int(figures.read().split()[1]) / 1e9


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
    # Only where it is asked for.
    gc.disable()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


sys.exit(asyncio.run(main()))
