"""Eight groups of inputs. Each makes a folder once, and tries one mutated input at a time.

A try ends in `REFUSED` (one line), `SAME` (the answer of what was not mutated), `OTHER` (another
answer where another was asked for, or said), or raises what it should not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from gracec.backends.onnx.runner import OnnxModel
from gracec.backends.onnx.session import SEAL
from gracec.compiler import compile
from gracec.data.conversations import BrokenSample, open_train_data
from gracec.errors import GracecError, GracecWarning
from gracec.evaluate import answer, load_samples
from gracec.file_hashes import json_sha256
from gracec.models.loading import load_model, load_processor
from gracec.recipe import Recipe, built_in_recipes
from gracec.serve import Server
from gracec.stages.publish import read_artifact
from tests.fuzz import mutations
from tests.test_cli import gracec
from tests.test_serve import write_app, write_model
from tests.tiny import tiny_batch, tiny_image, tiny_llava, tiny_processor

REFUSED, SAME, OTHER = "refused", "same", "other"
PROCESSOR_FILES = (
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "generation_config.json",
)
SESSION, MANIFEST = "onnx/session.json", "gracec.json"


class Silent(AssertionError):
    """Another answer, and nobody said so."""


@dataclass
class Group:
    """Inputs of one kind: `write` makes good ones in a folder, `attempt` spoils and reads one."""

    write: Callable[[Path], None]
    attempt: Callable[[random.Random, Path, dict[str, Any]], str]
    known: dict[str, Any] = field(default_factory=dict)


def outcome(read: Callable[[], Any], expected: Any, *, may_differ: bool) -> str:
    """What reading something came to.

    Raises:
        Silent: if it gives another answer than what was not mutated, and may not.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = read()
        except GracecError as error:
            if not str(error).isprintable():
                raise
            return REFUSED
    if found == expected:
        return SAME
    if may_differ or any(issubclass(one.category, GracecWarning) for one in warned):
        return OTHER
    raise Silent(f"{str(found)[:200]} instead of {str(expected)[:200]}")


def answer_of(directory: Path) -> str:
    """What a model of a directory says about a picture."""
    model, processor = load_model(directory), load_processor(directory)
    return answer(model, processor, tiny_image(), "what is this ?", max_new_tokens=2)


def frozen_of(directory: Path) -> str:
    """A digest of everything that an artifact says."""
    frozen, report = read_artifact(directory)
    digest = hashlib.sha256()
    for fqn, weight in sorted(frozen.weights.items()):
        digest.update(f"{fqn} {weight.spec}".encode())
        digest.update(weight.codes.numpy().tobytes() + weight.scales.numpy().tobytes())
    for fqn, tensor in sorted(frozen.others.items()):
        digest.update(fqn.encode() + tensor.detach().float().numpy().tobytes())
    said = [report.to_dict(), frozen.config.to_dict(), frozen.name, str(frozen.dtype)]
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def logits_of(directory: Path) -> bytes:
    """The logits of the graphs of a directory, bit for bit."""
    model = OnnxModel.load(directory, threads=1)
    return bytes(model(**tiny_batch(model.processor)).logits.numpy().tobytes())


def _write_recipes(folder: Path) -> None:
    for name in built_in_recipes():
        fields = Recipe.load(name).to_dict()
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")


def _recipe(rng: random.Random, folder: Path, known: dict[str, Any]) -> str:
    file = rng.choice(sorted(folder.glob("*.yaml")))
    mutations.edit_yaml(rng, file)

    def read() -> Any:
        recipe = Recipe.load(file)
        assert all(map(math.isfinite, _numbers(recipe.to_dict()))), recipe
        assert recipe.name.isprintable()
        return recipe

    return outcome(read, None, may_differ=True)


def _numbers(value: Any) -> Iterator[float]:
    inside = value.values() if isinstance(value, dict) else value
    for item in inside:
        if isinstance(item, (dict, list)):
            yield from _numbers(item)
        elif isinstance(item, (int, float)):
            yield item


def _write_model(folder: Path) -> None:
    tiny_llava(tie=True, num_hidden_layers=1).save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")


def write_artifact(folder: Path) -> None:
    _write_model(folder)
    compiled = compile(folder / "model", "w4a16-ptq")
    compiled.save_pretrained(folder / "artifact", "hf,onnx")


def _sealed(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def seal(fields: dict[str, Any]) -> dict[str, Any]:
        rest = {name: item for name, item in fields.items() if name != key}
        return {**rest, key: json_sha256(rest)}

    return seal


def _manifest(rng: random.Random, folder: Path, known: dict[str, Any]) -> str:
    directory = folder / "artifact"
    known.setdefault("frozen", frozen_of(directory))
    sealed = mutations.edit_json(rng, directory / MANIFEST, _sealed("manifest_sha256"))
    return outcome(lambda: frozen_of(directory), known["frozen"], may_differ=sealed)


def _session(rng: random.Random, folder: Path, known: dict[str, Any]) -> str:
    directory = folder / "artifact"
    known.setdefault("logits", logits_of(directory))
    sealed = mutations.edit_json(rng, directory / SESSION, _sealed(SEAL))
    return outcome(lambda: logits_of(directory), known["logits"], may_differ=sealed)


def _config(rng: random.Random, folder: Path, known: dict[str, Any]) -> str:
    if rng.random() < 0.3:
        known.setdefault("frozen", frozen_of(folder / "artifact"))
        mutations.edit_json(rng, folder / "artifact/config.json")
        return outcome(lambda: frozen_of(folder / "artifact"), known["frozen"], may_differ=False)
    mutations.edit_json(rng, folder / "model/config.json")
    return outcome(lambda: answer_of(folder / "model"), None, may_differ=True)


def _processor(rng: random.Random, folder: Path, known: dict[str, Any]) -> str:
    kept = rng.random() < 0.3
    directory = folder / ("artifact" if kept else "model")
    if kept:
        known.setdefault("frozen", frozen_of(directory))
    file = directory / rng.choice(PROCESSOR_FILES)
    if file.suffix == ".json":
        mutations.edit_json(rng, file)
    else:
        file.write_bytes(mutations.torn(rng, file.read_bytes()))
    if kept:
        return outcome(lambda: frozen_of(directory), known["frozen"], may_differ=False)
    return outcome(lambda: answer_of(directory), None, may_differ=True)


def _write_records(folder: Path) -> None:
    lines = []
    for number in range(6):
        tiny_image(number).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": f"<image>\nis it number {number} ?"},
            {"from": "gpt", "value": "yes"},
        ]
        lines.append(json.dumps({"image": f"{number}.png", "conversations": turns}))
    (folder / "train.jsonl").write_text("\n".join(lines))


def _records(rng: random.Random, folder: Path, known: dict[str, Any]) -> str:
    file = folder / "train.jsonl"
    lines = file.read_bytes().split(b"\n")
    at = rng.randrange(len(lines))
    if rng.random() < 0.4:
        lines[at] = mutations.torn(rng, lines[at])
    else:
        record = mutations.changed(rng, json.loads(lines[at]))
        lines[at] = mutations.dumped(rng, record)
    file.write_bytes(b"\n".join(lines))

    broken: list[str] = []

    def read() -> list[str]:
        data = open_train_data(file)
        found = [data.sample(index) for index in range(len(data))]
        whole = [one for one in found if not isinstance(one, BrokenSample)]
        broken.extend(data.problems)
        texts = [" ".join(turn.text for turn in one.turns) for one in whole]
        for other in range(len(lines)):  # those beside it are what they were
            if other != at and b"\n" not in lines[at]:
                assert any(f"number {other} ?" in text for text in texts), other
        return texts

    came_to = outcome(read, None, may_differ=True)
    return REFUSED if broken else came_to


def _write_questions(folder: Path) -> None:
    for number, kind in enumerate(("png", "jpg", "webp", "gif", "bmp", "tiff")):
        tiny_image(number).save(folder / f"{number}.{kind}")
    lines = [
        json.dumps({"image": file.name, "question": "what ?", "answer": "red", "type": "color"})
        for file in sorted(folder.iterdir())
    ]
    (folder / "samples.jsonl").write_text("\n".join(lines))


def _questions(rng: random.Random, folder: Path, known: dict[str, Any]) -> str:
    def read() -> list[Any]:
        pictures = [one.picture() for one in load_samples(folder)]
        return [picture and picture.tobytes() for picture in pictures]

    file = folder / "samples.jsonl"
    if rng.random() < 0.5:
        file = rng.choice(sorted(path for path in folder.iterdir() if path != file))
        file.write_bytes(mutations.torn(rng, file.read_bytes()))
    else:
        lines = file.read_bytes().split(b"\n")
        at = rng.randrange(len(lines))
        if rng.random() < 0.4:
            lines[at] = mutations.torn(rng, lines[at])
        else:
            lines[at] = mutations.dumped(rng, mutations.changed(rng, json.loads(lines[at])))
        file.write_bytes(b"\n".join(lines))
    return outcome(read, None, may_differ=True)


def _write_command(folder: Path) -> None:
    _write_model(folder)
    tiny_image().save(folder / "picture.png")
    write_model(folder / "served")
    write_app(folder / "app")


def _command(rng: random.Random, folder: Path, known: dict[str, Any]) -> str:
    return (_request if rng.random() < 0.4 else _arguments)(rng, folder, known)


def _arguments(rng: random.Random, folder: Path, known: dict[str, Any]) -> str:
    odd = [text for text in mutations.TEXTS if "\x00" not in text]
    odd += [str(number) for number in mutations.NUMBERS] + ["\udcff", str(folder), "w4a16-ptq"]
    options = (
        *("--recipe", "--out", "--batch", "--images", "--text", "--limit", "--max-new-tokens"),
        *("--prompt", "--image", "--data", "--target", "--format", "--pass", "--passes", "--host"),
        *("--port", "--app", "--batch-size", "--json", "--strict", "--teacher", "--eval-data"),
        *("--allow-host", "--picture", "--resume", "--overwrite"),
    )
    commands = ("compile", "inspect", "report", "doctor", "opt", "passes", "run", "serve", "eval")
    arguments = [rng.choice(commands)]
    arguments += [rng.choice(odd)] if rng.random() < 0.9 else []
    for option in rng.sample(options, rng.randrange(5)):
        arguments += [option, rng.choice(odd)] if rng.random() < 0.9 else [option]
    with contextlib.chdir(folder):
        done = gracec(*arguments)
    assert done.returncode in (0, 1, 2), done.returncode
    assert "Traceback" not in done.stdout + done.stderr
    return REFUSED if done.returncode else OTHER


def _request(rng: random.Random, folder: Path, known: dict[str, Any]) -> str:
    if "server" not in known:
        server = Server(folder / "served", folder / "app", port=0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        known["server"], known["stop"] = server, server.shutdown
    host, target = "127.0.0.1", rng.choice(["/", "/model/config.json", "/model/onnx/decoder.onnx"])
    head = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nRange: bytes=0-9\r\n\r\n".encode()
    sent = mutations.torn(rng, head) if rng.random() < 0.9 else head
    with socket.create_connection(known["server"].server_address, timeout=30) as connection:
        with contextlib.suppress(OSError):  # it was closed before all was sent
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        found = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                found += piece
    assert not found or found.startswith(b"HTTP/1.1 "), found[:80]
    status = int(found.split()[1]) if found else 0
    assert status < 500 or status == 501, found[:80]
    return OTHER if 200 <= status < 300 else REFUSED


GROUPS: dict[str, Group] = {
    "recipe": Group(_write_recipes, _recipe),
    "gracec.json": Group(write_artifact, _manifest),
    "session.json": Group(write_artifact, _session),
    "config.json": Group(write_artifact, _config),
    "processor": Group(write_artifact, _processor),
    "records": Group(_write_records, _records),
    "questions": Group(_write_questions, _questions),
    "command": Group(_write_command, _command),
}


def restored(good: Path, folder: Path) -> None:
    """Put the good files back: those that differ are few, and hard links cost nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder, copy_function=_linked)


def _linked(source: str, target: str) -> None:
    """Large files are shared; they are never written to in place."""
    if os.path.getsize(source) > 1 << 16:
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


torch.set_num_threads(1)
