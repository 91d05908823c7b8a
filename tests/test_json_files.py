"""JSON files that are missing, unreadable, no JSON, too deep, or of other fields."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gracec import json_files
from gracec.errors import GracecError
from gracec.json_files import (
    DEEPEST,
    JsonModel,
    check_fields,
    parse_json,
    read_json,
    read_json_object,
)


class Entry(JsonModel):
    """One number."""

    scale: float


class Wanted(JsonModel):
    """What the files of these tests should hold."""

    name: str
    entries: dict[str, Entry]


def test_an_object_is_read_with_and_without_a_byte_order_mark(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b'\xef\xbb\xbf{"name": "\xc3\xa4"}')
    assert read_json(file) == read_json_object(file) == {"name": "ä"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "not readable as JSON: Expecting property name"),
        (b"\xff\xfe{", "not readable as UTF-8 text"),
        (b"[" * 100_000, f"more than {DEEPEST} deep"),
        (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), f"more than {DEEPEST} deep"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, f"more than {DEEPEST} deep"),
        (b"1" * 5_000, "not readable as JSON: Exceeds the limit"),
        (b"[1]", "not a JSON object but a list"),
        (b"null", "not a JSON object but null"),
    ],
)
def test_other_content_is_one_line(tmp_path, content, expected):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(GracecError) as error:
        read_json_object(file, fix="copy it again")
    message = str(error.value)
    assert message.startswith(f"{file}: ") and message.endswith("; copy it again")
    assert expected in message and "\n" not in message


def test_the_deepest_that_is_taken():
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, where="x")


def test_what_is_no_file_is_one_line(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text("[1, 2, 3]")
    monkeypatch.setattr(json_files, "LARGEST", 3)
    for name, expected in {
        "missing": "no such file",
        "pipe": "no regular file",
        "large": "too large",
        "": "no regular file",
        "x" * 300: "cannot be read: File name too long",
        "\0": "no such file",
    }.items():
        with pytest.raises(GracecError, match=expected):
            read_json(tmp_path / name)


def test_an_unreadable_file_is_one_line(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text("{}")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(GracecError, match="a.json: cannot be read: Permission denied"):
        read_json(file)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": None}, "name: Input should be a valid string"),
        ({"name": ...}, "name: Field required"),
        ({"other": 1}, "other: Extra inputs are not permitted"),
        ({"entries": {"a": {"scale": float("inf")}}}, "entries.a.scale: Input should be a finite"),
        ({"entries": {"a": {"scale": "1"}}}, "entries.a.scale: Input should be a valid number"),
        ({"entries": []}, "entries: Input should be a valid dictionary"),
    ],
)
def test_a_field_that_does_not_fit_is_named(change, expected):
    fields = {"name": "x", "entries": {"a": {"scale": 1}}}
    assert check_fields(Wanted, fields, where="f").entries["a"].scale == 1
    changed = {k: v for k, v in (fields | change).items() if v is not ...}
    with pytest.raises(GracecError) as error:
        check_fields(Wanted, changed, where="f.json", fix="again")
    assert str(error.value).startswith(f"f.json: {expected}") and "\n" not in str(error.value)


def test_what_is_no_object_has_no_fields():
    with pytest.raises(GracecError, match="not a JSON object but text"):
        check_fields(Wanted, json.loads('"x"'), where="f")
