"""A registry on loopback: takes what comfy-cli publishes and gives it back to what installs.

comfy-cli's test registry is fixed at http://localhost:8080. The stub is an HTTP proxy, so that this address leads to it
on whatever port is free, and nothing that a test runs can reach a real registry.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit


class RegistryStub:
    """Context manager around the server; ``versions`` and ``archives`` hold what was published."""

    def __init__(self) -> None:
        self.versions: list[dict[str, Any]] = []
        self.archives: dict[str, bytes] = {}

    def __enter__(self) -> RegistryStub:
        stub = self

        class Handler(_Handler):
            registry = stub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead comfy-cli here."""
        proxy = f"http://127.0.0.1:{self._server.server_port}"
        return {"ENVIRONMENT": "dev", "http_proxy": proxy, "HTTP_PROXY": proxy, "no_proxy": "", "NO_PROXY": ""}

    def publish(self, publisher: str, node: str, body: dict[str, Any]) -> dict[str, Any]:
        version = body["node_version"]["version"]
        self.versions.append({"publisher": publisher, **body})
        answered = {
            "id": f"{node}-{version}",
            "version": version,
            "changelog": body["node_version"].get("changelog", ""),
        }
        return {"node_version": answered, "signedUrl": f"http://localhost:8080/archives/{node}.zip"}

    def install(self, node: str) -> dict[str, Any] | None:
        if f"/archives/{node}.zip" not in self.archives:
            return None
        version = self.versions[-1]["node_version"]
        url = f"http://localhost:8080/archives/{node}.zip"
        return {"id": f"{node}-{version['version']}", "version": version["version"], "downloadUrl": url}


class _Handler(BaseHTTPRequestHandler):
    registry: RegistryStub

    def do_POST(self) -> None:
        match = re.fullmatch(r"/publishers/([^/]+)/nodes/([^/]+)/versions", self._route())
        body = json.loads(self._body())
        self._answer(201, self.registry.publish(*match.groups(), body)) if match else self._answer(404, {})

    def do_PUT(self) -> None:
        self.registry.archives[self._route()] = self._body()
        self._answer(200, {})

    def do_GET(self) -> None:
        if (archive := self.registry.archives.get(self._route())) is not None:
            self._send(200, "application/zip", archive)
        elif (match := re.fullmatch(r"/nodes/([^/]+)/install", self._route())) and (
            version := self.registry.install(match[1])
        ):
            self._answer(200, version)
        else:
            self._answer(404, {"message": "not found"})

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _route(self) -> str:
        return urlsplit(self.path).path

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(body).encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
