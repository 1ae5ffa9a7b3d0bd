"""A loop that waits 23 times with one of Python's selectors, on two pipes that nobody writes to.

Argument: the selector's class. Begins when it reads a line; the wait that a loop begins before it ends is the last.
"""

import os
import selectors
import sys

selector = getattr(selectors, sys.argv[1])()
for _ in range(2):
    selector.register(os.pipe()[0], selectors.EVENT_READ)
sys.stdin.readline()
for _ in range(23):
    selector.select(0.01)
