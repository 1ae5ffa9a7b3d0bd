"""An asyncio loop under one of four workloads, which measures its own lag by timers that were scheduled in advance.

Arguments: idle, short (2 ms of work every 8 ms), rare (a block of 200 ms every second) or saturated (timers of 10 ms of
work, the next due when one is done); and how many seconds there are to set the timers. Begins when it reads a line: sets
them, then runs its loop for SECONDS. Prints as JSON by how many seconds each of the `timers` was late, and each run of a
`sleeper` that goes to sleep again when it woke.
Timers fall due once in each of many equal stretches, somewhere in it: nobody waits for one before the next is set, as
the sleeper does, and so long blocks are met as often as they last long.
"""

import asyncio
import json
import random
import sys
import time

SECONDS = 6
TIMERS = 2000
NAP = 0.010
workload, lead = sys.argv[1], float(sys.argv[2])
late, overslept = [], []


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


async def sleeper():
    while True:
        due = time.monotonic() + NAP
        await asyncio.sleep(NAP)
        overslept.append(time.monotonic() - due)


def saturate(loop):
    """As timers, because the loop calls them in the order in which they are due: work that is ready already would go
    first, and the prober would measure the loop's queue beside its lag."""
    work(0.010)
    loop.call_later(0, saturate, loop)


async def main(start):
    loop = asyncio.get_running_loop()
    await asyncio.sleep(start - loop.time())
    running = [asyncio.create_task(sleeper())]
    if workload == "saturated":
        loop.call_soon(saturate, loop)
    else:
        running.append(asyncio.create_task(load()))
    await asyncio.sleep(start + SECONDS - loop.time())


sys.stdin.readline()
with asyncio.Runner() as runner:
    loop = runner.get_loop()
    start, stretch = loop.time() + lead, SECONDS / TIMERS
    for number in range(TIMERS):
        due = start + (number + random.random()) * stretch
        loop.call_at(due, lambda due=due: late.append(loop.time() - due))
    # Before the loop first waits: until then it is not late, for it is no loop yet. Fails where that took too long.
    time.sleep(start - loop.time() - 0.050)
    runner.run(main(start))
print(json.dumps({"timers": late, "sleeper": overslept}), flush=True)
