"""A small HTTP proxy in front of a server that can be told to go wrong, each fault on the real wire.

with FaultyProxy(server.port) as proxy:
    proxy.fault(Fault("status", status=503, headers={"Retry-After": "1"}), times=2)
    proxy.fault(Fault("truncate", keep=100), match="GET .*a.png")
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Fault:
    """What goes wrong.

    Attributes:
        kind: `none` does nothing; `status` answers with one; `truncate` says the full length and closes after `keep`
            bytes; `shorten` sends `keep` bytes as if they were all; `damage` flips a byte; `slow` waits before it
            answers; `drop` closes the connection without an answer; `retag` gives another ETag; `ignore-range` answers
            ranged reads with the whole object.
        after: For `drop`: whether the server gets the request (and the client no answer).
    """

    kind: str
    status: int = 503
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    keep: int = 10
    seconds: float = 0.0
    after: bool = False


@dataclass
class Rule:
    """A fault for the next `times` requests whose ``METHOD path`` matches."""

    fault: Fault
    match: re.Pattern[str]
    times: int


class FaultyProxy:
    """Listens on loopback and forwards to `port`."""

    def __init__(self, port: int) -> None:
        self.upstream, self.rules, self.seen = port, [], []
        self._lock, self.num_connections, self.num_bytes = threading.Lock(), 0, 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self):
                proxy.handle(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_one

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def process_request(self, request, client_address):
                proxy.num_connections += 1
                super().process_request(request, client_address)

            def handle_error(self, request, client_address):
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, fault: Fault, *, match: str = ".*", times: int = 1) -> None:
        """Let the next `times` matching requests go wrong."""
        with self._lock:
            self.rules.append(Rule(fault, re.compile(match, re.DOTALL), times))

    def clear(self) -> None:
        """No more faults."""
        with self._lock:
            self.rules.clear()

    def count(self, match: str) -> int:
        """Requests so far that match."""
        return sum(bool(re.match(match, request)) for request in self.seen)

    def _fault_of(self, request: str) -> Fault | None:
        with self._lock:
            self.seen.append(request)
            for rule in self.rules:
                if rule.times > 0 and rule.match.match(request):
                    rule.times -= 1
                    return rule.fault
        return None

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        fault = self._fault_of(f"{handler.command} {handler.path}")
        if fault and fault.kind == "slow":
            time.sleep(fault.seconds)
        if fault and fault.kind == "drop" and not fault.after:
            return hang_up(handler)
        if fault and fault.kind == "status":
            text = f"<Error><Code>{fault.code}</Code></Error>".encode() if fault.code else b""
            return answer(handler, fault.status, fault.headers, b"" if handler.command == "HEAD" else text)
        try:
            status, headers, data = self._forward(
                handler, body, drop_range=bool(fault and fault.kind == "ignore-range")
            )
        except OSError:  # the server is gone
            return hang_up(handler)
        if fault and fault.kind == "drop":
            return hang_up(handler)
        if fault and fault.kind == "truncate":
            answer(handler, status, {**headers, "Content-Length": str(len(data))}, data[: fault.keep])
            return hang_up(handler)
        if fault and fault.kind == "shorten":
            data = data[: fault.keep]
            headers["Content-Length"] = str(len(data))
        if fault and fault.kind == "retag":
            headers = {
                **{name: value for name, value in headers.items() if name.lower() != "etag"},
                "ETag": '"' + "0" * 32 + '"',
            }
        if fault and fault.kind == "damage":
            data = data[:-1] + bytes([data[-1] ^ 1])
        return answer(handler, status, headers, data)

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes, *, drop_range: bool):
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        try:
            dropped = {"connection", "content-length"} | ({"range"} if drop_range else set())
            headers = {name: value for name, value in handler.headers.items() if name.lower() not in dropped}
            connection.request(handler.command, handler.path, body or None, headers)
            response = connection.getresponse()
            data = response.read()
            with self._lock:
                self.num_bytes += len(data)
            kept = {name: value for name, value in response.getheaders() if name.lower() not in HOP}
            return response.status, kept, data
        finally:
            connection.close()


HOP = ("connection", "transfer-encoding", "keep-alive", "server", "date")


def answer(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes) -> None:
    handler.send_response(status)
    names = {name.lower() for name in headers}
    for name, value in headers.items():
        handler.send_header(name, value)
    if "content-length" not in names:
        handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
    handler.wfile.flush()


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    with contextlib.suppress(OSError):
        handler.connection.shutdown(socket.SHUT_RDWR)
