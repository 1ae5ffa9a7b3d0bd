"""An asyncio server whose requests leave work behind them, and which writes down what that work really belongs to.

GET /job/ID defers PIECES pieces of work in all the ways that asyncio has, some before it answers and some after;
anything else is only answered. Connections are kept alive. Each piece, when it starts, appends a line of JSON to the
file named on the command line: the request's ID, its function, how many pieces led to it, its thread, and when it was
deferred and started by CLOCK_MONOTONIC in ns.
"""

import asyncio
import gc
import json
import os
import sys
import threading
import time

PIECES = 15
truth = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
running = set()
waiting = None
jobs = 0


def note(function, piece):
    request, depth, enqueued = piece
    line = {
        "request": request,
        "class": function.__qualname__,
        "depth": depth,
        "thread": threading.get_native_id(),
        "enqueued": enqueued,
        "start": time.monotonic_ns(),
    }
    os.write(truth, json.dumps(line).encode() + b"\n")


def child(piece):
    request, depth, _ = piece
    return request, depth + 1, time.monotonic_ns()


def start(coroutine):
    task = asyncio.create_task(coroutine)
    running.add(task)
    task.add_done_callback(running.discard)


def later(seconds, function, *args):
    asyncio.get_running_loop().call_later(seconds, function, *args)


async def mail(piece):
    """The first of a chain three deep."""
    note(mail, piece)
    await asyncio.sleep(0.01)
    start(receipt(child(piece)))


async def receipt(piece):
    note(receipt, piece)
    start(archive(child(piece)))
    await asyncio.sleep(0)


async def archive(piece):
    note(archive, piece)


def expire(piece):
    note(expire, piece)


def charge(piece):
    """Fails twice and is tried again."""
    note(charge, piece)
    if piece[1] < 3:
        later(0.005, charge, child(piece))


async def thumbnail(piece):
    note(thumbnail, piece)
    await asyncio.to_thread(resize, child(piece))


def resize(piece):
    note(resize, piece)
    time.sleep(0.002)


async def follow(piece, signal):
    """Is woken by the next request, but belongs to its own."""
    note(follow, piece)
    await asyncio.wait([signal], timeout=0.2)
    start(notify(child(piece)))


async def notify(piece):
    note(notify, piece)


async def index(piece):
    note(index, piece)
    await asyncio.gather(store(child(piece)), store(child(piece)))


async def store(piece):
    note(store, piece)
    await asyncio.sleep(0.001)


class Report:
    def send(self, piece):
        note(self.send, piece)


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
