"""Run the tests of all families and keep what they recorded, for the table of docs/families.md.

    python docs/families.py [FAMILY ...]      rewrites these rows of docs/results/families.json
    python docs/families.py doctor            what `gracec doctor` says about three models
    python docs/make_pages.py                 writes the table

A test is a column and a family a row. A cell is what the test recorded when it passed, or its
error.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests are no installed package
TESTS = ROOT / "tests/capture/test_families.py"
RESULTS = ROOT / "docs/results/families.json"
COLUMNS = {
    "test_capture": "capture",
    "test_partition": "partition",
    "test_grace_step": "GRACE step",
    "test_torchao": "torchao",
    "test_hf": "HF reload",
    "test_onnx": "ONNX",
    "test_transformers_js": "JS",
    "test_genai": "genai",
}


class Recorder:
    """Writes the cells of a family as its tests end."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test, _, family = report.nodeid.partition("::")[2].rstrip("]").partition("[")
        if test not in COLUMNS or not (report.failed or report.when == "call"):
            return
        cell = dict(report.user_properties).get("cell", "")
        if report.failed:
            crash: Any = getattr(report.longrepr, "reprcrash", None)
            cell = f"failed: {str(crash.message).splitlines()[0]}" if crash else "failed"
        found = read()
        found["families"].setdefault(family, {})[COLUMNS[test]] = str(cell)
        write(found)


def read() -> dict[str, Any]:
    """The results so far."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def write(found: dict[str, Any]) -> None:
    """Rewrite the results."""
    text = json.dumps(found, indent=2, ensure_ascii=False)
    RESULTS.write_text(text + "\n", encoding="utf-8")


def doctor() -> None:
    """Keep what `gracec doctor` says about three directories."""
    from gracec.doctor import diagnose
    from tests.capture.test_generic import llava_next_video
    from tests.tiny_families import tiny_model, tiny_processor

    examples = {
        "qwen2-vl": "A model that can be compiled:",
        "llava-next-video": "A family without an adapter, which needs one:",
        "broken": "The first model again, with a file cut short and the processor of another:",
    }
    found = read()
    found["doctor"] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name in ("qwen2-vl", "broken"):
            tiny_model("qwen2_vl").save_pretrained(name)
            tiny_processor("qwen2_vl").save_pretrained(name)
        llava_next_video().save_pretrained("llava-next-video")
        weights = Path("broken/model.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1000])
        tiny_processor("qwen2_5_vl").save_pretrained("broken")
        options = Path("broken/processor_config.json")
        options.write_text(options.read_text().replace('"merge_size": 2', '"merge_size": 1'))
        for name, what in examples.items():
            diagnosis = diagnose(name)
            lines = [check.line() for check in diagnosis.checks if check.needed]
            found["doctor"][name] = {"what": what, "lines": [*lines, diagnosis.verdict()]}
    write(found)


def main(families: list[str]) -> int:
    """Run the tests of these families, or of all."""
    chosen = ["-k", " or ".join(f"[{family}]" for family in families)] if families else []
    columns = [f"{TESTS}::{test}" for test in COLUMNS]
    if families == ["doctor"]:
        doctor()
        return 0
    flags = [flag for flag in sys.argv[1:] if flag.startswith("-")]
    options = ["-p", "no:logging", "-p", "no:xdist", "-q", *chosen, *flags]
    return int(pytest.main([*columns, *options], plugins=[Recorder()]))


if __name__ == "__main__":
    sys.exit(main([name for name in sys.argv[1:] if not name.startswith("-")]))
