"""A moto S3 server in a process of its own: ``stop`` and ``start`` on stdin close and open its port, and lose nothing.

    python s3_process.py [PORT FOLDER]

The port is printed first. With a folder the process may be killed: a journal in it has every request that changed
something, and the next process repeats them before it listens; ``requests.log`` has every request, a line for each.
"""

import contextlib
import io
import logging
import pickle
import socket
import sys
import threading
from pathlib import Path

from moto.moto_server.threaded_moto_server import MotoRequestHandler
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import ThreadedWSGIServer
from werkzeug.test import run_wsgi_app


class Server(ThreadedWSGIServer):
    """Forgets no connection, so that stopping ends them all, as the end of a process would."""

    daemon_threads = True
    connections: set[socket.socket] = set()

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)


class Journaled:
    """An application whose changes are on disk before they are answered."""

    def __init__(self, app, folder: Path) -> None:
        self.app, self.lock = app, threading.Lock()
        path = folder / "journal"
        if path.exists():
            self.repeat(path)
        self.journal, self.requests = path.open("ab", buffering=0), (folder / "requests.log").open("ab", buffering=0)

    def repeat(self, path: Path) -> None:
        with path.open("rb+") as stream:
            whole = 0
            with contextlib.suppress(EOFError, pickle.UnpicklingError):  # the last one may be torn
                while True:
                    self.run(*pickle.load(stream))
                    whole = stream.tell()
            stream.truncate(whole)

    def run(self, names, body):
        own = {
            "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(body),
            "wsgi.errors": sys.stderr, "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False,
            "CONTENT_LENGTH": str(len(body)),
        }  # fmt: skip
        return run_wsgi_app(self.app, {**names, **own}, buffered=True)

    def __call__(self, environ, start_response):
        method = environ["REQUEST_METHOD"]
        self.requests.write(f"{method} {environ['PATH_INFO']}\n".encode())
        if method in ("GET", "HEAD"):
            return self.app(environ, start_response)
        ends = environ.get("wsgi.input_terminated")
        body = environ["wsgi.input"].read(*[] if ends else [int(environ.get("CONTENT_LENGTH") or 0)])
        dropped = ("wsgi.", "werkzeug.", "HTTP_TRANSFER_ENCODING")
        names = {k: value for k, value in environ.items() if isinstance(value, str) and not k.startswith(dropped)}
        with self.lock:
            answer, status, headers = self.run(names, body)
            if status.startswith("2"):
                self.journal.write(pickle.dumps((names, body)))
        start_response(status, list(headers))
        return answer


def serve(app, port):
    server = Server("127.0.0.1", port, app, handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main(port=0, folder=None):
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = DomainDispatcherApplication(create_backend_app)
    app = Journaled(app, Path(folder)) if folder else app
    server = serve(app, int(port))
    port = server.server_address[1]
    print(port, flush=True)
    for line in sys.stdin:
        if line.strip() == "stop" and server is not None:
            server.shutdown()
            for connection in list(server.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            server = None
        elif line.strip() == "start" and server is None:
            server = serve(app, port)
        print("done", flush=True)


main(*sys.argv[1:])
