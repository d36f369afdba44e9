"""A server on localhost that speaks the hub's HTTP, with faults to order."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = 2  # entries of a list of files, so that every list has pages


class HubServer:
    """Files by path, and repositories whose files redirect to a store, as on the hub.

    faults[path] is what the first requests of a path suffer: a status (`429`, with Retry-After: 0), `cut` (half
    of the bytes, then the connection ends), `wrong` (other bytes), `whole` (range ignored), `shifted` (another
    range), `stall` (half, then nothing until the server closes), `nolength` (no Content-Length).
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.lists: dict[str, list[dict]] = {}
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.hits: Counter[str] = Counter()
        self.headers: dict[str, list[dict[str, str]]] = defaultdict(list)
        self.has_etags, self.has_links = True, True
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def offer(self, repo: str, files: Mapping[str, bytes]) -> None:
        """A dataset repository with these files, and the list of them."""
        for name, body in files.items():
            self.files[f"/store/{name}"] = body
            self.redirects[f"/datasets/{repo}/resolve/main/{name}"] = f"/store/{name}"
        self.lists[f"/api/datasets/{repo}/tree/main"] = [
            {"type": "file", "path": ".gitattributes", "size": 10, "oid": "0" * 40},
            *(
                {"type": "file", "path": name, "size": len(body), "oid": "1" * 40,
                 "lfs": {"oid": sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}}
                for name, body in sorted(files.items())
            ),
        ]  # fmt: skip

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, _, query = request.path.partition("?")
        self.hits[path] += 1
        self.headers[path].append(dict(request.headers))
        fault = self.faults[path].pop(0) if self.faults[path] else ""
        if fault.isdigit():
            self._send(request, int(fault), b"no", {"Retry-After": "0"})
        elif path in self.lists:
            self._send_list(request, path, query)
        elif path in self.redirects:
            body = self.files[self.redirects[path]]
            links = {"X-Linked-Size": str(len(body)), "X-Linked-ETag": f'"{sha256(body).hexdigest()}"'}
            self._send(
                request, 302, b"", {"Location": self.redirects[path], **(links if self.has_links else {})}
            )
        elif path in self.files:
            self._send_file(request, self.files[path], fault)
        else:
            self._send(request, 404, b"nothing")

    def _send_list(self, request: BaseHTTPRequestHandler, path: str, query: str) -> None:
        start = int(query.removeprefix("cursor=") or 0)
        entries = self.lists[path]
        more = {"Link": f'<{self.url}{path}?cursor={start + PAGE}>; rel="next"'}
        body = json.dumps(entries[start : start + PAGE]).encode()
        self._send(request, 200, body, more if start + PAGE < len(entries) else {})

    def _send_file(self, request: BaseHTTPRequestHandler, body: bytes, fault: str) -> None:
        etag = f'"{sha256(body).hexdigest()[:16]}"'
        headers = {"ETag": etag} if self.has_etags else {}
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        status, start = 200, 0
        if asked and request.headers.get("If-Range", etag) == etag and fault != "whole":
            start = int(asked[1]) - (1 if fault == "shifted" else 0)
            if start >= len(body):
                self._send(request, 416, b"", {"Content-Range": f"bytes */{len(body)}"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        piece = body[start:]
        if fault == "wrong":
            piece = piece.translate(bytes(byte ^ 1 for byte in range(256)))
        if fault in ("cut", "stall"):
            self._send(request, status, piece[: len(piece) // 2], headers, len(piece))
            request.wfile.flush()
            if fault == "stall":
                self.closing.wait()
            request.close_connection = True
            return
        self._send(request, status, piece, headers, None if fault == "nolength" else len(piece))
        request.close_connection = fault == "nolength"

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        length: int | None = -1,
    ) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        if length is not None:
            request.send_header("Content-Length", str(len(body) if length < 0 else length))
        request.end_headers()
        request.wfile.write(body)

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def serving() -> Iterator[HubServer]:
    server = HubServer()
    try:
        yield server
    finally:
        server.close()
