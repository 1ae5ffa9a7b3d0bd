"""An asyncio loop that collects garbage on request and reports how long that took.

Each line of input is a command. `collect N` collects N times, each time in a separate slice, and prints JSON: the number
of collections and their duration in seconds, measured in this process. `fork` prints the pid of a child that collects
without being asked. Nothing else collects garbage here.
"""

import asyncio
import gc
import json
import os
import sys
import time

gc.disable()
# A large heap, so that a collection takes longer than a call.
ballast = [[n] for n in range(100_000)]
began, count, seconds = 0.0, 0, 0.0


def measure(phase, _info):
    global began, count, seconds
    if phase == "start":
        began = time.monotonic()
    else:
        seconds += time.monotonic() - began
        count += 1


gc.callbacks.append(measure)


async def collect(times):
    for _ in range(times):
        gc.collect()
        await asyncio.sleep(0.005)


def fork():
    child = os.fork()
    if child == 0:
        for _ in range(600):
            time.sleep(0.1)
            gc.collect()
        os._exit(0)
    return child


async def main():
    commands = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(commands)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    while line := await commands.readline():
        command, *times = line.split()
        if command == b"fork":
            print(fork(), flush=True)
        else:
            await collect(int(times[0]))
            print(json.dumps({"count": count, "seconds": seconds}), flush=True)


asyncio.run(main())
