"""The example package, installed as users install packages, extends gracec without a word in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from tests.docs.fences import fences
from tests.goldens import INSTALLED
from tests.tiny import IMAGE, IMAGE_TOKENS, tiny_batch, tiny_config, tiny_processor

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "extension"
PLACED = "protect-fragile{floor=18} after plan-quantization"
FRAGILE = "model.language_model.layers.0.self_attn.k_proj.weight"
NEW = ("family", "target eager", "format dense", "recipe w4a16-protected")
PROTECTED = [f"model.language_model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]

COMMANDS = """
import contextlib, io, json, sys
import torch
from gracec import cli

torch.set_num_threads(1)
found = []
for arguments in json.loads(sys.stdin.read()):
    sys.argv, code, out, err = ["gracec", *arguments], 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""
"""Several commands of `gracec` in one process: importing torch takes longer than most of them."""

TOKENS = """
import json, sys
import torch
import gracec
from tests.tiny import tiny_batch

torch.set_num_threads(1)
found = {}
for target in ("eager", "torchao"):
    loaded = gracec.load(sys.argv[1], target=target)
    tokens = loaded.generate(**tiny_batch(), max_new_tokens=8)
    found[target] = [type(loaded.runtime).__module__, len(loaded.weights), tokens.tolist()]
print(json.dumps(found))
"""

DECLARED = {
    "passes": "protect-fragile",
    "capture.families": "vipllava",
    "recipes": "w4a16-protected",
    "backends": "dense",
    "targets": "eager",
}
"""Group of entry points, without its `gracec.` -> what the example brings."""

OTHERS = """
from gracec_example import dense, eager, protect_fragile, vipllava
class OtherPass(protect_fragile.ProtectFragile): name = "protect-fragile"
class OtherFamily(vipllava.VipLlava): model_type = "vipllava"
class OtherFormat(dense.Dense): name = "dense"
class OtherTarget(eager.Eager): name = "eager"
"""

COLLISIONS = """
import contextlib, io, json, sys
from gracec import cli
from gracec.backends import FORMATS
from gracec.capture.families import FAMILIES
from gracec.errors import GracecError
from gracec.passes import PASSES
from gracec.recipe import known_recipes
from gracec.targets import TARGETS

errors = []
for known in (PASSES.all, FAMILIES.all, known_recipes, FORMATS.all, TARGETS.all):
    try:
        known()
    except GracecError as error:
        errors.append(str(error))
sys.argv, code, stderr = ["gracec", "passes"], 0, io.StringIO()
with contextlib.redirect_stderr(stderr):
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
print(json.dumps({"errors": errors, "code": code, "stderr": stderr.getvalue()}))
"""


def tiny_vipllava() -> VipLlavaForConditionalGeneration:
    """A random ViP-LLaVA whose first key projection has tails that 4 bits describe badly."""
    parts = tiny_config()
    config = VipLlavaConfig(
        vision_config=parts.vision_config,
        text_config=parts.text_config,
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=[-2, -1],
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = VipLlavaForConditionalGeneration(config)
        weight = model.get_parameter(FRAGILE)
        weight.copy_(weight.pow(3) * (weight.std() / weight.pow(3).std()))
    return model


def fresh(*folders: Path) -> dict[str, str]:
    """The environment of a process that finds these folders of packages, and gracec."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*folders, ROOT]))}


def python(script: str, *arguments: object, packages: tuple[Path, ...], given: Any = None) -> Any:
    """What a script in a new process prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        input=json.dumps(given),
        env=fresh(*packages),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installed the example into, from a copy: a build leaves files behind."""
    root = tmp_path_factory.mktemp("extension")
    shutil.copytree(EXAMPLE, root / "source", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *options]
    subprocess.run([*command, "--target", root / "site", root / "source"], check=True)
    return root / "site"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vipllava")
    tiny_vipllava().save_pretrained(directory)
    tiny_processor().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def commands(installed: Path, model: Path) -> dict[str, tuple[int, str, str]]:
    """Command -> exit code, standard output and standard error; all in one new process."""
    recipe, out = ["--recipe", "w4a16-protected"], str(model / "compiled")
    more = ["--format", "dense", "--target", "eager", "--out", out, "--json"]
    given = [
        ["passes"],
        ["compile", "--help"],
        ["doctor", str(model), "--json"],
        ["compile", str(model), *recipe, *more],
    ]
    found = python(COMMANDS, packages=(installed,), given=given)
    names = ("passes", "help", "doctor", "compile")
    return {name: tuple(one) for name, one in zip(names, found, strict=True)}


def vipllava_runs() -> None:
    if INSTALLED < (5, 23):
        pytest.skip("ViP-LLaVA of transformers before 5.23 takes its layers by another name")


@pytest.fixture(scope="module")
def artifact(model: Path, commands: dict[str, tuple[int, str, str]]) -> Path:
    vipllava_runs()
    assert commands["compile"][0] == 0, commands["compile"][2]
    return model / "compiled"


def test_every_part_of_the_package_is_known(commands: dict[str, tuple[int, str, str]]) -> None:
    code, out, _ = commands["passes"]
    assert code == 0
    assert "(from gracec_example.protect_fragile)\n    {floor=18.0}" in out
    code, out, _ = commands["help"]
    words = out.replace(",", " ").split()
    assert code == 0
    assert {"w4a16-protected", "dense", "eager"} <= set(words)


def test_doctor_looks_at_the_newcomers(commands: dict[str, tuple[int, str, str]]) -> None:
    vipllava_runs()
    code, out, err = commands["doctor"]
    assert code == 0, err
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert checks["family"]["detail"] == "vipllava: gracec_example.vipllava"
    assert checks["target eager"]["detail"] == "all 14 weights as floats, by plain PyTorch"
    assert checks["format dense"]["detail"] == "can hold all of it"
    recipe = checks["recipe w4a16-protected"]["detail"]
    assert recipe.startswith("14 of 32 weights quantized")
    assert recipe.endswith("; before protect-fragile")
    assert {checks[name]["status"] for name in NEW} == {"ok"}


def test_the_report_names_the_pass_and_what_it_did(
    artifact: Path, commands: dict[str, tuple[int, str, str]]
) -> None:
    report = json.loads(commands["compile"][1])["report"]
    assert report["recipe"]["name"] == "w4a16-protected"
    assert report["recipe"]["passes"] == [PLACED]
    notes = {note["source"]: note["text"] for note in report["notes"]}
    assert notes["protect-fragile"].startswith(f"fragile: {FRAGILE} has 1")
    assert notes["dense"] == "11 quantized weights are written as torch.bfloat16"
    assert "eager" in notes
    kept = [row["fqns"][0] for row in report["plan"] if "fragile: " in str(row["reason"])]
    assert sorted(kept) == sorted(PROTECTED)


def test_the_dense_format_gives_plain_transformers_the_tokens_of_eager(
    artifact: Path, installed: Path
) -> None:
    found = python(TOKENS, artifact, packages=(installed,))
    assert [found[name][0] for name in found] == ["gracec_example.eager", "gracec.targets.torchao"]
    assert {count for _, count, _ in found.values()} == {14 - len(PROTECTED)}
    plain: Any = AutoModelForImageTextToText.from_pretrained(artifact / "dense")
    batch: dict[str, Tensor] = tiny_batch(plain)
    tokens = plain.generate(**batch, max_new_tokens=8).tolist()
    assert found["eager"][2] == tokens
    assert found["torchao"][2] == tokens


def test_a_second_one_of_a_name_is_one_clear_line(installed: Path, tmp_path: Path) -> None:
    info, package = tmp_path / "other-1.0.dist-info", tmp_path / "other"
    info.mkdir()
    package.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    groups = (f"[gracec.{group}]\n{name} = other\n" for group, name in DECLARED.items())
    (info / "entry_points.txt").write_text("".join(groups))
    (package / "__init__.py").write_text(OTHERS)
    shutil.copy(EXAMPLE / "gracec_example" / "w4a16-protected.yaml", package)
    found = python(COLLISIONS, packages=(installed, tmp_path))
    messages = [
        re.sub(r"/\S*(?=/(other|gracec_example)/)", "...", text) for text in found["errors"]
    ]
    assert messages == [
        block.text.strip() for block in fences("extending.md") if block.language == "text"
    ]
    assert (found["code"], found["stderr"]) == (2, f"gracec: {messages[0]}\n")
