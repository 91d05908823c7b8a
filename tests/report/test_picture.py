from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from transformers import LlavaForConditionalGeneration

from gracec.errors import GracecError
from gracec.inspection import inspect_model
from gracec.report.partition import Inspection
from gracec.report.picture import COLOURS, draw_picture


@pytest.fixture(scope="module")
def found(
    llava: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory
) -> Inspection:
    path = tmp_path_factory.mktemp("picture") / "model"
    llava.config.save_pretrained(path)
    return inspect_model(path)


def test_the_svg_holds_every_part_as_text(found: Inspection, tmp_path: Path) -> None:
    path = tmp_path / "parts.svg"
    draw_picture(found, path)
    texts = [t for t in ElementTree.parse(path).getroot().itertext() if t.strip()]
    for wanted in ("vision", "projector", "embedding", "merge", "decoder, 2 blocks", "head"):
        assert wanted in texts
    assert "shared with the head" in texts
    assert "99.6% quantized" in texts  # the norms of the decoder are kept
    assert texts.count("kept as it is") == 3
    assert any(text.startswith("unused: 8.61k parameters") for text in texts)
    assert all(fill in path.read_text() for fill, _ in COLOURS.values())


def test_equal_models_give_equal_files(found: Inspection, tmp_path: Path) -> None:
    draw_picture(found, tmp_path / "a.svg")
    draw_picture(found, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_png_by_its_ending(found: Inspection, tmp_path: Path) -> None:
    draw_picture(found, tmp_path / "parts.png")
    with Image.open(tmp_path / "parts.png") as image:
        assert image.width > 1500


@pytest.mark.parametrize("name", ["missing/parts.svg", "parts.doc"])
def test_a_path_that_cannot_be_written(found: Inspection, tmp_path: Path, name: str) -> None:
    with pytest.raises(GracecError, match="cannot be written"):
        draw_picture(found, tmp_path / name)
