"""A W&B server on loopback: enough of its protocol for the real client to be online with it.

It records what it gets. `stop()` in mid-run is a network that goes away: the port then refuses.
"""

import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.loopback import LoopbackHandler, LoopbackServer

API_KEY = "0123456789" * 4  # made up: this server accepts any
ENTITY = {"id": "entity", "name": "someone"}


@dataclass
class Received:
    """What the client has sent."""

    operations: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The config without W&B's wrapping of its values."""
        return {name: entry["value"] for name, entry in json.loads(self.run["config"]).items()}


class WandbServer(LoopbackServer):
    """Answers one operation, `refused`, with an error."""

    def __init__(self, refused: str = "") -> None:
        self.received, self.refused = Received(), refused
        super().__init__(_handler(self))

    def graphql(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """Answer one of the operations that a run needs; others get an empty answer."""
        self.received.operations.append(operation)
        match operation:
            case "Viewer":
                viewer = {"id": "viewer", "entity": ENTITY["name"], "username": ENTITY["name"]}
                return {"viewer": {**viewer, "email": "", "flags": "{}", "teams": {"edges": []}}}
            case "UpsertBucket":
                self.received.run.update({k: v for k, v in given.items() if v is not None})
                project = {"id": "project", "name": given["project"], "entity": ENTITY}
                bucket = {"id": "run", "name": given["name"], "displayName": given["displayName"]}
                return {"upsertBucket": {"bucket": {**bucket, "project": project}}}
            case "RunResumeStatus":
                return {"model": {"id": "project", "name": "p", "entity": ENTITY, **self._known()}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": self._place(name)} for name in given["files"]]
                return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "ArtifactType":
                return {"project": None}  # there is no such artifact yet
            case "CreateArtifact":
                self.received.artifacts.append(given["input"]["artifactCollectionName"])
                artifact = {"id": self.received.artifacts[-1], "state": "PENDING"}
                return {"createArtifact": {"artifact": {**artifact, "artifactSequence": ENTITY}}}
            case "CreateArtifactManifest":
                place = self._place(f"{given['artifactID']}/manifest")
                file = {"id": "file", "uploadUrl": place, "uploadHeaders": []}
                return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
            case "CreateArtifactFiles":
                edges = [{"node": self._file(each)} for each in given["input"]["artifactFiles"]]
                return {"createArtifactFiles": {"files": {"edges": edges}}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": given["artifactID"]}}}
        return {}

    def _known(self) -> dict[str, Any]:
        """What a continued run wants to know of its past."""
        if not self.received.history:
            return {"bucket": None}
        rows = self.received.history
        tail = json.dumps([json.dumps(row) for row in rows[-1:]])
        counts = {"historyLineCount": len(rows), "logLineCount": 0, "eventsLineCount": 0}
        summary = json.dumps(self.received.summary)
        texts = {"historyTail": tail, "eventsTail": "[]", "summaryMetrics": summary, "config": "{}"}
        name = self.received.run.get("name", "")
        return {
            "bucket": {
                "name": name,
                "id": "run",
                **counts,
                **texts,
                "tags": [],
                "wandbConfig": '{"t": 1}',
            }
        }

    def _file(self, file: dict[str, Any]) -> dict[str, Any]:
        place = self._place(f"{file['artifactID']}/{file['name']}")
        artifact = {"id": file["artifactID"]}
        node = {"storagePath": file["name"], "uploadUrl": place, "artifact": artifact}
        return {**node, "uploadHeaders": [], "uploadMultipartUrls": None}

    def _place(self, name: str) -> str:
        return f"{self.url}/uploads/{name}"

    def file_stream(self, sent: dict[str, Any]) -> None:
        """Record the lines of a run's log and its end."""
        files = sent.get("files", {})
        if history := files.get("wandb-history.jsonl"):
            del self.received.history[history["offset"] :]  # sent again after a lost answer
            self.received.history.extend(json.loads(line) for line in history["content"])
        for line in files.get("wandb-summary.json", {"content": []})["content"]:
            self.received.summary = json.loads(line)
        if sent.get("complete"):
            self.received.exit_code = sent["exitcode"]


def _handler(server: WandbServer) -> type[LoopbackHandler]:
    class Handler(LoopbackHandler, BaseHTTPRequestHandler):  # who names methods in capitals
        def do_POST(self) -> None:
            body = self.body()
            answer: dict[str, Any] = {}
            if self.path == "/graphql":
                asked = json.loads(body)
                # The Python half of the client does not name its operations.
                operation = asked.get("operationName") or asked["query"].split("(")[0].split()[-1]
                answer = {"data": server.graphql(operation, asked.get("variables") or {})}
                if operation == server.refused:
                    answer = {"errors": [{"message": "refused"}]}
            elif self.path.endswith("/file_stream"):
                server.file_stream(json.loads(body))
            self.reply(json.dumps(answer).encode())

        def do_PUT(self) -> None:
            server.received.uploads[self.path.removeprefix("/uploads/")] = self.body()
            self.reply(b"")

    return Handler
