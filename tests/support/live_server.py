"""A real server on loopback, in a thread of the tests' process."""

import threading
import time
from contextlib import contextmanager

from uhd_export.runtime.serving.http.app import create_app
from uhd_export.runtime.serving.http.server import make_server


@contextmanager
def live(service, options=None, *, fetcher=None, **server_options):
    """The address of a server over `service` for the time of the block."""
    app = create_app(service, options, fetcher=fetcher)
    server = make_server(app, port=0, grace=1, **server_options)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
