"""The decode benchmark: workers answer, the statistics are right, what is missing is said."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "decode"
MODULES = "engines measure models prepare rounds run variants worker".split()


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules of the benchmark, which are scripts beside each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER.parent))
        patch.syspath_prepend(str(FOLDER))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        import prepare
        import rounds
        import run

        yield SimpleNamespace(prepare=prepare, rounds=rounds, run=run)
        for name in MODULES:
            sys.modules.pop(name, None)


def synthetic(decode: dict[str, list[tuple[float, float]]]) -> list[dict[str, object]]:
    """Variant -> (tokens/s with one thread, with two) in each round."""
    return [
        {
            name: {str(t + 1): {"decode": speed} for t, speed in enumerate(pairs[number])}
            for name, pairs in decode.items()
        }
        for number in range(len(next(iter(decode.values()))))
    ]


def test_ratios_are_those_of_each_round_at_the_best_threads(bench: SimpleNamespace) -> None:
    found = synthetic(
        {"fast": [(30.0, 20.0), (60.0, 70.0), (90.0, 10.0)], "slow": [(5.0, 10.0)] * 3}
    )
    assert bench.rounds.best_threads(found, "fast", "decode") == "1"
    assert bench.rounds.best_threads(found, "slow", "decode") == "2"
    assert bench.rounds.ratios(found, "fast", "slow", "decode") == [3.0, 6.0, 9.0]
    del found[1]["slow"]  # a round without the reference gives no ratio
    assert bench.rounds.ratios(found, "fast", "slow", "decode") == [3.0, 9.0]


@pytest.mark.parametrize(
    ("count", "low", "high", "confidence"),
    [(3, 1, 3, 0.75), (6, 1, 6, 0.96875), (9, 2, 8, 1 - 2 * 10 / 512), (12, 3, 10, 1 - 158 / 4096)],
)
def test_intervals_are_the_order_statistics_of_the_tables(
    bench: SimpleNamespace, count: int, low: int, high: int, confidence: float
) -> None:
    found = bench.rounds.interval([float(n) for n in reversed(range(1, count + 1))])
    assert (found.low, found.high) == (low, high)
    assert found.median == (count + 1) / 2
    assert found.confidence == pytest.approx(confidence)


def test_a_verdict_needs_an_interval_on_one_side(bench: SimpleNamespace) -> None:
    found = bench.rounds.interval([2.0, 2.1, 2.2, 2.3, 2.4, 2.5])
    assert bench.rounds.verdict(found, 1.9) == "reached"
    assert bench.rounds.verdict(found, 2.2) == "inconclusive"
    assert bench.rounds.verdict(found, 2.6) == "missed"
    assert bench.rounds.verdict(bench.rounds.interval([2.0, 2.1]), 1.0) == "inconclusive"


@pytest.mark.slow
def test_a_round_of_a_tiny_model(bench: SimpleNamespace, tmp_path: Path) -> None:
    nobody = tmp_path / "no-peers"
    shop = bench.prepare.Workshop("tiny", tmp_path / "tiny", nobody, "")
    bench.prepare.make_decoder(shop)
    results = tmp_path / "results"
    results.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["measure"], "RESULTS", results)
        arguments = ["--model", "tiny", "--rounds", "1", "--only", "torch*"]
        bench.run.main([*arguments, "--work", str(tmp_path), "--peers", str(nobody)])
        again = bench.run.take_rounds([], 1, 1.0, tmp_path / "tiny/rounds-finished.jsonl", {})
    assert [set(one["variants"]) for one in again] == [{"torch float32", "torch bfloat16"}]
    assert torch.get_num_threads() == 1  # as in all tests
    result = json.loads((results / "decode_tiny.json").read_text(encoding="utf-8"))
    assert result["command"].endswith("decode/run.py --model tiny --rounds 1 --only 'torch*'")
    rows = result["rows"]
    (full,) = (row for row in rows if row.get("variant") == "torch float32")
    assert full["decode_tokens_per_s"] > 0 and full["prefill_tokens_per_s"] > 0
    assert full["percent_of_bandwidth"] >= 0
    assert full["tokens_as_torch"] == "32 of 32"
    assert full["x_torch_fp32"] == "1.00 (1.00 to 1.00)"
    half = next(row for row in rows if row.get("variant") == "torch bfloat16")
    assert half["weights_mib"] == pytest.approx(full["weights_mib"] / 2, abs=0.1)
    (machine,) = (row for row in rows if "bandwidth_gb_per_s" in row)
    assert float(machine["bandwidth_gb_per_s"].split()[0]) > 0
    lost = {row["variant"]: row["missing"] for row in rows if "missing" in row}
    assert "no-peers" in lost["llama.cpp Q4"]
