"""An HTTP server on loopback, and what the services that tests stand up on it have in common."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Http(ThreadingHTTPServer):
    request_queue_size = 128  # a client uploads dozens of images at once and waits after a refusal


class LoopbackServer:
    """Listens from its creation until `stop()`, after which the port refuses."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self._http = _Http(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class LoopbackHandler(BaseHTTPRequestHandler):
    """Reads a whole body, answers with a whole one, and is silent."""

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the output of the tests clean."""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
