"""An asyncio server whose requests defer tasks, and that logs which request each task belongs to.

GET /job/ID defers TASKS tasks in all the ways that asyncio supports, some before the response and some after it; any
other path only responds. Connections are kept alive. When a task starts, it appends a line of JSON to the file given as
argument: the ID of the request, its function, the depth of its chain, its thread, and when it was enqueued and started
by CLOCK_MONOTONIC in ns.
"""

import asyncio
import gc
import json
import os
import sys
import threading
import time

TASKS = 15
truth = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
running = set()
waiting = None
jobs = 0


def note(function, record):
    request, depth, enqueued = record
    line = {
        "request": request,
        "class": function.__qualname__,
        "depth": depth,
        "thread": threading.get_native_id(),
        "enqueued": enqueued,
        "start": time.monotonic_ns(),
    }
    os.write(truth, json.dumps(line).encode() + b"\n")


def child(record):
    request, depth, _ = record
    return request, depth + 1, time.monotonic_ns()


def start(coroutine):
    task = asyncio.create_task(coroutine)
    running.add(task)
    task.add_done_callback(running.discard)


def later(seconds, function, *args):
    asyncio.get_running_loop().call_later(seconds, function, *args)


async def mail(record):
    """The first task of a chain of three."""
    note(mail, record)
    await asyncio.sleep(0.01)
    start(receipt(child(record)))


async def receipt(record):
    note(receipt, record)
    start(archive(child(record)))
    await asyncio.sleep(0)


async def archive(record):
    note(archive, record)


def expire(record):
    note(expire, record)


def charge(record):
    """Fails twice and is retried."""
    note(charge, record)
    if record[1] < 3:
        later(0.005, charge, child(record))


async def thumbnail(record):
    note(thumbnail, record)
    await asyncio.to_thread(resize, child(record))


def resize(record):
    note(resize, record)
    time.sleep(0.002)


async def follow(record, signal):
    """Is woken up by the next request, but belongs to its own."""
    note(follow, record)
    await asyncio.wait([signal], timeout=0.2)
    start(notify(child(record)))


async def notify(record):
    note(notify, record)


async def index(record):
    note(index, record)
    await asyncio.gather(store(child(record)), store(child(record)))


async def store(record):
    note(store, record)
    await asyncio.sleep(0.001)


class Report:
    def send(self, record):
        note(self.send, record)


def defer_before_answer(request):
    global waiting
    loop = asyncio.get_running_loop()
    if waiting and not waiting.done():
        waiting.set_result(None)
    waiting = loop.create_future()
    start(mail(child((request, 0, None))))
    start(follow(child((request, 0, None)), waiting))
    later(0.02, expire, child((request, 0, None)))
    later(0, charge, child((request, 0, None)))


def defer_after_answer(request):
    start(thumbnail(child((request, 0, None))))
    start(index(child((request, 0, None))))
    asyncio.get_running_loop().call_soon(Report().send, child((request, 0, None)))


async def serve(reader, writer):
    global jobs
    while head := await reader.readline():
        while await reader.readline() not in (b"\r\n", b""):
            pass
        _, kind, *request = head.split(b" ")[1].decode().split("/")
        if kind == "job":
            jobs += 1
            await asyncio.sleep(0)
            defer_before_answer(request[0])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n")
        await writer.drain()
        if kind == "job":
            defer_after_answer(request[0])
            if jobs % 16 == 0:
                gc.collect()
    writer.close()


async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


sys.exit(asyncio.run(main()))
