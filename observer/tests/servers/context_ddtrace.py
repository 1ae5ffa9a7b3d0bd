"""An asyncio server with a tracer (Datadog's) that publishes OpenTelemetry's thread context, as specified in OTEP 4947.

GET /job/ID opens a span and defers ten tasks, some of which open spans of their own and defer more; any other path only
responds. Connections are kept alive. When a task starts, it appends a line of JSON to the file given as argument: the ID
of the request, the start by CLOCK_MONOTONIC in ns, and the trace and span that the tracer reported as current when the
task was enqueued. No trace leaves the process.
"""

import asyncio
import json
import os
import sys
import time

os.environ |= {
    "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
    "DD_REMOTE_CONFIGURATION_ENABLED": "false",
    "DD_TRACE_AGENT_URL": "http://127.0.0.1:1",
    "DD_TRACE_OTEL_CTX_ENABLED": "true",
}

from ddtrace import patch
from ddtrace.trace import TraceFilter, tracer

truth = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
running = set()


class Drop(TraceFilter):
    def process_trace(self, trace):
        return None


def note(function, record):
    request, trace, span = record
    line = {
        "request": request,
        "class": function.__name__,
        "trace": trace,
        "span": span,
        "start": time.monotonic_ns(),
    }
    os.write(truth, json.dumps(line).encode() + b"\n")


def deferred(request):
    context = tracer.current_trace_context()
    if context is None:
        return request, None, None
    return request, f"{context.trace_id:032x}", f"{context.span_id:016x}"


def start(function, request):
    task = asyncio.create_task(function(deferred(request)))
    running.add(task)
    task.add_done_callback(running.discard)


async def mail(record):
    """The first task of a chain of three."""
    note(mail, record)
    with tracer.trace("mail"):
        await asyncio.sleep(0.01)
        start(receipt, record[0])


async def receipt(record):
    note(receipt, record)
    with tracer.trace("receipt"):
        start(archive, record[0])
        await asyncio.sleep(0)


async def archive(record):
    note(archive, record)


def expire(record):
    note(expire, record)


def charge(record):
    note(charge, record)
    with tracer.trace("charge"):
        asyncio.get_running_loop().call_later(0.005, refund, deferred(record[0]))


def refund(record):
    note(refund, record)


async def thumbnail(record):
    note(thumbnail, record)
    with tracer.trace("thumbnail"):
        await asyncio.to_thread(resize, deferred(record[0]), asyncio.get_running_loop())


def resize(record, loop):
    """Enqueues from another thread."""
    note(resize, record)
    with tracer.trace("resize"):
        loop.call_soon_threadsafe(publish, deferred(record[0]))


def publish(record):
    note(publish, record)


async def audit(record):
    """Is enqueued outside of any span."""
    note(audit, record)


async def job(request):
    loop = asyncio.get_running_loop()
    with tracer.trace("job"):
        await asyncio.sleep(0)
        start(mail, request)
        loop.call_later(0.02, expire, deferred(request))
        loop.call_soon(charge, deferred(request))
        await asyncio.sleep(0.001)
        start(thumbnail, request)
    start(audit, request)


async def serve(reader, writer):
    while head := await reader.readline():
        while await reader.readline() not in (b"\r\n", b""):
            pass
        _, kind, *request = head.split(b" ")[1].decode().split("/")
        if kind == "job":
            await job(request[0])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n")
        await writer.drain()
    writer.close()


async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


tracer.configure(trace_processors=[Drop()])
patch(asyncio=True, futures=True)
sys.exit(asyncio.run(main()))
