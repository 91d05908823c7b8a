import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from gracec import serve
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
        model_files={"config.json": file_sha256(folder / "config.json")},
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


@pytest.fixture
def named(server: Server) -> Iterator[Server]:
    """One of its own, for a test that changes limits; also asked for as `a.test`."""
    with Server(server.model, server.app, port=0, allow_hosts=["A.test"]) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        until(lambda: found._server.started)
        yield found
        found.shutdown()


def until(true: Callable[[], bool]) -> None:
    for _ in range(200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("not within ten seconds")


def raw(server: Server, text: str, *, end: bool = False) -> str:
    """What comes back for some bytes, up to the end of the first answer."""
    with socket.create_connection(server.server_address, timeout=20) as connection:
        with suppress(OSError):  # what is not read
            connection.sendall(text.encode("latin-1"))
        if end:
            connection.shutdown(socket.SHUT_WR)
        found = b""
        with suppress(OSError):
            while piece := connection.recv(1 << 16):
                found += piece
                head, blank, body = found.partition(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head.lower())
                if blank and length and len(body) >= int(length[1]):
                    break
        return found.decode("latin-1")


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
    assert HEADERS.items() <= {name: headers[name] for name in HEADERS}.items()
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
    assert HEADERS.items() <= {name: headers[name] for name in HEADERS}.items()


HOME = "127.0.0.1:8000"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1", HOME, "[::1]", "[::1]:8000", "a.test"]
)
def test_a_name_of_this_machine_is_answered(named: Server, host: str) -> None:
    assert raw(named, f"GET /index.html HTTP/1.1\r\nHost: {host}\r\n\r\n").startswith(
        "HTTP/1.1 200"
    )


@pytest.mark.parametrize(
    "lines",
    [
        "Host: evil.example",
        "Host: evil.example:8000",
        "Host: 127.0.0.1.evil.example",
        "Host: localhost.evil.example:8000",
        "Host: 192.168.0.1",
        "Host: localhost@evil.example",
        "Host: evil@localhost",
        "Host: evil.example, localhost",
        "Host: [::1",
        "Host: [::1]:port",
        "Host:",
    ],
)
def test_another_host_is_not_answered(named: Server, lines: str) -> None:
    found = raw(named, f"GET /index.html HTTP/1.1\r\n{lines}\r\n\r\n")
    assert re.match(r"HTTP/1\.1 4(21|00) ", found) and "doctype" not in found
    assert raw(named, "GET /index.html HTTP/1.0\r\n\r\n").startswith("HTTP/1.1 421")
    two = "Host: localhost\r\nHost: evil.example"
    assert raw(named, f"GET /index.html HTTP/1.1\r\n{two}\r\n\r\n").startswith("HTTP/1.1 4")
    absolute = "GET http://localhost/index.html HTTP/1.1\r\nHost: evil.example\r\n\r\n"
    assert raw(named, absolute).startswith("HTTP/1.1 421")


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (f"http://{HOME}", 200),
        ("http://evil.example", 403),
        ("https://127.0.0.1:8000", 403),
        ("http://127.0.0.1:8001", 403),
        ("http://localhost:8000", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_a_page_of_another_origin_is_refused(named: Server, origin: str, status: int) -> None:
    found = raw(named, f"GET / HTTP/1.1\r\nHost: {HOME}\r\nOrigin: {origin}\r\n\r\n")
    assert found.startswith(f"HTTP/1.1 {status}")
    assert "access-control" not in found.lower()


def test_listening_to_other_machines_any_address_is_answered_and_no_unknown_name(
    server: Server,
) -> None:
    with Server(server.model, server.app, "0.0.0.0", 0, ["box.lan"]) as other:
        for host in ("192.168.0.7:8000", "[fe80::1]", "localhost", "BOX.lan:1"):
            assert other.allows(host), host
        for host in ("evil.example", "192.168.0.7.evil.example", "box.lan.evil.example", ""):
            assert not other.allows(host), host


@pytest.mark.parametrize("lines", ["Content-Length: 5", "Transfer-Encoding: chunked"])
def test_what_is_sent_along_is_not_read(named: Server, lines: str) -> None:
    head = f"GET / HTTP/1.1\r\nHost: {HOME}\r\n{lines}\r\n\r\n"
    started = time.perf_counter()
    assert raw(named, head).startswith("HTTP/1.1 413")  # and the connection ends with it
    assert raw(named, head + "5\r\nhello\r\n" * 100_000).startswith("HTTP/1.1 413")
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("head", ["GET / HTTP/1.1\r\nX: " + "a" * 100_000, "\0\xff" * 10, "GET /"])
def test_a_request_that_is_none_is_refused(named: Server, head: str) -> None:
    assert re.match(r"HTTP/1\.1 400|$", raw(named, head, end=True))


@pytest.mark.parametrize(
    "said", ["GET / HTTP/1.1\r\nHo", f"GET /model/l HTTP/1.1\r\nHost: {HOME}\r\n\r\n"]
)
def test_slow_clients_give_way_to_others(named: Server, said: str) -> None:
    with (named.model / "l").open("wb") as file:
        file.truncate(50_000_000)  # more than any buffer on the way holds
    slow = [socket.create_connection(named.server_address) for _ in range(300)]
    for one in slow:
        one.sendall(said.encode())
    try:
        with ThreadPoolExecutor(60) as pool:
            found = list(pool.map(lambda _: ask(named, "/model/onnx/decoder.onnx")[:2], range(120)))
        assert found == [(200, GRAPH)] * 120
        connections = named._server.server_state.connections
        # A newcomer has those go that have been waited for longest.
        until(lambda: ask(named, "/")[0] == 200 and len(connections) <= serve.MOST_WAITING + 1)
    finally:
        for one in slow:
            one.close()


def test_a_byte_now_and_then_holds_no_connection(
    named: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "HEAD_SECONDS", 0.5)
    for before in (b"", f"GET / HTTP/1.1\r\nHost: {HOME}\r\n\r\n".encode()):
        with socket.create_connection(named.server_address) as slow:
            slow.settimeout(20)
            slow.sendall(before)
            slow.sendall(b"GET / HTTP/1.1\r\nX: ")
            started, alive = time.perf_counter(), True
            while alive and time.perf_counter() - started < 10:
                time.sleep(0.1)
                try:
                    slow.sendall(b"a")
                except OSError:
                    alive = False
            assert not alive


def test_a_client_that_does_not_read_holds_no_connection(
    named: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "READ_SECONDS", 0.5)
    (named.model / "large.bin").write_bytes(bytes(50_000_000))
    connections = named._server.server_state.connections
    with socket.create_connection(named.server_address) as slow:
        slow.sendall(f"GET /model/large.bin HTTP/1.1\r\nHost: {HOME}\r\n\r\n".encode())
        until(lambda: bool(connections))
        until(lambda: not connections)
    until(lambda: named.answering == 0)


def test_more_answers_than_it_gives_at_once_are_put_off(
    named: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "MOST_ANSWERS", 0)
    status, _, headers = ask(named, "/")
    assert (status, headers["Retry-After"]) == (503, "1")


def test_what_is_missing_to_serve_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "gracec.serve")
    refused = gracec("serve", "model")
    assert refused.returncode == 2
    assert refused.stderr == (
        "gracec: gracec serve: uvicorn is not installed; pip install 'gracec[serve]'\n"
    )


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
    refused("cannot listen", host="\ud800")
    refused("cannot listen", host="no.such.host.invalid")
    (app / "node_modules/onnxruntime-web/dist").rename(app / "node_modules/elsewhere")
    refused(f"onnxruntime-web is not installed; run: cd {app} && npm ci")
    os.truncate(model / "onnx/decoder.onnx", 10)
    refused("decoder.onnx: the file is not the one that was written")
    (model / "onnx" / "decoder.onnx").write_bytes(GRAPH)
    (model / "config.json").write_text("{ }")
    refused("config.json: the file is not the one that was written")


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
