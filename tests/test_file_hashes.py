"""Every file that loading reads has a hash, and its name stays inside its directory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from gracec.errors import GracecError
from gracec.file_hashes import (
    check_configuration,
    check_files,
    file_sha256,
    hashes_of,
    inside,
    is_read,
    json_sha256,
    read_names,
)

# What transformers writes or reads beside configuration and processor.
OTHERS = (
    *("model.safetensors", "adapter_config.json", "modelcard.json", "export.json"),
    *("trainer_state.json", "pytorch_model.bin.index.json", "model.safetensors.index.json"),
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    found = tmp_path / "model"
    (found / "additional_chat_templates").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "additional_chat_templates/tool.jinja"):
        (found / name).write_text(name)
    (found / "README.md").write_text("of the user")
    return found


def test_names_are_those_that_transformers_looks_for() -> None:
    """In the source of the installed version: the files of every tokenizer, and the constants."""
    names: set[str] = set()
    for file in Path(transformers.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        names.update(re.findall(r'"[a-z_]*_file": ?"([^"]+\.[a-z]+)"', text))
        names.update(re.findall(r'^[A-Z_]*(?:FILE|NAME) = "([^"]+\.(?:json|jinja))"', text, re.M))
    assert {"tokenizer.json", "config.json", "chat_template.jinja", "spiece.model"} <= names
    assert [name for name in sorted(names) if not is_read(name) and name not in OTHERS] == []


def test_the_files_that_are_read(directory: Path) -> None:
    names = ["additional_chat_templates/tool.jinja", "config.json", "tokenizer.json"]
    assert read_names(directory) == names
    hashes = hashes_of(directory, names)
    check_files(directory, hashes)
    check_configuration(directory, hashes)
    (directory / "notes.txt").write_text("of the user")
    check_configuration(directory, hashes)


@pytest.mark.parametrize("name", ["config.json", "additional_chat_templates/tool.jinja"])
def test_one_that_is_changed_missing_or_added_is_named(directory: Path, name: str) -> None:
    hashes = hashes_of(directory, read_names(directory))
    file = directory / name
    before = file.read_text()
    file.write_text("edited")
    with pytest.raises(GracecError, match=f"{file}: the file is not .* put back what was saved"):
        check_configuration(directory, hashes)
    file.unlink()
    with pytest.raises(GracecError, match=f"{file}: missing; put back"):
        check_configuration(directory, hashes)
    file.write_text(before)
    del hashes[name]
    with pytest.raises(GracecError, match=f"{file}: the file was not written with the model.*re"):
        check_configuration(directory, hashes)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/../../b", "/etc/passwd", "a//b", "./a", "C:/a", "a\\b", "a\0"],
)
def test_a_name_that_is_none_of_a_file_inside(directory: Path, name: str) -> None:
    with pytest.raises(GracecError, match="is no name of a file in it"):
        inside(directory, name)


def test_a_link_stays_inside(directory: Path, tmp_path: Path) -> None:
    (directory / "inner").symlink_to("config.json")
    assert inside(directory, "inner").read_text() == "config.json"
    (tmp_path / "secret").write_text("x")
    (directory / "outer").symlink_to("../secret")
    (directory / "folder").symlink_to("..")
    for name in ("outer", "folder/secret"):
        with pytest.raises(GracecError, match="it leads out of its directory, to .*secret; copy"):
            check_files(directory, {name: file_sha256(tmp_path / "secret")})


def test_a_snapshot_of_the_hub_links_into_its_own_store(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0abc", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    check_configuration(snapshot, {"config.json": file_sha256(blobs / "1")})
    (tmp_path / "other").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../../other")
    with pytest.raises(GracecError, match="leads out"):
        check_files(snapshot, {"tokenizer.json": file_sha256(tmp_path / "other")})


def test_what_cannot_be_read_is_one_line(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = hashes_of(directory, ["config.json"])

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(GracecError, match=r"config\.json: cannot be read: Permission denied"):
        check_files(directory, hashes)


def test_a_json_value_has_one_hash_whatever_the_order_of_its_keys() -> None:
    assert json_sha256({"a": 1, "b": [1.5, "ä"]}) == json_sha256({"b": [1.5, "ä"], "a": 1})
    assert json_sha256({"a": 1}) != json_sha256({"a": 1.5})
