"""A compiled model does what somebody expects who is used to models of transformers."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

import gracec
from gracec.backends.onnx.runner import OnnxModel
from gracec.compiled import CompiledModel, _chosen, open_model
from gracec.errors import GracecError
from tests.tiny import tiny_processor


class Hub(BaseHTTPRequestHandler):
    """What of the Hub an upload needs; it keeps what it was sent."""

    kept: dict[str, Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            self.kept["repository"] = json.loads(body)
            self._answer({"url": f"http://{self.headers['Host']}/somebody/tiny"})
        elif path.endswith(f"/preupload/{self.kept['branch']}"):
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular"} for file in files]
            self._answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif path.endswith(f"/commit/{self.kept['branch']}"):
            self.kept["commit"] = [json.loads(line) for line in body.splitlines()]
            address = f"http://{self.headers['Host']}/somebody/tiny/commit/1"
            self._answer({"commitUrl": address, "commitOid": "1"})
        else:
            self._answer({}, 200 if "/branch/" in path else 404)

    def do_GET(self) -> None:
        self._answer({}, 404)

    def log_message(self, *arguments: Any) -> None: ...

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    class Own(Hub):
        kept: dict[str, Any] = {"branch": "main"}  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    yield Own
    server.shutdown()
    server.server_close()


def test_exactly_what_is_saved_is_pushed(
    compiled: CompiledModel, hub: type[Hub], tmp_path: Path
) -> None:
    hub.kept["branch"] = "trial"
    made = compiled.push_to_hub(
        "somebody/tiny", (), private=True, commit_message="first", token="x", revision="trial"
    )
    assert made.oid == "1"
    assert hub.kept["repository"].items() >= {"name": "tiny", "visibility": "private"}.items()
    head, *files = hub.kept["commit"]
    assert head["value"]["summary"] == "first"
    sent = {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in files}
    compiled.save_pretrained(tmp_path / "out", ())
    saved = {
        str(path.relative_to(tmp_path / "out")): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert sent == saved


def test_a_hub_that_refuses_is_one_line(compiled: CompiledModel, hub: type[Hub]) -> None:
    hub.kept["branch"] = "other than main"
    with pytest.raises(GracecError, match="somebody/tiny: the Hub does not take it .*404.*; check"):
        compiled.push_to_hub("somebody/tiny", (), token="x")


def test_it_is_where_and_what_it_is(compiled: CompiledModel) -> None:
    assert compiled.eval() is compiled is compiled.to("cpu") is compiled.to(dtype=compiled.dtype)
    assert compiled.can_generate()
    assert compiled.config.model_type == "llava"
    with pytest.raises(GracecError, match="packed for cpu, and cannot be moved to cuda; save it"):
        compiled.to("cuda")
    with pytest.raises(GracecError, match="and torch.float64 is asked for; compile again with"):
        compiled.to(torch.float64)


def test_it_generates_with_all_that_transformers_takes(
    compiled: CompiledModel, batch: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    batch = {n: t.to(compiled.dtype) if t.is_floating_point() else t for n, t in batch.items()}
    model: Any = compiled.model
    for settings in (
        {"do_sample": True, "top_k": 5},
        {"num_beams": 3},
        {"repetition_penalty": 2.0},
    ):
        made = [
            torch.manual_seed(1) and one.generate(**batch, max_new_tokens=5, **settings)
            for one in (compiled, model)
        ]
        assert torch.equal(*made), settings
    one = {"input_ids": batch["input_ids"][:1, -3:]}
    streamer = TextStreamer(tiny_processor().tokenizer, skip_prompt=True)
    made = compiled.generate(one["input_ids"], max_new_tokens=3, do_sample=False, streamer=streamer)
    said = tiny_processor().tokenizer.decode(made[0, 3:])
    assert capsys.readouterr().out.split() == said.split()
    before = compiled.generation_config
    compiled.generation_config = GenerationConfig(max_new_tokens=2, return_dict_in_generate=True)
    try:
        assert compiled.generate(**one).sequences.shape[1] == 5
    finally:
        compiled.generation_config = before


def test_what_is_fastest_here_is_loaded(bundle: Path, exported: Path, tmp_path: Path) -> None:
    """The graphs of a directory, unless something is asked for that they are not."""
    for directory in (bundle, exported):
        assert isinstance(gracec.load(directory), OnnxModel)
    assert isinstance(gracec.load(bundle, "auto", device="cpu", dtype="float32"), OnnxModel)
    assert isinstance(open_model(exported)[0], OnnxModel)
    for options in ({"target": "torchao"}, {"dtype": "bfloat16"}):
        assert isinstance(gracec.load(bundle, **options), CompiledModel)
    assert _chosen(None, bundle, None, torch.device("cuda"), None).name == "torchao"
    directory = Path(shutil.copytree(bundle, tmp_path / "out"))
    (directory / "onnx" / "session.json").unlink()
    with pytest.raises(GracecError, match=r"session\.json: missing"):
        gracec.load(directory)
    shutil.rmtree(directory / "onnx")
    assert isinstance(gracec.load(directory), CompiledModel)


def test_graphs_of_somebody_else_are_not_loaded(saved: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "model"))
    (directory / "onnx").mkdir()
    (directory / "onnx" / "model.onnx").touch()
    assert isinstance(open_model(directory)[0], PreTrainedModel)
    with pytest.raises(GracecError, match="gracec.json"):
        gracec.load(directory)
