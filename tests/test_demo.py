"""What the demo writes over."""

from pathlib import Path

import pytest

from gracec.demo import MARK, _clear
from gracec.errors import GracecError


def test_a_demo_replaces_what_a_demo_wrote_and_nothing_else(tmp_path: Path) -> None:
    output, data = tmp_path / "out", tmp_path / "out" / "data"
    _clear(output, [data])
    assert (output / MARK).is_file()
    data.mkdir()
    (data / "samples.jsonl").touch()
    (output / "notes.txt").write_text("mine")
    _clear(output, [data])
    assert not data.exists()
    assert (output / "notes.txt").read_text() == "mine"
    data.mkdir()
    (output / MARK).unlink()
    with pytest.raises(GracecError, match="data: it exists, and the demo would write there"):
        _clear(output, [data])
    assert data.is_dir()
