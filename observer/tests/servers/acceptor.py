"""Listens in a chosen way, and accepts, connects or resets only on request, so that a test controls the accept queue.

Arguments: KIND (v4, v6, dual, unix, abstract), METHOD (accept4, accept, nonblocking, deferred: accept4 with
TCP_DEFER_ACCEPT, or multipath: accept4 with Multipath TCP), BACKLOG, MEMBERS of the SO_REUSEPORT group. Prints its port or path. Each line of input is a command, answered by one line:
  connect N [FAMILY]   begins N connections to itself and waits for them, for at most 0.2 s; prints how many succeeded.
                       FAMILY is v4, v6, or multipath for Multipath TCP over IPv4
  send                 sends a byte on each of its own connections
  accept N [MEMBER]    accepts N connections, only from the given member of the group if there is one; prints how many
  reset                resets all of its own connections, accepted or not
  hang_up              closes both ends of all connections
  close, listen        closes the listeners; listens again on the same port or path
"""

import ctypes
import os
import select
import socket
import struct
import sys
import tempfile
import time

kind, method, backlog, members = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
libc = ctypes.CDLL(None, use_errno=True)
listeners, clients, accepted = [], [], []
MULTIPATH = 262
path = {"unix": os.path.join(tempfile.mkdtemp(), "socket"), "abstract": f"\0observer-test-{os.getpid()}"}.get(kind)
port = 0


def listen():
    global port
    for _ in range(members):
        if path:
            if kind == "unix" and os.path.exists(path):
                os.unlink(path)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
        else:
            family = socket.AF_INET if kind == "v4" else socket.AF_INET6
            listener = socket.socket(family, socket.SOCK_STREAM, MULTIPATH if method == "multipath" else 0)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if members > 1:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if kind == "dual":
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            if method == "deferred":
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
            listener.bind(({"v4": "127.0.0.1", "v6": "::1", "dual": "::"}[kind], port))
            port = listener.getsockname()[1]
        listener.listen(backlog)
        listener.setblocking(method != "nonblocking")
        listeners.append(listener)


def connect(count, family=None):
    new = []
    for _ in range(count):
        if path:
            client = socket.socket(socket.AF_UNIX)
            client.connect(path)
        else:
            to_v4 = (family or kind) in ("v4", "multipath")
            protocol = MULTIPATH if family == "multipath" else 0
            client = socket.socket(socket.AF_INET if to_v4 else socket.AF_INET6, socket.SOCK_STREAM, protocol)
            client.setblocking(False)
            client.connect_ex(("127.0.0.1" if to_v4 else "::1", port))
        new.append(client)
    end = time.monotonic() + 0.2
    poll = select.poll()
    for client in new:
        poll.register(client, select.POLLOUT)
    connected = set()
    while len(connected) < count and time.monotonic() < end:
        for fd, _ in poll.poll(20):
            connected.add(fd)
            poll.unregister(fd)
    clients.extend(new)
    return len(connected)


def accept(count, member=None):
    candidates = listeners if member is None else [listeners[int(member)]]
    done = 0
    while done < count:
        ready, _, _ = select.select(candidates, [], [], 1)
        if not ready:
            break
        if method == "accept":
            fd = libc.accept(ready[0].fileno(), None, None)
            accepted.append(socket.socket(fileno=fd))
        else:
            accepted.append(ready[0].accept()[0])
        done += 1
    return done


def reset():
    for client in clients:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    clients.clear()


def hang_up():
    for connection in clients + accepted:
        connection.close()
    clients.clear()
    accepted.clear()


listen()
print(path.replace("\0", "@") if path else port, flush=True)
for line in sys.stdin:
    command, *words = line.split()
    answer = 0
    if command == "connect":
        answer = connect(int(words[0]), *words[1:])
    elif command == "accept":
        answer = accept(int(words[0]), *words[1:])
    elif command == "send":
        answer = sum(client.send(b"x") for client in clients)
    elif command == "reset":
        reset()
    elif command == "hang_up":
        hang_up()
    elif command == "close":
        while listeners:
            listeners.pop().close()
    elif command == "listen":
        listen()
    print(answer, flush=True)
