"""A Hugging Face Hub on loopback: as much of it as `huggingface_hub` needs to upload a folder."""

import base64
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.loopback import LoopbackHandler, LoopbackServer


@dataclass
class Repository:
    """What has been sent: files by their names, under which settings, with which token."""

    created: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)


class HubServer(LoopbackServer):
    """With a `status`, it refuses every commit by it."""

    def __init__(self, status: int = 200) -> None:
        self.repository, self.status = Repository(), status
        self.large: dict[str, bytes] = {}
        super().__init__(_handler(self))

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


def _handler(server: HubServer) -> type[LoopbackHandler]:
    class Handler(LoopbackHandler, BaseHTTPRequestHandler):  # who names methods in capitals
        def do_POST(self) -> None:
            body = self.body()
            server.repository.tokens.add(self.headers.get("Authorization", ""))
            is_refused = server.status != 200 and "/commit/" in self.path
            content = {"error": "refused"} if is_refused else server.answer(self.path, body)
            self.reply(json.dumps(content).encode(), server.status if is_refused else 200)

        def do_GET(self) -> None:
            self.reply(b"{}")

        def do_PUT(self) -> None:
            server.large[self.path.removeprefix("/large/")] = self.body()
            self.reply(b"")

    return Handler
