import http.client
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from gracec.backends.onnx.session import SessionConfig
from gracec.errors import GracecError
from gracec.serve import HEADERS, Server, byte_range
from gracec.store import file_sha256
from tests.test_cli import gracec

GRAPH = bytes(range(256)) * 1000


def write_model(folder: Path) -> Path:
    graphs = folder / "onnx"
    graphs.mkdir(parents=True)
    (graphs / "decoder.onnx").write_bytes(GRAPH)
    (folder / "config.json").write_text("{}")
    SessionConfig(
        family="llava",
        ops="matmulnbits",
        mode="faithful",
        graphs={"decoder": "decoder.onnx"},
        sha256={"decoder.onnx": file_sha256(graphs / "decoder.onnx")},
        kernels={"decoder": 1},
        options={},
        gates={},
        minimum_runtime="1.24",
    ).write(graphs)
    return folder


def write_app(folder: Path) -> Path:
    for package in ("@huggingface/transformers", "onnxruntime-web"):
        dist = folder / "node_modules" / package / "dist"
        dist.mkdir(parents=True)
        for name in ("code.mjs", "code.wasm"):
            (dist / name).write_text(name)
    (folder / "index.html").write_text("<!doctype html>")
    (folder / ".npmrc").write_text("secret")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "outside.json").write_text("secret")
    (folder / "model-2").mkdir()
    (folder / "model-2/config.json").write_text("secret")
    model, app = write_model(folder / "model"), write_app(folder / "app")
    (model / "link.json").symlink_to(folder / "outside.json")
    (model / "folder").symlink_to(folder)
    (model / "circle").symlink_to("circle")
    (model / "inside.json").symlink_to("config.json")
    (model / "a b.txt").write_text("name with a blank")
    with Server(model, app, port=0) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def ask(
    server: Server, target: str, method: str = "GET", **headers: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    """The answer to a request whose target is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, target, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, answer.headers


@pytest.mark.parametrize(
    ("target", "body", "kind"),
    [
        ("/", b"<!doctype html>", "text/html; charset=utf-8"),
        ("/index.html?device=wasm", b"<!doctype html>", "text/html; charset=utf-8"),
        ("/model/config.json", b"{}", "application/json"),
        ("/model/inside.json", b"{}", "application/json"),
        ("/model/a%20b.txt", b"name with a blank", "application/octet-stream"),
        ("/model/onnx/decoder.onnx", GRAPH, "application/octet-stream"),
        ("/node_modules/onnxruntime-web/dist/code.wasm", b"code.wasm", "application/wasm"),
        (
            "/node_modules/%40huggingface/transformers/dist/code.mjs",
            b"code.mjs",
            "text/javascript; charset=utf-8",
        ),
    ],
)
def test_files_of_the_page_and_the_model(
    server: Server, target: str, body: bytes, kind: str
) -> None:
    status, found, headers = ask(server, target)
    assert (status, found, headers["Content-Type"]) == (200, body, kind)
    assert headers["Content-Length"] == str(len(body))
    assert HEADERS.items() <= dict(headers).items()
    assert ask(server, target, "HEAD")[:2] == (200, b"")


@pytest.mark.parametrize(
    "target",
    [
        "/nothing.html",
        "/model",
        "/model/",
        "/model/onnx",
        "/model/onnx/",
        "/node_modules",
        "/.npmrc",
        "/%2enpmrc",
        "/../outside.json",
        "/model/../outside.json",
        "/model/../../outside.json",
        "/model/onnx/../config.json",
        "/model/%2e%2e/outside.json",
        "/model/..%2foutside.json",
        "/model/%2e%2e%2foutside.json",
        "/model/%252e%252e/outside.json",
        "/model/..%5coutside.json",
        "/model/..\\outside.json",
        "/model//etc/passwd",
        "//etc/passwd",
        "/model/%2fetc/passwd",
        "/model/link.json",
        "/model/folder/outside.json",
        "/model-2/config.json",
        "/model/config.json%00.png",
        "/model/config.json/",
        "/model/%ff%fe",
        "http://example.org/../outside.json",
        "*",
        "model/config.json",
        "/model/con\\fig.json",
        "//[",
        "/model/circle",
        "/model/" + 300 * "a",
    ],
)
def test_nothing_else_is_read(server: Server, target: str) -> None:
    status, body, headers = ask(server, target)
    assert (status, body) == (404, b"404 Not Found\n")
    assert HEADERS.items() <= dict(headers).items()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_only_reading_is_served(server: Server, method: str) -> None:
    assert ask(server, "/model/config.json", method)[0] == 501


def test_parts_of_a_file(server: Server) -> None:
    status, body, headers = ask(server, "/model/onnx/decoder.onnx", Range="bytes=70000-140000")
    assert (status, body) == (206, GRAPH[70_000:140_001])
    assert headers["Content-Range"] == f"bytes 70000-140000/{len(GRAPH)}"
    status, body, headers = ask(server, "/model/onnx/decoder.onnx", Range="bytes=256000-")
    assert (status, body, headers["Content-Range"]) == (416, b"", "bytes */256000")


def test_an_unchanged_file_is_not_sent_again(server: Server) -> None:
    target, file = "/model/a%20b.txt", server.model / "a b.txt"
    tag = ask(server, target)[2]["ETag"]
    assert ask(server, target, **{"If-None-Match": tag})[:2] == (304, b"")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert ask(server, target, **{"If-None-Match": tag})[:2] == (200, file.read_bytes())


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (None, range(10)),
        ("bytes=2-5", range(2, 6)),
        ("bytes=2-", range(2, 10)),
        ("bytes=2-99", range(2, 10)),
        ("bytes=-3", range(7, 10)),
        ("bytes=-99", range(10)),
        ("bytes=-0", None),
        ("bytes=10-", None),
        ("bytes=5-2", None),
        ("bytes=0-1,4-5", range(10)),
        ("lines=2-5", range(10)),
        ("bytes=-", range(10)),
    ],
)
def test_ranges(header: str | None, part: range | None) -> None:
    assert byte_range(header, 10) == part


def test_an_empty_file_has_no_range() -> None:
    assert byte_range(None, 0) == range(0)
    assert byte_range("bytes=0-", 0) is None


def test_it_listens_on_this_machine_only(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/"


def test_what_cannot_be_served_is_refused(tmp_path: Path, server: Server) -> None:
    model, app = write_model(tmp_path / "model"), write_app(tmp_path / "app")

    def refused(message: str, **changes: object) -> None:
        options = {"model": model, "app": app, "port": 0, **changes}
        with pytest.raises(GracecError, match=message):
            Server(**options)  # type: ignore[arg-type]

    refused("no such directory", model=tmp_path / "none")
    refused("no folder 'onnx', .*compile with --format onnx", model=tmp_path)
    refused("index.html is missing", app=tmp_path)
    refused("cannot listen .*--port", port=server.server_port)
    (app / "node_modules/onnxruntime-web/dist").rename(app / "node_modules/elsewhere")
    refused(f"onnxruntime-web is not installed; run: cd {app} && npm ci")
    os.truncate(model / "onnx/decoder.onnx", 10)
    refused("not the one that was written")


def test_the_command_serves_until_it_is_interrupted(server: Server, tmp_path: Path) -> None:
    options = ["--app", str(server.app), "--port", "0"]
    command = [sys.executable, "-m", "gracec.cli", "serve", str(server.model), *options]
    heard = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a test in the background is deaf
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            port = int(line.removeprefix("http://127.0.0.1:").partition("/")[0])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", "/model/config.json")
            assert connection.getresponse().read() == b"{}"
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
    refused = gracec("serve", tmp_path, *options)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith(f"gracec: {tmp_path}: no folder 'onnx'")
