"""A loop that waits 23 times with one of Python's selectors, on two pipes that are never written to.

Argument: the class of the selector. Starts when it reads a line, and exits after its last wait.
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
