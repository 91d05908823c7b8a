import os
import time
from pathlib import Path

import pytest

from gracec.errors import GracecError
from gracec.yaml_files import DEEPEST, MOST_NODES, read_yaml_mapping


def refused(path: Path) -> str:
    started = time.perf_counter()
    with pytest.raises(GracecError) as error:
        read_yaml_mapping(path)
    assert time.perf_counter() - started < 10
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return error.value.what


def of_text(folder: Path, text: str | bytes) -> Path:
    path = folder / "fields.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def bomb(last: str) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {last.format(n - 1)}" for n in range(1, 30)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, f"more than {DEEPEST} deep"),
        ("{a: " * 100_000, f"more than {DEEPEST} deep"),
        ("- " * 100_000 + "1", f"more than {DEEPEST} deep"),
        (bomb("[" + ", ".join(["*a{0}"] * 9) + "]"), f"more than {MOST_NODES} values"),
        (bomb("{{<<: [" + ", ".join(["*a{0}"] * 9) + "], z: 1}}"), "stands for more than"),
        ("a: &a [*a]", "*a stands within itself"),
        ("a: &a\n  <<: *a", "*a stands within itself"),
        ("a: " + "9" * 5_000, "not readable as YAML"),
        ("a: !!int ''", "not readable as YAML"),
        ("a: !!timestamp x", "not readable as YAML"),
        ("a: !!bool x", "not readable as YAML"),
        ("a: 2001-99-99", "not readable as YAML"),
        ("a: !!python/object/apply:os.system [exit]", "not readable as YAML"),
        ("a: 1\n---\nb: 2", "not readable as YAML"),
        ("a: *b", "not readable as YAML: found undefined alias"),
        ("a: \x00", "not readable as YAML"),
        (b"a: \xff\xfe", "not readable as YAML: not UTF-8"),
        ("", "not a mapping of fields"),
        ("- 1", "not a mapping of fields"),
        ("1: 2", "a key is '1', which is no text"),
        ("null: 2", "a key is 'None', which is no text"),
        ("a: " + "b" * 2**20, "larger than"),
    ],
)
def test_what_is_no_mapping_is_refused_in_one_line(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    assert message in refused(of_text(tmp_path, text))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.yaml") == "no such file"
    assert refused(tmp_path) == "no regular file"
    os.mkfifo(tmp_path / "pipe.yaml")
    assert refused(tmp_path / "pipe.yaml") == "no regular file"
    assert refused(tmp_path / ("a" * 300)) == "cannot be read: File name too long"
    path = of_text(tmp_path, "a: 1")
    path.chmod(0)
    if os.geteuid():  # root reads everything
        assert refused(path) == "cannot be read: Permission denied"


def test_anchors_and_merge_keys_of_ordinary_size_are_read(tmp_path: Path) -> None:
    path = of_text(tmp_path, "\ufeffa: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}")
    assert read_yaml_mapping(path) == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}
