"""An asyncio loop under one of four workloads, which measures its own lag by timers that were scheduled in advance.

Argument: idle, short (2 ms of work every 8 ms), rare (a block of 200 ms every second) or saturated (timers of 10 ms of
work, the next due when one is done). Begins when it reads a line, runs for SECONDS and prints by how many seconds each timer was late.
Timers fall due once in each of many equal stretches, somewhere in it: nobody waits for one before the next is set, as
a prober that arms its timer again would, and so long blocks are met as often as they last long.
"""

import asyncio
import json
import random
import sys
import time

SECONDS = 6
TIMERS = 2000
workload = sys.argv[1]
late = []


def work(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


async def load():
    while True:
        if workload == "idle":
            await asyncio.sleep(1)
        elif workload == "short":
            work(0.002)
            await asyncio.sleep(0.006)
        else:
            time.sleep(0.2)
            await asyncio.sleep(0.8)


def saturate(loop):
    """As timers, because the loop calls them in the order in which they are due: work that is ready already would go
    first, and the prober would measure the loop's queue beside its lag."""
    work(0.010)
    loop.call_later(0, saturate, loop)


async def main(start):
    loop = asyncio.get_running_loop()
    await asyncio.sleep(start - loop.time())
    if workload == "saturated":
        loop.call_soon(saturate, loop)
    else:
        running = asyncio.create_task(load())
    await asyncio.sleep(start + SECONDS - loop.time())


sys.stdin.readline()
with asyncio.Runner() as runner:
    loop = runner.get_loop()
    # Setting the timers takes long, and is done before the loop first waits.
    start, stretch = loop.time() + 0.2, SECONDS / TIMERS
    for number in range(TIMERS):
        due = start + (number + random.random()) * stretch
        loop.call_at(due, lambda due=due: late.append(loop.time() - due))
    runner.run(main(start))
print(json.dumps(late), flush=True)
