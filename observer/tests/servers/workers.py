"""A server of processes that serve one connection at a time each. Prints its port, and serves lines: a number of
milliseconds to sleep for, answered with `done`.

Usage: workers.py listener N | connection
listener: N processes take one connection after another from the listener, which is all that their epoll sets hold.
connection: a process for each connection, whose epoll set holds that connection.
"""

import ctypes
import os
import select
import signal
import socket
import sys
import time

PR_SET_PDEATHSIG = 1


def fork_child():
    """Forks. Returns True in the child, which ends with its parent."""
    if os.fork():
        return False
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return True


def serve_line(connection):
    """Serves a line. Returns False at the end of the connection."""
    line = connection.recv(64)
    if line:
        time.sleep(int(line) / 1000)
        connection.sendall(b"done\n")
    return bool(line)


def take_connections(listener):
    listener.setblocking(False)
    events = select.epoll()
    events.register(listener, select.EPOLLIN)
    while True:
        events.poll()
        try:
            connection = listener.accept()[0]
        except BlockingIOError:
            continue
        connection.setblocking(True)
        with connection:
            while serve_line(connection):
                pass


def serve_connection(connection):
    events = select.epoll()
    events.register(connection, select.EPOLLIN)
    while True:
        events.poll()
        if not serve_line(connection):
            os._exit(0)


def main():
    listener = socket.create_server(("127.0.0.1", 0))
    if sys.argv[1] == "listener":
        for _ in range(int(sys.argv[2])):
            if fork_child():
                take_connections(listener)
        print(listener.getsockname()[1], flush=True)
        signal.pause()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print(listener.getsockname()[1], flush=True)
    while True:
        with listener.accept()[0] as connection:
            if fork_child():
                listener.close()
                serve_connection(connection)


main()
