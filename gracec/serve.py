"""Serve a compiled model, and the page that runs it in a browser, over HTTP.

    /                   the page: the files of an app folder, its packages in `node_modules`
    /model/PATH         the model: the files of a directory with ONNX graphs

Files are read and nothing else is done. The headers let WebAssembly use threads, and keep the page
from asking any other host for anything.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from gracec.backends.onnx.session import FOLDER, SessionConfig
from gracec.errors import GracecError

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
IDLE_SECONDS = 60
CHUNK = 1 << 16


class Server(ThreadingHTTPServer):
    """An HTTP server for one model and one page; bound when it is made, runs by `serve_forever`.

    Attributes:
        url: of the page.
    """

    daemon_threads = True

    def __init__(self, model: Path, app: Path, host: str = "127.0.0.1", port: int = 8000) -> None:
        """
        Args:
            model: a directory with a folder `onnx`.
            app: the folder of the page, with its packages installed.
            port: 0 for any that is free.

        Raises:
            GracecError: if either is not whole, or the port is taken.
        """
        _check_model(model)
        _check_app(app)
        self.model, self.app = model.resolve(), app.resolve()
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise GracecError(
                f"cannot listen ({error.strerror})",
                where=f"{host}:{port}",
                fix="give another --port; 0 takes any that is free",
            ) from error

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_port}/"

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
        except (OSError, RuntimeError):  # a name that is too long, links in a circle
            return None


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD, and byte ranges of them."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "gracec", ""
    error_message_format, error_content_type = "%(code)d %(message)s\n", "text/plain"
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """The page says what is wrong; requests tell the person at the terminal nothing."""

    def _answer(self, body: bool) -> None:
        path = self.server.find(self.path)
        if path is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            file = path.open("rb")
        except OSError:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        with file:
            found = os.fstat(file.fileno())
            size, tag = found.st_size, f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
            if self.headers.get("If-None-Match") == tag:
                self.send_response(HTTPStatus.NOT_MODIFIED)
                self.send_header("ETag", tag)
                self.end_headers()
                return
            part = byte_range(self.headers.get("Range"), size)
            if part is None:
                self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            whole = len(part) == size
            self.send_response(HTTPStatus.OK if whole else HTTPStatus.PARTIAL_CONTENT)
            if not whole:
                self.send_header("Content-Range", f"bytes {part.start}-{part.stop - 1}/{size}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", tag)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Type", TYPES.get(path.suffix, "application/octet-stream"))
            self.end_headers()
            if body:
                with suppress(ConnectionError, TimeoutError):  # the browser went away
                    self._copy(file, part)

    def _copy(self, file: BinaryIO, part: range) -> None:
        file.seek(part.start)
        left = len(part)
        while left and (chunk := file.read(min(left, CHUNK))):
            self.wfile.write(chunk)
            left -= len(chunk)


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
    SessionConfig.read(model / FOLDER)


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
