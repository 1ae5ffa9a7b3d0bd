"""An asyncio server that blocks its event loop on request and reports how long each block took.

GET /sleep/MS blocks in a system call, GET /spin/MS uses MS of CPU time, any other path responds at once.
The response is JSON: wall and CPU seconds of the block, measured in this process, and the connections accepted so far.
The file given as argument contains, as a 64-bit number, how often the loop's wait has returned.
"""

import asyncio
import json
import mmap
import struct
import sys
import time

connections = 0


def count_waits(selector, path):
    """Counts without a system call, so that counting is not observed."""
    with open(path, "wb+") as file:
        file.truncate(8)
        counter = mmap.mmap(file.fileno(), 8)
    select, waits = selector.select, 0

    def counted(timeout=None):
        nonlocal waits
        events = select(timeout)
        waits += 1
        struct.pack_into("Q", counter, 0, waits)
        return events

    selector.select = counted


def block(kind, seconds):
    wall, cpu = time.monotonic(), time.thread_time()
    if kind == "sleep":
        time.sleep(seconds)
    elif kind == "spin":
        while time.thread_time() - cpu < seconds:
            pass
    return {"wall": time.monotonic() - wall, "cpu": time.thread_time() - cpu}


async def serve(reader, writer):
    global connections
    connections += 1
    request = await reader.readuntil(b"\r\n\r\n")
    _, kind, *amount = request.split(b" ")[1].decode().split("/")
    times = block(kind, int(amount[0]) / 1000 if amount else 0)
    body = json.dumps({**times, "connections": connections}).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()
    writer.close()


async def main():
    count_waits(asyncio.get_running_loop()._selector, sys.argv[1])
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


sys.exit(asyncio.run(main()))
