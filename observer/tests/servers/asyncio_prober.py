"""An asyncio loop with one of four workloads that measures its own lag with timers that are all set in advance.

Arguments: the workload, and the time in seconds for setting the timers. Workloads are idle, short (2 ms of work every
8 ms), rare (a block of 200 ms every second) and saturated (timers with 10 ms of work, each due when the one before has
finished). Waits for a line of input, sets the timers, and then runs its loop for SECONDS. Prints JSON: how many seconds
each of the `timers` was late, and each run of a `sleeper` that goes back to sleep when it wakes up.

One timer is due at a random time in each of many equal intervals. Unlike the sleeper, a timer is set regardless of
whether the one before has fired, so a block is measured in proportion to its length.
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
    """Uses timers, because the loop runs them in the order in which they are due. Callbacks that are ready already would
    run first, and the prober would also measure the loop's queue."""
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
    # Block before the loop waits for the first time: a loop that has not started is not late. Fails if setting timers
    # took too long.
    time.sleep(start - loop.time() - 0.050)
    runner.run(main(start))
print(json.dumps({"timers": late, "sleeper": overslept}), flush=True)
