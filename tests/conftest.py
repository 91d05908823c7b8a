"""Fixtures shared by all tests: one tiny LLaVA, captured once a worker, and golden files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from gracec.capture import capture, capture_serving
from gracec.capture.serving import ServingProgram
from gracec.compiled import CompiledModel
from gracec.compiler import compile
from gracec.ir.program import Program
from gracec.passes import parse_pipeline, run_passes
from gracec.reload import SWITCH
from tests.goldens import TWO_BLOCKS, header, same_graphs
from tests.tiny import tiny_batch, tiny_llava, tiny_processor

# A process for each artifact takes seconds; the tests of it ask for it. Children inherit this.
os.environ[SWITCH] = "0"

# Sums come out the same on every machine.
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/golden")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """golden("freeze/llava.txt", text, made_by="freeze", after="analyze-modality,...", model=...):
    a header that says so, and the text, equal the file, or become it."""

    def check(
        name: str, text: str, *, made_by: object, after: str = "", model: str = TWO_BLOCKS
    ) -> None:
        same_graphs()
        path = GOLDEN / name
        text = header(made_by, after, model) + text
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing: run pytest --update-goldens"
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.fixture(scope="session")
def llava() -> LlavaForConditionalGeneration:
    """A tiny random LLaVA with a tied head. Not to be changed by a test."""
    return tiny_llava(tie=True)


@pytest.fixture(scope="session")
def captured(llava: LlavaForConditionalGeneration) -> Program:
    """`llava` as a program. Passes work on copies, so it stays as captured."""
    return capture(llava)


@pytest.fixture(scope="session")
def serving(llava: LlavaForConditionalGeneration) -> dict[str, ServingProgram]:
    """The serving graphs of `llava`. Not to be changed by a test."""
    return capture_serving(llava)


@pytest.fixture(scope="session")
def batch(llava: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """Two prompts of different length, padded on the left, one image each."""
    return tiny_batch(llava)


@pytest.fixture(scope="session")
def after(captured: Program) -> Callable[[str], Program]:
    """after("analyze-modality,..."): the captured program after these passes, made once."""
    return _remembering(captured)


@pytest.fixture(scope="session")
def block() -> LlavaForConditionalGeneration:
    """A tiny random LLaVA with one block in its decoder. Not to be changed by a test."""
    return tiny_llava(tie=True, num_hidden_layers=1)


@pytest.fixture(scope="session")
def captured_block(block: LlavaForConditionalGeneration) -> Program:
    """`block` as a program, for golden files of passes that do the same to every block."""
    return capture(block)


@pytest.fixture(scope="session")
def after_block(captured_block: Program) -> Callable[[str], Program]:
    """The same as `after`, of `block`."""
    return _remembering(captured_block)


def _remembering(captured: Program) -> Callable[[str], Program]:
    made: dict[str, Program] = {"": captured}

    def run(pipeline: str) -> Program:
        if pipeline not in made:
            before, _, last = pipeline.rpartition(",")
            made[pipeline] = run_passes(run(before), parse_pipeline(last)).program
        return made[pipeline]

    return run


@pytest.fixture(scope="session")
def compiled(llava: LlavaForConditionalGeneration) -> CompiledModel:
    """`llava` compiled by w4a16-ptq. Not to be changed by a test."""
    return compile(llava, "w4a16-ptq", processor=tiny_processor())


@pytest.fixture(scope="session")
def once(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, write): a directory that one worker writes for all of them. Not to be changed."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent

    def made(name: str, write: Callable[[Path], object]) -> Path:
        with FileLock(root / f"{name}.lock"):
            if not (root / name).exists():
                write(root / name)
        return root / name

    return made


@pytest.fixture(scope="session")
def bundle(
    request: pytest.FixtureRequest, once: Callable[[str, Callable[[Path], object]], Path]
) -> Path:
    """The directory of `compiled` that every client loads. What was noted is in `notes.txt`."""

    def write(directory: Path) -> None:
        compiled: CompiledModel = request.getfixturevalue("compiled")
        notes = compiled.save_pretrained(directory, "hf,onnx")
        (directory / "notes.txt").write_text("\n".join(notes))

    return once("bundle", write)


@pytest.fixture(scope="session")
def exported(
    request: pytest.FixtureRequest, once: Callable[[str, Callable[[Path], object]], Path]
) -> Path:
    """`compiled` as graphs of standard operators whose tensors lie in files of their own."""
    from gracec.backends.onnx import graphs

    def write(directory: Path) -> None:
        compiled: CompiledModel = request.getfixturevalue("compiled")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs, "EXTERNAL_ABOVE", 40_000)
            compiled.export_onnx(directory, "qdq", "faithful")

    return once("exported", write)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny LLaVA and its processor. Not to be changed by a test."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    tiny_llava(tie=True).save_pretrained(directory)
    tiny_processor().save_pretrained(directory)
    return directory


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A good model directory, to be broken by the test."""
    return Path(shutil.copytree(saved, tmp_path / "model"))
