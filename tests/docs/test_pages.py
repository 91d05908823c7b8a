"""The pages say what the code does: generated parts, Python, excerpts and links are up to date."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from typer.main import get_command

from gracec import gates, quant
from gracec.cli import app
from gracec.errors import GateError
from gracec.inspection import inspect_model
from gracec.ir.program import Program, annotation
from gracec.passes import parse_pipeline
from gracec.passes.apply_codes import ApplyCodes
from gracec.passes.freeze import frozen_weights
from gracec.recipe import Part, Recipe
from gracec.report.picture import draw_picture
from tests.docs.fences import DOCS, fences, run_page

PAGES = sorted(path.name for path in DOCS.glob("*.md"))


@pytest.fixture(scope="module")
def make_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_pages", DOCS / "make_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_up_to_date(make_pages: ModuleType) -> None:
    for page in make_pages.BLOCKS:
        found = (DOCS / page).read_text(encoding="utf-8")
        assert found == make_pages.rendered(page), "run: python docs/make_pages.py"


def test_the_page_on_extensions_shows_the_whole_example(make_pages: ModuleType) -> None:
    root = make_pages.EXTENSION
    files = {"pyproject.toml"} | {
        str(file.relative_to(root))
        for file in root.glob("gracec_example/*.*")
        if file.name != "__init__.py"
    }
    assert set(make_pages.BLOCKS["extending.md"]) == files


def test_the_bound_on_the_logits_is_the_one_written(make_pages: ModuleType) -> None:
    dense = gates.LogitAgreement(kl=1e-3, top1=1.0, top1_clear=1.0)
    bound = gates.KL_FACTOR * dense.kl + make_pages.KL_SLACK
    gates.lowered_is_as_good_as_dense(gates.LogitAgreement(bound * 0.999, 1.0, 1.0), dense)
    with pytest.raises(GateError):
        gates.lowered_is_as_good_as_dense(gates.LogitAgreement(bound * 1.001, 1.0, 1.0), dense)


def test_the_scale_grid_is_exact_in_both_formats_and_ends_where_it_must() -> None:
    every = torch.arange(0, 0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    grid = every[(every >= quant.SCALE_MIN) & (every <= quant.SCALE_MAX)]
    assert torch.equal(quant.round_scale(grid, "bf16"), grid)
    assert torch.equal(grid.half().float(), grid)
    above = every[every > quant.SCALE_MAX][0]
    assert above.half().isinf()
    below = every[(every < quant.SCALE_MIN) & (every >= quant.SCALE_MIN / 2)]
    assert not torch.equal(below.half().float(), below)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", (DOCS / page).read_text(encoding="utf-8")):
        assert (DOCS / target).exists(), target


def test_the_index_names_every_page() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    assert all(f"({page})" in text for page in PAGES if page != "index.md")


@pytest.mark.parametrize("page", ["recipes.md", "evaluation.md", "modules.md"])
def test_the_python_of_a_page_prints_what_the_page_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_every_yaml_is_a_recipe() -> None:
    blocks = [fence for fence in fences("recipes.md") if fence.language == "yaml"]
    for block in blocks:
        Recipe.from_dict({"name": "page", **yaml.safe_load(block.text)})
    assert blocks
    parts = ", ".join(f"`{part}`" for part in sorted(Part.__args__))  # type: ignore[attr-defined]
    assert f"`PART` is one of {parts}." in (DOCS / "recipes.md").read_text(encoding="utf-8")


def test_every_annotation_is_described(captured: Program, after: Callable[[str], Program]) -> None:
    written = re.findall(r"^\| `(\w+)` \| .* \|$", section("architecture.md", "Program and"), re.M)
    plan = "analyze-modality,plan-quantization"
    frozen = f"{plan},insert-fake-quant,freeze"
    programs = [
        after(f"{frozen},lower-torchao"),
        after("analyze-modality,insert-taps,select-supervised"),
        after("analyze-modality,plan-quantization{recipe=w4a8},insert-observers"),
        ApplyCodes(frozen_weights(after(frozen))).run(captured).program,
    ]
    used = {key for program in programs for node in program.graph.nodes for key in annotation(node)}
    assert used | {"weight_observer", "adapter", "follows"} == set(written)


def test_every_command_has_the_options_that_the_pages_give_it() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        for name, rest in re.findall(r"\bgracec ([a-z]+)((?: [^\n`#]*)?)", code(text)):
            known = {option for item in commands[name].params for option in item.opts}
            known |= {option for item in commands[name].params for option in item.secondary_opts}
            assert set(re.findall(r"--[a-z-]+", rest)) <= known, (page, name, rest)
            for pipeline in re.findall(r"--passes '([^']*)'", rest):
                parse_pipeline(pipeline)
    (pipeline,) = re.findall(r"^    (analyze-.*)$", section("architecture.md", "Passes"), re.M)
    assert parse_pipeline(pipeline)


@pytest.mark.slow
def test_the_picture_is_that_of_the_example(tmp_path: Path) -> None:
    """Its words, that is: where matplotlib puts them depends on its version."""
    inspection = inspect_model(DOCS.parent / "examples/emojivqa/student", "w4a16-ptq")
    draw_picture(inspection, tmp_path / "partition.svg")
    words = [
        re.findall(r"<text[^>]*>([^<]*)", path.read_text(encoding="utf-8"))
        for path in (tmp_path / "partition.svg", DOCS / "partition.svg")
    ]
    assert words[0] == words[1]


def code(text: str) -> str:
    """The blocks of commands and the inline code of a page."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", text)])


def section(page: str, heading: str) -> str:
    """The text under the first heading that starts so."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return text.split(f"\n## {heading}")[1].split("\n## ")[0]
