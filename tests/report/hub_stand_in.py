"""A hub on this machine: takes repositories and commits over HTTP as the real one does, and keeps what it was sent."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubStandIn:
    """Serves until it is closed.

    Attributes:
        address: To be used as the hub's endpoint.
        files: {repository: {name: content}} after the last commit.
        private: {repository: asked to be private}.
        cards: {dataset id: card data} that it answers with.
        refuse: Status with which every commit is refused; 0 for none.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.messages: list[str] = []
        self.refuse = 0
        self._blobs: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = re.fullmatch(r"/api/datasets/([^?]+)(\?.*)?", self.path)
                if found and found[1] in hub.cards:
                    self._send({"id": found[1], "cardData": hub.cards[found[1]], "tags": [], "siblings": []})
                else:
                    self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

            def do_PUT(self) -> None:
                data, oid = self._body(), self.path.rpartition("/")[2]
                good = hashlib.sha256(data).hexdigest() == oid
                if good:
                    hub._blobs[oid] = data
                self._send({}, 200 if good else 400)

            def do_POST(self) -> None:
                data = self._body()
                if self.path == "/api/repos/create":
                    asked = json.loads(data)
                    repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
                    hub.private[repo] = bool(asked.get("private")) or asked.get("visibility") == "private"
                    self._send({"url": f"{hub.address}/{repo}", "name": repo, "id": repo})
                elif self.path == "/api/validate-yaml":
                    self._send({"errors": [], "warnings": []})
                elif "/preupload/" in self.path:
                    asked = json.loads(data)["files"]
                    big = (".safetensors", ".bin")
                    modes = [
                        {
                            "path": f["path"],
                            "uploadMode": "lfs" if f["path"].endswith(big) else "regular",
                            "shouldIgnore": False,
                            "oid": None,
                        }
                        for f in asked
                    ]
                    self._send({"files": modes})
                elif self.path.endswith("/info/lfs/objects/batch"):
                    objects = [
                        {**o, "actions": {"upload": {"href": f"{hub.address}/blobs/{o['oid']}"}}}
                        for o in json.loads(data)["objects"]
                    ]
                    self._send({"transfer": "basic", "objects": objects})
                elif found := re.fullmatch(r"/api/models/(.+)/commit/[^/?]+(\?.*)?", self.path):
                    self._commit(found[1], data)
                else:
                    self._send({"error": self.path}, 404)

            def _commit(self, repo: str, data: bytes) -> None:
                if hub.refuse:
                    self._send({"error": "You have no write access"}, hub.refuse)
                    return
                files = hub.files.setdefault(repo, {})
                for line in data.decode().splitlines():
                    part = json.loads(line)
                    value = part["value"]
                    if part["key"] == "header":
                        hub.messages.append(value["summary"])
                    elif part["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif part["key"] == "lfsFile":
                        files[value["path"]] = hub._blobs[value["oid"]]
                self._send(
                    {"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.address}/{repo}/commit/{'0' * 40}"}
                )

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    data = b""
                    while size := int(self.rfile.readline(), 16):
                        data += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return data
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def _send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                for key, item in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(text)),
                    **(headers or {}),
                }.items():
                    self.send_header(key, item)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
