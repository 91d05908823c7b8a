"""The comparison with other quantizers: its grids, texts and figures are what they are called."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

FOLDER = Path(__file__).parents[1] / "benchmarks" / "ptq"
MODULES = "cells evaluator handover large measure peer_gptq tables texts".split()


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules of the benchmark, which are scripts beside each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), str(FOLDER.parent), *sys.path])
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        import cells
        import evaluator
        import handover
        import large
        import tables
        import texts

        yield SimpleNamespace(
            cells=cells,
            evaluator=evaluator,
            handover=handover,
            large=large,
            tables=tables,
            texts=texts,
        )
        for name in MODULES:
            sys.modules.pop(name, None)


def test_every_cell_has_a_name_of_its_own_and_a_title(bench: SimpleNamespace) -> None:
    cells = list(bench.cells.cells())
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        assert bench.tables.name(cell.tool, cell.method)
        assert (cell.tool, cell.method) in {
            (tool, method) for tool, runs in bench.cells.PEERS.items() for method, _ in runs
        } | {("gracec", method) for method in ("weights", "auto", "scales")}
    assert cells[0].name == "smollm2-gracec-weights-none-w4-g128"


@pytest.mark.parametrize(
    ("asked", "columns", "used"), [(128, 1536, 128), (128, 576, 64), (32, 576, 32), (128, 40, 8)]
)
def test_groups_are_halved_until_they_fit(
    bench: SimpleNamespace, asked: int, columns: int, used: int
) -> None:
    assert bench.cells.fitting(asked, columns) == used


def test_a_weight_is_handed_over_on_its_grid_or_not_at_all(bench: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(4, 2, generator=generator) + 0.1
    scale[1] *= -1
    codes = torch.randint(-8, 8, (4, 64), generator=generator).float()
    exact = codes * scale.repeat_interleave(32, dim=1)
    blurred = exact * (1 + 1e-7)
    assert torch.equal(bench.handover.on_grid("w", blurred, scale, 4, 32), exact)
    with pytest.raises(ValueError, match="steps off the grid"):
        bench.handover.on_grid("w", exact + 0.01, scale, 4, 32)
    with pytest.raises(ValueError, match="for 3 bits"):
        bench.handover.on_grid("w", exact, scale, 3, 32)
    zero = torch.full((4, 2), 7.5)
    affine = bench.handover.on_affine_grid("w", codes + 8, scale, zero, 4, 32)
    torch.testing.assert_close(affine, exact + 0.5 * scale.repeat_interleave(32, dim=1))
    with pytest.raises(ValueError, match="codes from 0.0 to 15.0 for 3 bits"):
        bench.handover.on_affine_grid("w", codes + 8, scale, zero, 3, 32)


def test_what_is_handed_over_counts_its_bits_and_is_complete(
    bench: SimpleNamespace, tmp_path: Path
) -> None:
    first, second = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "down"))
    original = {first: torch.zeros(2, 96), second: torch.zeros(2, 64), "lm_head.weight": first}
    codes = torch.randint(-8, 8, (2, 96), generator=torch.Generator().manual_seed(0)).float()
    weights = {first: codes / 4, second: codes[:, :64] / 8}
    asked = Namespace(group_size=64, bits=4, out=tmp_path / "out")
    clock = bench.handover.Clock()
    with clock.running():
        pass
    bench.handover.hand_over(asked, weights, original, clock, ("torch",), zero_bits=16)
    made = json.loads((asked.out / "made.json").read_text(encoding="utf-8"))
    # 96 columns are in groups of 32 and 64 in one: 8 groups of 320 weights, 32 bits each.
    assert made["bits_per_weight"] == 4 + 32 * 8 / 320
    assert made["peak_mib"] > 50
    assert torch.equal(load_file(asked.out / "weights.safetensors")[first], codes / 4)
    with pytest.raises(SystemExit, match="down_proj"):
        bench.handover.hand_over(asked, {first: codes}, original, clock, ())
    off = {**weights, first: torch.rand(2, 96)}
    with pytest.raises(SystemExit, match="is not on a grid of 4 bits"):
        bench.handover.hand_over(asked, off, original, clock, ())


class Words:
    """A tokenizer whose tokens are letters, with or without one that begins a text."""

    def __init__(self, first: list[int]) -> None:
        self.first = first

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict:
        return {"input_ids": (self.first if add_special_tokens else []) + [*map(ord, text)]}


@pytest.mark.parametrize("first", [[], [2]])
def test_windows_are_whole_and_calibration_is_not_measured(
    bench: SimpleNamespace, first: list[int]
) -> None:
    words = Words(first)
    cut = bench.texts.cut(words, "x" * 1100)
    assert cut.shape == (2, 512)
    assert cut[0].tolist() == first + [ord("x")] * (512 - len(first))
    measured = bench.texts.windows(words, "measured")
    same = bench.texts.windows(words, "same")
    foreign = bench.texts.windows(words, "foreign")
    assert (len(measured), len(same), len(foreign)) == (16, 64, 32)
    body = "".join(map(chr, torch.cat([measured, same])[:, len(first) :].flatten().tolist()))
    assert bench.texts.reference().startswith(body)
    assert not {tuple(row) for row in foreign.tolist()} & {tuple(row) for row in measured.tolist()}
    assert bench.texts.fingerprint(foreign) != bench.texts.fingerprint(same)


def test_figures_of_a_window_are_the_mean_over_its_positions(bench: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (3, 200), generator=generator)
    old, new = torch.randn(2, 3, 200, 7, generator=generator)

    def of(logits: Tensor) -> Callable[[slice], Tensor]:
        return lambda positions: logits[positions]

    given = iter(new)
    found = bench.evaluator.measure(lambda _: of(next(given)), [of(row) for row in old], ids)
    loss = [
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for logits in (old, new)
    ]
    assert found["loss_change_nats"] == pytest.approx(float(loss[1] - loss[0]), abs=1e-4)
    assert found["perplexity"] == pytest.approx(float(loss[1].exp()), abs=2e-3)
    logs = [logits[:, :-1].log_softmax(-1) for logits in (old, new)]
    kl = functional.kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(-1).mean()
    assert found["kl_nats"] == pytest.approx(float(kl), abs=1e-4)
    top = (old[:, :-1].argmax(-1) == new[:, :-1].argmax(-1)).double().mean()
    assert found["top1"] == pytest.approx(float(top), abs=1e-4)
    again = bench.evaluator.measure(lambda _: of(old[0]), [of(old[0])] * 3, ids[:1].expand(3, -1))
    assert (again["loss_change_nats"], again["kl_nats"], again["top1"]) == (0, 0, 1)


def test_weights_with_too_many_levels_are_not_measured(
    bench: SimpleNamespace, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    decoder = SimpleNamespace(state_dict=lambda: {name: torch.zeros(2, 32)})
    save_file({name: torch.rand(2, 32)}, tmp_path / "weights.safetensors")
    with pytest.raises(SystemExit, match="not on a grid of 4 bits"):
        bench.evaluator.put(decoder, tmp_path, 4, 32)
    save_file({"other": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(SystemExit, match=r"has no \['model.layers.0.self_attn.q_proj.weight'\]"):
        bench.evaluator.put(decoder, tmp_path, 4, 32)


def test_larger_decoders_are_estimated_by_their_operations(bench: SimpleNamespace) -> None:
    large = bench.large
    own = large.MEASURED.operations(16384)
    assert own["search"] == 22 * 2048 * (2 * 2048 + 2048 + 3 * 5632)
    row = {"tokens": 16384, **{f"seconds of {kind}": 60.0 for kind in own}}
    small, big = large.extrapolated(row)
    assert big["minutes"] > small["minutes"] > 0 and not big["measured"]
    grown = large.OTHERS["7B (as LLaVA-1.5-7B)"].operations(16384)["factorization"]
    expected = round(60.0 * grown / own["factorization"])
    assert big["seconds of factorization"] == expected


def test_rows_are_read_from_the_cells(bench: SimpleNamespace, tmp_path: Path) -> None:
    for path in bench.tables.FOLDER.glob("*.json"):
        cell = json.loads(path.read_text(encoding="utf-8"))
        assert len(cell["loss_changes"]) == bench.texts.MEASURED, path.name
        mean = sum(cell["loss_changes"]) / bench.texts.MEASURED
        assert cell["loss_change_nats"] == pytest.approx(mean, abs=1e-4), path.name
    known = {cell.name for cell in bench.cells.cells()}
    assert {path.stem for path in bench.tables.FOLDER.glob("*.json")} <= known
    assert bench.tables.results(tmp_path) == {}
