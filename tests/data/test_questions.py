"""Reading question answering samples: what is read, and what a wrong line or image says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gracec.data.questions import VqaSample, load_samples, spread
from gracec.errors import GracecError
from tests.tiny import tiny_image

RECORD = {"image": "0.png", "question": "What is it?", "answer": "red", "type": "what"}


def write(folder: Path, *records: Any) -> Path:
    """samples.jsonl with one line a record (bytes as they are), and the image 0.png."""
    tiny_image().save(folder / "0.png")
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in records]
    (folder / "samples.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def test_reads_samples_with_paths_relative_to_the_folder(tmp_path: Path) -> None:
    untyped = {name: value for name, value in RECORD.items() if name != "type"}
    samples = load_samples(write(tmp_path, RECORD, b"", {**untyped, "id": 7}))
    image = tmp_path / "0.png"
    assert samples == [
        VqaSample(image, "What is it?", "red", "what"),
        VqaSample(image, "What is it?", "red", "all"),
    ]


def test_a_question_may_be_about_no_image(tmp_path: Path) -> None:
    text = {name: value for name, value in RECORD.items() if name != "image"}
    samples = load_samples(write(tmp_path, RECORD, text))
    assert [sample.image for sample in samples] == [tmp_path / "0.png", None]
    assert samples[1].picture() is None


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    question = "one\u2028two"
    line = json.dumps({**RECORD, "question": question}, ensure_ascii=False).encode()
    assert load_samples(write(tmp_path, line))[0].question == question


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"image": ', "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b'{"image": "\xff"}', "not UTF-8"),
        ({"image": "0.png", "question": "q"}, '"answer" is missing'),
        ({**RECORD, "question": " "}, '"question" must be a text that is not empty'),
        ({**RECORD, "answer": 3}, '"answer" must be a text that is not empty'),
        ({**RECORD, "answer": "red \ud83d"}, '"answer" has half of a character'),
        ({**RECORD, "type": None}, '"type" must be a text that is not empty'),
        ({**RECORD, "image": "gone.png"}, "gone.png does not exist"),
        ({**RECORD, "image": "."}, "is not a file"),
    ],
)
def test_a_bad_line_is_one_error_with_file_and_line(
    tmp_path: Path, line: Any, message: str
) -> None:
    with pytest.raises(GracecError) as caught:
        load_samples(write(tmp_path, RECORD, line))
    assert str(caught.value).startswith(f"{tmp_path / 'samples.jsonl'}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_a_truncated_image_names_file_and_line(tmp_path: Path, suffix: str) -> None:
    broken = tmp_path / f"broken.{suffix}"
    Image.effect_noise((64, 64), 100).save(broken)
    whole = broken.read_bytes()
    folder = write(tmp_path, RECORD, {**RECORD, "image": broken.name})
    assert len(load_samples(folder)) == 2
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GracecError, match=r"samples\.jsonl:2: image .*broken.* cannot be decoded"):
        load_samples(folder)


def test_a_folder_without_samples_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(GracecError, match="give a folder that holds samples.jsonl"):
        load_samples(tmp_path / "none")
    (tmp_path / "samples.jsonl").write_text("\n")
    with pytest.raises(GracecError, match="no samples"):
        load_samples(tmp_path)


def test_limit_does_not_fall_in_step_with_a_cycle_in_the_data() -> None:
    answers = ["yes", "no", "no", "yes"] * 50  # every stride of 2, 4, ... would see few of them
    chosen = spread(["exist"] * len(answers), 50)
    assert 15 <= sum(answers[index] == "yes" for index in chosen) <= 35


def test_limit_is_balanced_and_repeatable(tmp_path: Path) -> None:
    records = [{**RECORD, "question": f"{i}", "type": "common"} for i in range(100)]
    records += [{**RECORD, "question": f"{i}", "type": "rare"} for i in range(100, 103)]
    folder = write(tmp_path, *records)
    samples = load_samples(folder, limit=13)
    assert Counter(sample.type for sample in samples) == {"rare": 3, "common": 10}
    numbers = [int(sample.question) for sample in samples]
    assert numbers == sorted(set(numbers))
    assert numbers[-3:] == [100, 101, 102]
    assert samples == load_samples(folder, limit=13)
    assert len(load_samples(folder, limit=1000)) == 103
    with pytest.raises(GracecError, match="limit must be at least 1, not 0"):
        load_samples(folder, limit=0)


@given(types=st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), limit=st.integers(1, 80))
def test_spread_takes_distinct_positions_and_is_fair(types: list[str], limit: int) -> None:
    chosen = spread(types, limit)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(limit, len(types))
    taken, there = Counter(types[index] for index in chosen), Counter(types)
    partial = [taken[name] for name in there if taken[name] < there[name]]
    # Only a type that is used up may have fewer than another.
    assert all(taken[name] <= min(partial, default=limit) + 1 for name in there)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a": ' * 100_000, "9" * 5_000])
def test_a_line_that_no_parser_takes_ends_in_one_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "samples.jsonl").write_text(line)
    with pytest.raises(GracecError, match=r"samples.jsonl:1: not readable as JSON"):
        load_samples(tmp_path)


@pytest.mark.parametrize("name", ["imge", "Image", "images", "img", "picture_path", "video"])
def test_a_picture_under_another_name_is_no_question_about_none(name: str, tmp_path: Path) -> None:
    record = {"question": "what?", "answer": "it", name: "a.png", "source": "mine"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(record))
    with pytest.raises(
        GracecError, match=f'samples.jsonl:1: "{name}" is not read; name it "image"'
    ):
        load_samples(tmp_path)
    del record[name]
    (tmp_path / "samples.jsonl").write_text(json.dumps({**record, "id": 3}))
    assert load_samples(tmp_path)[0].image is None
