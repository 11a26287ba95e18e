"""A moto S3 server in a process of its own: ``stop`` and ``start`` on stdin close and open its port, and lose nothing.

Run as ``python s3_process.py``; the port is printed first.
"""

import contextlib
import logging
import socket
import sys
import threading

from moto.moto_server.threaded_moto_server import MotoRequestHandler
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import ThreadedWSGIServer


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


def serve(app, port):
    server = Server("127.0.0.1", port, app, handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = DomainDispatcherApplication(create_backend_app)
    server = serve(app, 0)
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


main()
