"""What is shipped is small, licensed and described."""

import json
import re
from pathlib import Path

import make_dataset
from emojivqa import sprites
from emojivqa.questions import TYPES
from PIL import Image

MEGABYTE = 1_000_000


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_data_and_models_fit_the_budget(example) -> None:
    assert size(example / "sprites") < 2 * MEGABYTE
    assert sum(size(example / part) for part in ("sprites", "student", "teacher")) < 20 * MEGABYTE


def test_every_sprite_file_names_its_licence(example) -> None:
    folder = example / "sprites"
    text = (folder / "ATTRIBUTION.md").read_text()
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert set(rows) == {path.name for path in folder.glob("*.webp")}
    assert {f"{style}.webp" for split in sprites.STYLES.values() for style in split} == set(rows)
    for row in rows.values():
        licences = re.findall(r"\((LICENSES/[^)]+)\)", row)
        assert licences
        assert all(len((folder / licence).read_text()) > 1000 for licence in licences)


def test_dataset_folder_has_the_generic_form(tmp_path: Path) -> None:
    assert make_dataset.write("test", tmp_path, limit=12) == 12
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["type"] for line in lines[:5]] == list(TYPES)
    for line in lines:
        assert set(line) == {"image", "question", "answer", "type"}
        with Image.open(tmp_path / line["image"]) as image:
            assert image.size == (64, 64)
    assert len({line["image"] for line in lines}) == 3


def test_results_belong_to_the_shipped_models(example) -> None:
    """Every model has validation and test results, and its card quotes the validation accuracy."""
    for name in ("student", "teacher"):
        card = (example / name / "README.md").read_text()
        for split in ("validation", "test"):
            results = json.loads((example / "results" / f"{name}_{split}.json").read_text())
            assert set(results["types"]) == set(TYPES)
            assert f"{results['all']['accuracy']:.1f}" in card
