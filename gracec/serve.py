"""Serve a compiled model, and the page that runs it in a browser, over HTTP.

    /                   the page: the files of an app folder, its packages in `node_modules`
    /model/PATH         the model: the files of a directory with ONNX graphs

Files are read and nothing else is done. The headers let WebAssembly use threads, and keep the page
from asking any other host for anything.

A page of somebody else must not read them: a request has to name this machine as its host, which
the page of a name that was made to resolve to it does not, and may come from no other origin. And
no client takes the place of the others: each has seconds to ask and to read, and the one that has
waited longest gives way.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from gracec.backends.onnx.session import FOLDER, SessionConfig
from gracec.errors import GracecError, first_line

try:
    import anyio
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from starlette.types import Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise GracecError(
        f"{error.name} is not installed", where="gracec serve", fix="pip install 'gracec[serve]'"
    ) from error

MODEL = "model"
PACKAGES = ("@huggingface/transformers", "onnxruntime-web")
TEXT = {".css": "css", ".html": "html", ".js": "javascript", ".mjs": "javascript"}
TYPES = {
    **{suffix: f"text/{kind}; charset=utf-8" for suffix, kind in TEXT.items()},
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
    ".webp": "image/webp",
}
"""Suffix of a file -> its MIME type. Not read from the machine, where they may be missing."""
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; "
    "img-src 'self' blob:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
HEAD_SECONDS, READ_SECONDS, KEPT_SECONDS = 10.0, 30.0, 15
"""For the first line and headers of a request; for the client to take what is sent; between two
requests."""
MOST_WAITING, MOST_ANSWERS = 256, 384
"""Clients that are waited for, of which the oldest gives way; answers that are given at once."""
CHUNK = 1 << 18
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Server:
    """An HTTP server for one model and one page; bound when it is made, runs by `serve_forever`.

    Attributes:
        url: of the page.
        hosts: names by which it may be asked for. Where it listens to other machines, any IP
            address is one as well: names are what an attacker can point at it, addresses are not.
    """

    def __init__(
        self,
        model: Path,
        app: Path,
        host: str = "127.0.0.1",
        port: int = 8000,
        allow_hosts: Iterable[str] = (),
    ) -> None:
        """
        Args:
            model: a directory with a folder `onnx`.
            app: the folder of the page, with its packages installed.
            port: 0 for any that is free.
            allow_hosts: further names by which it may be asked for.

        Raises:
            GracecError: if either is not whole, or the address cannot be listened on.
        """
        _check_model(model)
        _check_app(app)
        self.model, self.app = model.resolve(), app.resolve()
        self._socket = _bound(host, port)
        self.server_address: tuple[str, int] = self._socket.getsockname()[:2]
        self.server_port = self.server_address[1]
        self.hosts = LOOPBACK | {name.lower() for name in (host, *allow_hosts)}
        self.any_address = not ipaddress.ip_address(self.server_address[0]).is_loopback
        self._stopped = threading.Event()
        self._stopped.set()
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._answer,
                http=Connection,
                ws="none",
                interface="asgi3",
                proxy_headers=False,
                lifespan="off",
                log_config=None,
                log_level="critical",  # the page says what is wrong, and to whom it matters
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEPT_SECONDS,
                timeout_graceful_shutdown=2,
            )
        )

    @property
    def url(self) -> str:
        host, port = self.server_address
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def serve_forever(self) -> None:
        """Answer until `shutdown`, or until a signal interrupts it."""
        self._stopped.clear()
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._stopped.set()

    def shutdown(self) -> None:
        """End `serve_forever`, which another thread runs, and wait for it."""
        self._server.should_exit = True
        self._stopped.wait()

    def server_close(self) -> None:
        """Free the port."""
        self._socket.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.server_close()

    def find(self, target: str) -> Path | None:
        """The file of a request target, or None if there is none that may be read."""
        start, *parts = unquote(target.partition("?")[0]).split("/")
        root = self.app
        if parts[:1] == [MODEL]:
            root, parts = self.model, parts[1:]
        elif parts == [""]:
            parts = ["index.html"]
        if start or not parts or any(re.match(r"\.|$|.*[\\\0]", part) for part in parts):
            return None
        try:
            path = root.joinpath(*parts).resolve()  # a link may lead to another file of the root
            return path if path.is_relative_to(root) and path.is_file() else None
        except (OSError, RuntimeError, ValueError):  # too long a name, links in a circle, no text
            return None

    def allows(self, host: str) -> bool:
        """Whether a request may ask for this host: a name or an address, with or without a port."""
        try:
            asked = urlsplit(f"//{host}")
            name = asked.hostname or ""
            if asked.username is not None or not (asked.port is None or name):
                return False
            if name in self.hosts:
                return True
            return self.any_address and bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    @property
    def answering(self) -> int:
        """Requests that are being answered to clients that are still there."""
        connections = self._server.server_state.connections
        return sum(
            isinstance(one, Connection) and one.busy and not one.transport.is_closing()
            for one in connections
        )

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if self.answering > MOST_ANSWERS:  # this one among them
            response = _error(HTTPStatus.SERVICE_UNAVAILABLE)
            response.headers["Retry-After"] = "1"
            await response(scope, receive, send)
            return
        await self._response(request)(scope, receive, send)

    def _response(self, request: Request) -> Response:
        headers = request.headers
        hosts, origin = headers.getlist("host"), headers.get("origin")
        if len(hosts) != 1 or not self.allows(hosts[0]):
            return _error(HTTPStatus.MISDIRECTED_REQUEST)
        if origin is not None and origin.lower() != f"http://{hosts[0].lower()}":
            return _error(HTTPStatus.FORBIDDEN)
        if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
            return _error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        if request.method not in ("GET", "HEAD"):
            return _error(HTTPStatus.NOT_IMPLEMENTED)
        path = self.find(request.scope["raw_path"].decode("ascii"))
        if path is None:
            return _error(HTTPStatus.NOT_FOUND)
        try:
            found = path.stat()
            if not os.access(path, os.R_OK):
                return _error(HTTPStatus.FORBIDDEN)
        except OSError:
            return _error(HTTPStatus.NOT_FOUND)
        size, tag = found.st_size, f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
        if headers.get("if-none-match") == tag:
            return Response(None, HTTPStatus.NOT_MODIFIED, {**HEADERS, "ETag": tag})
        part = byte_range(headers.get("range"), size)
        if part is None:
            outside = {**HEADERS, "Content-Range": f"bytes */{size}", "Content-Length": "0"}
            return Response(b"", HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, outside)
        told = {
            **HEADERS,
            "Accept-Ranges": "bytes",
            "ETag": tag,
            "Content-Length": str(len(part)),
            "Content-Type": TYPES.get(path.suffix, "application/octet-stream"),
        }
        status = HTTPStatus.OK
        if len(part) != size:
            status = HTTPStatus.PARTIAL_CONTENT
            told["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
        if request.method == "HEAD":
            return Response(None, status, told)
        return StreamingResponse(_bytes(path, part), status, told)


class Connection(H11Protocol):
    """A connection with deadlines: uvicorn itself waits for a slow client for as long as it likes.

    A client that has been let in and says nothing gives way to a new one.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        cycle: Any = self.cycle  # None before the first request
        return cycle is not None and not cycle.response_complete

    @property
    def waiting(self) -> bool:
        """Whether the client has to do something next: to ask, or to take what is sent."""
        return not self.busy or self._reading is not None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._head = self.loop.call_later(HEAD_SECONDS, transport.abort)
        others = [c for c in self.connections if isinstance(c, Connection) and c is not self]
        waiting = [c for c in others if c.waiting and not c.transport.is_closing()]
        waiting.sort(key=lambda connection: connection._since)
        for one in waiting[: max(0, len(waiting) + 1 - MOST_WAITING)]:
            one.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._head is None and not self.busy:
            self._since = self.loop.time()
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)
        super().data_received(data)
        if self.busy:
            self._stop_head()

    def on_response_complete(self) -> None:
        self._stop_head()
        self._since = self.loop.time()
        super().on_response_complete()
        if self.transport.is_closing():  # what is left to send has to be taken, too
            self.pause_writing()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reading is None:
            self._since = self.loop.time()
            self._reading = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_reading()

    def _stop_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = None

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._reading = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head()
        self._stop_reading()
        super().connection_lost(exc)


async def _bytes(path: Path, part: range) -> AsyncIterator[bytes]:
    async with await anyio.open_file(path, "rb") as file:
        await file.seek(part.start)
        left = len(part)
        while left and (chunk := await file.read(min(left, CHUNK))):
            yield chunk
            left -= len(chunk)


def _error(status: HTTPStatus) -> Response:
    """The connection ends with it: what else the client sends is not read."""
    text = f"{status.value} {status.phrase}\n"
    headers = {**HEADERS, "Connection": "close", "Content-Type": "text/plain; charset=utf-8"}
    return Response(text, status, headers)


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4]
        return socket.create_server((str(address[0]), port), family=family, backlog=1024)
    except (OSError, ValueError, OverflowError) as error:  # ValueError: no text that names a host
        reason = getattr(error, "strerror", None) or first_line(error)
        raise GracecError(
            f"cannot listen ({reason})",
            where=f"{host}:{port}",
            fix="give another --host or --port; port 0 takes any that is free",
        ) from error


def byte_range(header: str | None, size: int) -> range | None:
    """The bytes that a `Range` header asks for: all where it asks for nothing that is understood,
    None where it asks for bytes that are not there."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if found is None or found.group(0) == "bytes=-":
        return range(size)
    first, last = found.groups()
    if not first:
        start, stop = max(size - int(last), 0), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
    return range(start, stop) if start < stop else None


def _check_model(model: Path) -> None:
    if not model.is_dir():
        raise GracecError("no such directory", where=str(model))
    if not (model / FOLDER).is_dir():
        raise GracecError(
            f"no folder {FOLDER!r}, so it holds no ONNX graphs",
            where=str(model),
            fix="compile with --format onnx, or use export_onnx",
        )
    SessionConfig.read(model / FOLDER).check_model(model)


def _check_app(app: Path) -> None:
    if not (app / "index.html").is_file():
        raise GracecError(
            "index.html is missing",
            where=str(app),
            fix="run it in a checkout of gracec, or give --app DIR",
        )
    for package in PACKAGES:
        if not (app / "node_modules" / package / "dist").is_dir():
            raise GracecError(
                f"{package} is not installed", where=str(app), fix=f"run: cd {app} && npm ci"
            )
