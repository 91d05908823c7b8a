"""The pass of the page works as the page says, and as every pass must."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import pytest

from gracec.passes.plan_quantization import plan_of
from tests.docs.fences import fences, run_page

PAGE = "write-your-own-pass.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the blocks of the page leave; running them compares what they print."""
    with contextlib.chdir(tmp_path_factory.mktemp("page")):
        return run_page(PAGE)


def test_it_protects_the_whole_fused_set_with_the_reason(page: dict[str, Any]) -> None:
    plan = plan_of(page["protected"].program)
    kept = {e.fqn.split(".")[-2]: e.reason for e in plan.entries if "fragile" in e.reason}
    assert set(kept) == {"q_proj", "k_proj", "v_proj"}
    assert all("layers.0.self_attn.k_proj" in reason for reason in kept.values())
    assert page["protected"].modified


def test_a_floor_that_all_weights_reach_changes_nothing(page: dict[str, Any]) -> None:
    assert not page["ProtectFragile"](floor=1).run(page["planned"]).modified


def test_it_is_refused_once_the_plan_is_carried_out(page: dict[str, Any]) -> None:
    fake = page["run_passes"](page["planned"], [page["passes"][-2]]).program
    with pytest.raises(page["PassError"], match="run it before insert-fake-quant"):
        page["ProtectFragile"]().run(fake)


def test_the_artifact_is_shaped_by_the_pass(page: dict[str, Any]) -> None:
    loaded = page["loaded"]
    assert set(loaded.weights) == set(page["compiled"].weights)
    assert len(loaded.weights) == 11 and not {*page["kept"]} & {*loaded.weights}
    assert loaded.frozen.passes == ()


def test_it_is_as_short_as_the_page_says() -> None:
    source = next(f.text for f in fences(PAGE) if f.language == "python")
    start = source.index("    def apply")
    body = inspect.cleandoc(source[start : source.index("    def ensures")]).splitlines()[1:]
    assert 10 < len([line for line in body if line.strip()]) < 20
