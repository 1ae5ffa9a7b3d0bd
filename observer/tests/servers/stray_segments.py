"""Sends TCP segments that neither begin nor belong to a connection, like a port scanner.

Arguments: PORT on 127.0.0.1, number of segments.
"""

import socket
import struct
import sys

port, count = int(sys.argv[1]), int(sys.argv[2])
address = socket.inet_aton("127.0.0.1")
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)


def segment(source):
    """A header of 20 bytes without flags."""
    without = struct.pack("!HHIIBBHHH", source, port, 1, 0, 5 << 4, 0, 1024, 0, 0)
    pseudo = address * 2 + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(without)) + without
    total = sum(struct.unpack(f"!{len(pseudo) // 2}H", pseudo))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return without[:16] + struct.pack("!H", ~total & 0xFFFF) + without[18:]


for i in range(count):
    raw.sendto(segment(10_000 + i), ("127.0.0.1", 0))
