"""Files of a model may name code: none of it runs, whatever is answered to questions."""

import ast
import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import hub

import gracec
from gracec.compiled import CompiledModel
from gracec.doctor import diagnose
from gracec.errors import GracecError, GracecWarning
from gracec.models.configs import read_config
from gracec.models.loading import load_config, load_model, load_processor
from tests.tiny import tiny_batch

CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "AutoImageProcessor",
    "AutoFeatureExtractor",
    "AutoVideoProcessor",
)
AUTO_MAP: dict[str, Any] = dict.fromkeys(CLASSES, "evil.Evil")
AUTO_MAP["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What code of a model would leave; whoever asks whether to run it is told yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
    monkeypatch.setattr(hub, "HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    return tmp_path / "ran"


def spoil(directory: Path, mark: Path, change: Callable[[str, dict[str, Any]], None]) -> None:
    """Add code that leaves a mark, and change each file so that it names it."""
    code = f"open({str(mark)!r}, 'w').close()\nclass Evil:\n    pass\n"
    (directory / "evil.py").write_text(code + "def generate(*a, **k): pass\n")
    (directory / "custom_generate").mkdir(exist_ok=True)
    (directory / "custom_generate/generate.py").write_text(code + "def generate(**k): pass\n")
    for name in FILES:
        file = directory / name
        fields = json.loads(file.read_text()) if file.is_file() else {}
        change(name, fields)
        file.write_text(json.dumps(fields))


def everywhere(name: str, fields: dict[str, Any]) -> None:
    fields["auto_map"] = AUTO_MAP
    for value in fields.values():
        if isinstance(value, dict) and value is not AUTO_MAP:
            value["auto_map"] = AUTO_MAP


def unknown(name: str, fields: dict[str, Any]) -> None:
    """Only its own code would serve."""
    everywhere(name, fields)
    if "processor_class" in fields or name == "processor_config.json":
        fields["processor_class"] = "EvilProcessor"
    if name == "tokenizer_config.json":
        fields["tokenizer_class"] = "EvilTokenizer"
    for holder in (fields, fields.get("image_processor")):
        if holder is not None and "image_processor_type" in holder:
            holder["image_processor_type"] = "EvilImageProcessor"


def unnamed(name: str, fields: dict[str, Any]) -> None:
    """The class of the whole is found by the model type then, and those of its parts are not."""
    unknown(name, fields)
    fields.pop("processor_class", None)


@pytest.mark.filterwarnings("ignore::gracec.errors.GracecWarning")
@pytest.mark.parametrize("change", [everywhere, unknown, unnamed])
def test_code_of_a_model_never_runs(
    model: Path, mark: Path, change: Callable[[str, dict[str, Any]], None]
) -> None:
    spoil(model, mark, change)
    steps: list[Callable[[Path], object]] = [load_config, load_processor, load_model]
    if change is everywhere:
        steps += [diagnose, lambda path: gracec.compile(path, "w4a16-ptq")]
    refused = []
    for step in steps:
        try:
            step(model)
        except GracecError as error:
            refused.append(str(error))
        assert not mark.exists()
    assert all("which is never run" in text for text in refused)
    assert len(refused) == (change is not everywhere)


@pytest.mark.parametrize("target", ["torchao", "onnxruntime"])
def test_code_of_an_artifact_never_runs(
    bundle: Path, tmp_path: Path, mark: Path, target: str
) -> None:
    directory = Path(shutil.copytree(bundle, tmp_path / "artifact"))
    spoil(directory, mark, everywhere)
    with suppress(GracecError):  # its files are no longer those that were written
        gracec.load(directory, target)
    with pytest.warns(GracecWarning, match="auto_map names code of its own, which is never run"):
        load_processor(directory)
    assert not mark.exists()


def test_a_model_whose_code_is_left_out_is_the_same(
    model: Path, saved: Path, mark: Path, compiled: CompiledModel
) -> None:
    spoil(model, mark, everywhere)
    with pytest.warns(GracecWarning, match="config.json: auto_map would run code"):
        found = load_model(model)
    batch = tiny_batch()
    with torch.no_grad():
        assert torch.equal(found(**batch).logits, load_model(saved)(**batch).logits)
    assert not hasattr(found.config, "auto_map")
    assert not hasattr(found.config.text_config, "auto_map")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("part", ["", "text_config", "vision_config"])
def test_kernels_of_the_hub_are_not_asked_for(model: Path, key: str, part: str) -> None:
    fields = json.loads((model / "config.json").read_text())
    (fields[part] if part else fields)[key] = "evil/kernel"
    (model / "config.json").write_text(json.dumps(fields))
    with pytest.warns(GracecWarning, match=f"config.json: {key} would run code"):
        config = read_config(model)
    for holder in (config, config.text_config, config.vision_config):
        assert holder._attn_implementation is None


def test_adapters_beside_a_model_are_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(GracecError, match="holds adapters of PEFT beside a model"):
        load_model(model)


def test_every_call_that_could_run_code_says_not_to() -> None:
    found = 0
    for file in Path(gracec.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr in ("from_pretrained", "from_config"):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("trust_remote_code") == "False", (file, node.lineno)
                found += 1
    assert found >= 4
