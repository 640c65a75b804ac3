"""A Hugging Face Hub on loopback: as much of it as `huggingface_hub` needs to upload a folder."""

import base64
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    """What has been sent: files by their names, under which settings, with which token."""

    created: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)


class HubServer:
    """Listens from its creation until `stop()`; with a `status`, it refuses every commit by it."""

    def __init__(self, status: int = 200) -> None:
        self.repository, self.status = Repository(), status
        self.large: dict[str, bytes] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """Of one of its requests."""
        if path.startswith("/api/repos/create"):
            self.repository.created = json.loads(body)
            owner, name = (self.repository.created[part] for part in ("organization", "name"))
            return {"url": f"{self.url}/{owner}/{name}", "id": "1"}
        if path.startswith("/api/validate-yaml"):
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [self._mode(name) for name in names]}
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            return {"transfer": "basic", "objects": [self._place(each) for each in asked]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                self._commit(line["key"], line["value"])
            name = path.removeprefix("/api/models").partition("/commit/")[0]
            address = f"{self.url}{name}/commit/{'1' * 40}"
            return {"commitUrl": address, "commitOid": "1" * 40, "success": True}
        return {}

    def _mode(self, name: str) -> dict[str, Any]:
        mode = "lfs" if name.endswith(".safetensors") else "regular"
        return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _place(self, asked: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.url}/large/{asked['oid']}"
        return {**asked, "actions": {"upload": {"href": href, "header": {}}}}

    def _commit(self, kind: str, value: dict[str, Any]) -> None:
        if kind == "file":
            self.repository.files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            self.repository.files[value["path"]] = self.large[value["oid"]]


def _handler(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.repository.tokens.add(self.headers.get("Authorization", ""))
            is_refused = server.status != 200 and "/commit/" in self.path
            content = {"error": "refused"} if is_refused else server.answer(self.path, body)
            self._reply(server.status if is_refused else 200, json.dumps(content).encode())

        def do_GET(self) -> None:
            self._reply(200, b"{}")

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.large[self.path.removeprefix("/large/")] = body
            self._reply(200, b"")

        def log_message(self, format: str, *arguments: object) -> None:
            """Keep the output of the tests clean."""

        def _reply(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
