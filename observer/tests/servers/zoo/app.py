"""Handlers of the zoo's Python servers: `/stall` blocks for 150 ms."""

import time


def block(path):
    if path == "/stall":
        time.sleep(0.15)


def wsgi(environ, start_response):
    block(environ["PATH_INFO"])
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


async def asgi(scope, receive, send):
    if scope["type"] == "http":
        block(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
