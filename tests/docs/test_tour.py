"""Every excerpt of the tour stands in a golden file, and its commands make those files."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from gracec import ir
from gracec.ir.program import Program
from gracec.passes import all_passes
from tests.docs.fences import DOCS, Fence, fences, run_page
from tests.goldens import ONE_BLOCK, TWO_BLOCKS, header, same_graphs

ROOT = DOCS.parent
PAGE = "tour.md"
EXCERPTS = [fence for fence in fences(PAGE) if fence.language == "ir"]


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("excerpt", EXCERPTS, ids=lambda excerpt: excerpt.info)
def test_every_line_stands_in_the_golden_file_in_this_order(excerpt: Fence) -> None:
    rest = iter(lines(ROOT / excerpt.info))
    for line in excerpt.text.splitlines():
        assert line in rest, f"{PAGE}:{excerpt.line}: {line}"


def test_every_pass_has_its_section() -> None:
    sections = re.findall(r"^## ([a-z-]+)$", (DOCS / PAGE).read_text(encoding="utf-8"), re.M)
    built_in = [n for n, cls in all_passes().items() if cls.__module__.startswith("gracec.")]
    assert set(sections) == set(built_in)


def test_the_commands_make_the_golden_files(
    after: Callable[[str], Program], after_block: Callable[[str], Program]
) -> None:
    same_graphs()
    run = {"out/tiny-llava": (after, TWO_BLOCKS), "out/one-block": (after_block, ONE_BLOCK)}
    blocks = [fence for fence in fences(PAGE) if fence.language in ("sh", "ir")]
    made = set()
    for command, excerpt in pairwise(blocks):
        if command.language != "sh" or "--diff-after-all" not in command.text:
            continue
        assert excerpt.language == "ir"
        (pipeline,) = re.findall(r"--passes '([^']*)'", command.text)
        shorter, _, last = pipeline.rpartition(",")
        (directory,) = re.findall(r"gracec opt (\S+)", command.text)
        program, model = run[directory]
        text = header(last, shorter, model) + ir.diff(program(shorter), program(pipeline))
        assert text.splitlines() == lines(ROOT / excerpt.info)
        made.add(excerpt.info)
    # analyze-modality has no diff, apply-codes no text form, correct-codes figures of a machine,
    # fuse-decoder is for another graph, flatten-convolutions and analyze-module for another model.
    assert len(made) == len(EXCERPTS) - 6


def test_the_python_prints_what_the_page_says(captured: Program) -> None:
    run_page(PAGE, captured)
