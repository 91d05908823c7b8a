"""Training data: what is read and refused, how it is split, and in which order."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gracec.data.conversations import (
    BrokenSample,
    Sample,
    TrainData,
    draw_apart,
    epoch_order,
    open_train_data,
    read_conversations,
)
from gracec.data.pictures import FORMATS, MAX_PIXELS
from gracec.data.records import Turn
from gracec.data.sources import FOLDER_FILES, MOST_CHARACTERS, open_source
from gracec.data.text import open_text
from gracec.errors import GracecError, GracecWarning
from tests.data.conversations import png, record, said, talk, write
from tests.docs.fences import DOCS, fences
from tests.tiny import tiny_image, tiny_processor


def whole(data: TrainData, index: int = 0) -> Sample:
    found = data.sample(index)
    assert isinstance(found, Sample), found
    return found


# --- What is read ---


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "train.jsonl", "data.json"])
def test_conversations_of_a_file_or_folder(tmp_path: Path, name: str) -> None:
    png(tmp_path, 0, 1)
    records = [
        record("0.png"),
        {"id": 7, "conversations": talk("yes or no ?", "no", "is it red ?", "yes")},
        {"image": ["1.png", "0.png"], "conversations": talk("<image> <image>\nwhich ?", "left")},
    ]
    lines = "\n\n".join(json.dumps(one) for one in records)
    (tmp_path / name).write_text(lines if name.endswith("l") else json.dumps(records))
    data = open_train_data(tmp_path if name[0] in "td" else tmp_path / name)
    assert len(data) == 3 and data.problems == []
    first, text, both = (whole(data, index) for index in range(3))
    assert first.turns == said("<image>\nwhat is it ?", "red")
    assert first.images[0].mode == "RGB"
    assert first.images[0].tobytes() == tiny_image(0).tobytes()
    assert text.turns == said("yes or no ?", "no", "is it red ?", "yes") and text.images == ()
    assert [image.width for image in both.images] == [33, 32]
    last = f"{name}:5" if name.endswith("l") else f"{name}: record 2"
    assert both.where == f"{tmp_path}/{last}"


def test_evaluation_folders_can_be_trained_on(tmp_path: Path) -> None:
    png(tmp_path, 0)
    line = {"image": "0.png", "question": "What?", "answer": "red", "type": "what"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(line))
    sample = whole(open_train_data(tmp_path))
    assert sample.turns == said("<image>\nWhat?", "red") and len(sample.images) == 1


def test_messages_with_parts_and_a_system_turn() -> None:
    parts = [{"type": "text", "text": "what"}, {"type": "image"}]
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    sample = whole(open_train_data([{"images": (tiny_image(),), "messages": messages}]))
    system = Turn("system", "be short")
    assert sample.turns == (system, *said("what\n<image>", "red")) and len(sample.images) == 1


def hub(kind: str) -> Dataset:
    """A dataset of pictures inside, as one picture or lists of them, or in columns of turns."""
    feature: Any = {"image": ImageFeature(), "images": List(ImageFeature())}[kind]
    turns = {"from": Value("string"), "value": Value("string")}
    columns = Features({kind: feature, "conversations": List(turns)})
    one = record()["conversations"]
    text = talk("yes or no ?", "no")
    pictures: list[Any] = [tiny_image(0), None]
    if kind == "images":
        pictures = [[tiny_image(0)], []]
    return Dataset.from_dict({kind: pictures, "conversations": [one, text]}, features=columns)


@pytest.mark.parametrize("kind", ["image", "images"])
@pytest.mark.parametrize("form", ["saved", "dict", "parquet", "memory"])
def test_datasets(tmp_path: Path, kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source: Any = tmp_path / "set"
    if form == "saved":
        hub(kind).save_to_disk(source)
    elif form == "dict":
        DatasetDict({"train": hub(kind), "test": hub(kind).select([1])}).save_to_disk(source)
    elif form == "parquet":
        source.mkdir()
        hub(kind).to_parquet(source / "train-0.parquet")
        (source / "test-0.parquet").write_bytes(b"never looked at")
    else:
        source = hub(kind)
    data = open_train_data(source)
    assert len(data) == 2
    assert whole(data, 0).images[0].tobytes() == tiny_image(0).tobytes()
    assert whole(data, 0).turns == said("<image>\nwhat is it ?", "red")
    assert whole(data, 1).images == ()
    assert open_train_data(source).fingerprint == data.fingerprint


def test_a_dataset_of_paths_is_confined_like_a_file(tmp_path: Path) -> None:
    png(tmp_path, 0)
    good = {"image": ["0.png"] * 3 + [str(tmp_path / "0.png")]}
    rows = Dataset.from_dict({**good, "conversations": [record()["conversations"]] * 4})
    rows.save_to_disk(tmp_path / "set")
    with pytest.warns(GracecWarning, match="absolute path"):
        data = open_train_data(tmp_path / "set", image_root=tmp_path)
    assert len(data) == 3 and len(whole(data).images) == 1


def test_turns_that_are_stored_by_column_or_as_raw_pictures() -> None:
    buffer = io.BytesIO()
    tiny_image().save(buffer, "PNG")
    turns = {"role": ["user", "assistant"], "content": ["<image> what ?", "red"]}
    for picture in (buffer.getvalue(), {"bytes": buffer.getvalue(), "path": "a.png"}):
        sample = whole(open_train_data([{"image": picture, "messages": turns}]))
        assert sample.turns == said("<image> what ?", "red")
        assert sample.images[0].tobytes() == tiny_image().tobytes()


def test_pictures_are_decoded_only_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    real = Image.open
    monkeypatch.setattr(
        Image, "open", lambda file, **more: (opened.append(Path(file.name)), real(file, **more))[1]
    )
    png(tmp_path, 1)
    data = open_train_data(write(tmp_path, record(), record("1.png")))
    assert opened == []
    whole(data, 1)
    assert opened == [tmp_path.resolve() / "1.png"]
    with pytest.raises(IndexError):
        data.sample(2)


def test_a_file_that_changes_while_it_is_used_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, record(), record())
    data = open_train_data(file)
    write(tmp_path, record(question="what else ?"), record())
    with pytest.raises(GracecError, match="has changed since it was opened"):
        data.sample(1)


# --- Fingerprint and split ---


def test_the_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    prints = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        prints.append(open_train_data(write(tmp_path / folder, record())).fingerprint)
    assert prints[0] == prints[1] and len(prints[0]) == 64
    prints.append(open_train_data(write(tmp_path, record(answer="blue"))).fingerprint)
    file = write(tmp_path, record())
    Image.effect_noise((64, 64), 90).save(tmp_path / "0.png")
    prints.append(open_train_data(file).fingerprint)
    assert len(set(prints)) == 3
    memory = [{**record(), "image": tiny_image(seed)} for seed in (0, 0, 1)]
    made = [open_train_data([one]).fingerprint for one in memory]
    assert made[0] == made[1] != made[2]


def pictured(names: Sequence[Sequence[str]]) -> TrainData:
    """Records in memory, with flat pictures whose brightness is their name."""

    def image(name: str) -> Image.Image:
        return Image.new("L", (4, 4), int(name))

    return open_train_data(
        [
            {
                "images": [image(name) for name in own],
                "conversations": talk("<image>" * len(own) + f" question {number} ?", "yes"),
            }
            for number, own in enumerate(names)
        ]
    )


def connected(names: Sequence[Sequence[str]]) -> bool:
    """Whether every two records have a picture in common, directly or through others."""
    reached, rest = set(names[0]), list(names[1:])
    while found := [own for own in rest if reached & set(own)]:
        reached.update(*found)
        rest = [own for own in rest if own not in found]
    return not rest


def asked(data: TrainData) -> list[tuple[str, set[int]]]:
    samples = [whole(data, index) for index in range(len(data))]
    return [
        (one.turns[0].text, {image.convert("L").tobytes()[0] for image in one.images})
        for one in samples
    ]


@given(
    names=st.lists(st.lists(st.integers(0, 12).map(str), max_size=2), min_size=2, max_size=24),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
def test_a_split_keeps_every_picture_on_one_side(
    names: list[list[str]], share: float, seed: int
) -> None:
    data = pictured(names)
    if connected(names):
        with pytest.raises(GracecError, match="share their pictures"):
            data.split(share, seed)
        return
    train, held = data.split(share, seed)
    left, right = asked(train), asked(held)
    assert left and right
    assert sorted(left + right, key=str) == sorted(asked(data), key=str)
    assert not set().union(*(own for _, own in left)) & set().union(*(own for _, own in right))
    again = data.split(share, seed)
    assert [part.fingerprint for part in again] == [train.fingerprint, held.fingerprint]
    assert (asked(again[0]), asked(again[1])) == (left, right)
    assert len({data.fingerprint, train.fingerprint, held.fingerprint}) == 3


def test_a_split_is_of_the_size_asked_for_and_depends_on_the_seed() -> None:
    data = pictured([[str(number // 2)] for number in range(40)])
    parts = [data.split(0.25, seed) for seed in range(4)]
    assert {(len(train), len(held)) for train, held in parts} == {(30, 10)}
    assert len({held.fingerprint for _, held in parts}) == 4
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(GracecError, match="between 0 and 1"):
            data.split(share, 0)


def test_what_is_left_out_stays_with_the_first_part(tmp_path: Path) -> None:
    png(tmp_path, 0, 1)
    file = write(tmp_path, record(), record("gone.png"), record("1.png"))
    with pytest.warns(GracecWarning):
        data = open_train_data(file)
    train, held = data.split(0.5, 0)
    assert (len(train), len(held)) == (1, 1)
    assert train.problems == data.problems != [] and held.problems == []


# --- What is refused ---

BAD: dict[str, tuple[Any, str]] = {
    "json": (b'{"image": ', "not valid JSON"),
    "utf8": (b'{"image": "\xff"}', "not UTF-8"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "list": (b"[1, 2]", "expected an object, found list"),
    "no turns": ({"image": "0.png"}, 'none of "conversations", "messages", "prompt"'),
    "turns": ({"conversations": "hello"}, '"conversations" must be a list'),
    "turn": ({"conversations": ["hello"]}, "a turn must be an object, not str"),
    "role": ({"conversations": [{"from": "tool", "value": "x"}]}, "unknown role 'tool'"),
    "no text": ({"conversations": [{"from": "human"}]}, "the human turn has no text"),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "must be a text or an image, not 'video'",
    ),
    "columns": (
        {"conversations": {"from": ["human", "gpt"], "value": ["what ?"]}},
        'the columns of "conversations" are no lists of one length',
    ),
    "one turn": (
        {"conversations": {"from": "human", "value": "what ?"}},
        'the columns of "conversations" are no lists of one length',
    ),
    "surrogate": (record(answer="red \ud83d"), "the assistant turn has half of a character"),
    "surrogate question": (record(question="\udc00 ?"), "the user turn has half of a character"),
    "surrogate path": (record("\ud83d.png"), "image \\ud83d.png cannot be read"),
    "bytes as text": (record({"bytes": "text"}), "the bytes of an image are a str"),
    "vqa": ({"question": "what", "answer": 3}, '"question" and "answer" must be texts'),
    "answer": (record(answer=" "), "an answer is empty"),
    "question": ({"conversations": talk(" ", "red")}, "a user turn is empty"),
    "no answer": ({"conversations": talk("what ?")}, "in alternation"),
    "order": ({"conversations": talk("what ?", "red", "why ?")}, "in alternation"),
    "no placeholder": (
        {"image": "0.png", "conversations": talk("what ?", "red")},
        "0 <image> in the text for 1 images",
    ),
    "no image": ({"conversations": talk("<image> what ?", "red")}, "1 <image> in the text for 0"),
    "in answer": (
        {"image": "0.png", "conversations": talk("what ?", "<image>")},
        "<image> stands outside a user turn",
    ),
    "not a path": (record(3), "an image must be a path, not 3"),
    "missing": (record("gone.png"), "image gone.png does not exist"),
    "folder": (record("."), "is not a file"),
    "zero": (record("a\0b"), "cannot be read"),
    "absolute": (record("/etc/hostname"), "is an absolute path"),
    "drive": (record("C:\\a.png"), "is an absolute path"),
    "dots": (record("a/../../0.png"), 'has ".." in its path'),
    "backslash": (record("..\\0.png"), 'has ".." in its path'),
    "link": (record("link.png"), "leads out of the image root"),
    "linked folder": (record("out/0.png"), "leads out of the image root"),
    "loop": (record("loop.png"), "cannot be read"),
    "pipe": (record("pipe.png"), "is not a file"),
    "address": (record("https://example.com/a.png"), "is an address, nothing is fetched"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_record_is_reported_and_left_out(tmp_path: Path, name: str) -> None:
    bad, message = BAD[name]
    root = tmp_path / "root"
    (root / "loop.png").parent.mkdir()
    png(tmp_path, 0)
    (root / "link.png").symlink_to(tmp_path / "0.png")
    (root / "out").symlink_to(tmp_path)
    (root / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "pipe.png")
    file = write(root, record(), bad, record())
    with pytest.warns(GracecWarning, match="1 of 3 samples are broken") as caught:
        data = open_train_data(file)
    assert len(caught) == 1
    (problem,) = data.problems
    assert problem.startswith(f"{file}:2: ") and message in problem
    assert "\n" not in str(caught[0].message) and problem in str(caught[0].message)
    assert len(data) == 2 and whole(data, 1).where == f"{file}:3"
    with pytest.raises(GracecError) as strict:
        open_train_data(file, strict=True)
    assert str(strict.value) == problem


def test_a_link_inside_the_image_root_is_followed(tmp_path: Path) -> None:
    file = write(tmp_path, record("link.png"))
    (tmp_path / "link.png").symlink_to("0.png")
    assert len(whole(open_train_data(file)).images) == 1


def test_the_first_of_each_kind_is_named_once(tmp_path: Path) -> None:
    good = [record()] * 4
    file = write(tmp_path, *good, record("x.png"), record("y.png"), record(answer=""))
    with pytest.warns(GracecWarning) as caught:
        data = open_train_data(file)
    (text,) = [str(one.message) for one in caught]
    assert "3 of 7 samples" in text and "2 missing image (" in text and "1 empty text (" in text
    assert "x.png" in text and "y.png" not in text
    assert len(data.problems) == 3


def test_more_than_half_is_an_error_and_half_is_not(tmp_path: Path) -> None:
    with pytest.warns(GracecWarning):
        open_train_data(write(tmp_path, record(), record("x.png")))
    with pytest.raises(GracecError, match="more than half of the 3 samples .*x.png does not exist"):
        open_train_data(write(tmp_path, record(), record("x.png"), record(answer="")))


def test_questions_may_be_read_that_nobody_answered(tmp_path: Path) -> None:
    asked = [{"image": "0.png", "question": "what is it ?"}, record()]
    file = write(tmp_path, *asked)
    data = read_conversations(open_source(file), answered=False, strict=True)
    assert whole(data, 0).turns == said("<image>\nwhat is it ?")
    assert whole(data, 1).turns == said("<image>\nwhat is it ?", "red")
    with pytest.warns(GracecWarning, match="1 of 2 samples are broken"):
        assert len(open_train_data(file)) == 1


def header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + body + chunk(b"IEND", b"")


def undecodable() -> dict[str, tuple[bytes, str]]:
    cut = io.BytesIO()
    Image.effect_noise((64, 64), 100).save(cut, "JPEG")
    eps = io.BytesIO()
    tiny_image().save(eps, "EPS")
    return {
        "cut": (cut.getvalue()[:800], "cannot be decoded"),
        "text": (b"not a picture", "is none of PNG, JPEG"),
        "eps": (eps.getvalue(), "is none of PNG, JPEG"),
        "large": (header(8193, 8192), "8193 x 8192 pixels, more than 67108864"),
        "warned of": (header(10_000, 10_000), "has more than 67108864 pixels"),
        "refused": (header(60_000, 60_000), "has more than 67108864 pixels"),
    }


@pytest.mark.parametrize("name", undecodable())
@pytest.mark.parametrize("embedded", [False, True])
def test_a_picture_that_cannot_be_decoded(tmp_path: Path, name: str, embedded: bool) -> None:
    content, message = undecodable()[name]
    (tmp_path / "bad.png").write_bytes(content)
    records = [record(), record("bad.png"), record()]
    if embedded:
        records = [{**record(), "image": tiny_image()}, {**record(), "image": content}, record()]
    source: Any = records if embedded else write(tmp_path, *records)
    png(tmp_path, 0)
    data = open_train_data(source, image_root=tmp_path)
    assert len(data) == 3 and data.problems == []
    with pytest.warns(GracecWarning, match="left out"):
        found = data.sample(1)
    assert isinstance(found, BrokenSample) and message in found.reason
    assert data.problems == [str(found)]
    assert data.sample(1) is found  # and no second warning: `-W error` would show it
    with pytest.raises(GracecError, match=message):
        open_train_data(source, image_root=tmp_path, strict=True).sample(1)


def test_too_many_broken_pictures_end_a_run(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    data = open_train_data(write(tmp_path, *[record("bad.png")] * 3))
    with pytest.warns(GracecWarning) as caught:
        data.sample(0)
    assert len(caught) == 1
    with pytest.raises(GracecError, match="more than half"):
        data.sample(2)


def test_a_large_picture_in_memory_is_refused_too() -> None:
    records = [{**record(), "image": tiny_image()}] * 2
    with pytest.warns(GracecWarning, match="more than 67108864"):
        open_train_data([*records, {**record(), "image": Image.new("1", (8193, 8192))}])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"image": 1}', "expected a JSON list of records, found dict; .*jsonl"),
        ("a.json", b"[1,", "not valid JSON"),
        ("a.json", b'{"rows": [{"a": 1}]}', "an object with a list under 'rows'; save that list"),
        ("a.json", b"{\n}{}\n", "not valid JSON .Extra data"),
        ("a.json", b"{}\n{}\n", "more than half of the 2 samples are broken"),
        ("a.json", b"[]", "no records"),
        ("a.jsonl", b"\n\n", "no records"),
        ("a.csv", b"image", "not training data; give a .json"),
        ("a/readme", b"", "no training data in this folder; put one of train.jsonl"),
        ("a/readme.txt", b"", "plain text has no answers to learn; give conversations"),
        ("a.md", b"# Cats", "plain text has no answers to learn; give conversations"),
        ("a.jsonl", b'{"text": "a cat"}', "plain text has no answers to learn"),
        ("a/dataset_dict.json", b"{}", r"no split is called train \(found none\)"),
        ("a/x.parquet", b"no", "the parquet files cannot be read"),
        ("a/state.json", b"{", "the saved dataset cannot be read"),
    ],
)
def test_sources_that_cannot_be_opened(
    tmp_path: Path, name: str, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    if path.name == "state.json":
        (path.parent / "dataset_info.json").write_bytes(b"{}")
    source = path.parent if "/" in name else path
    with pytest.raises(GracecError, match=message) as caught:
        open_train_data(source)
    assert str(caught.value).startswith(str(source)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.jsonl", r"cannot be read \(No such file"),
        ("gone.json", r"cannot be read \(No such file"),
        ("gone", "does not exist"),
        (3, "training data cannot be a int"),
        (DatasetDict(), "cannot be a DatasetDict; give one split"),
        ([record()], "there is no folder to look in: pass image_root"),
    ],
)
def test_other_bad_sources(source: Any, message: str) -> None:
    with pytest.raises(GracecError, match=message):
        open_train_data(source)


def test_the_image_root_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(GracecError, match="gone: the image root is not a folder"):
        open_train_data(write(tmp_path, record()), image_root=tmp_path / "gone")


# --- The page ---


def test_the_records_of_the_page_can_be_read(tmp_path: Path) -> None:
    blocks = [fence for fence in fences("training-data.md") if fence.language == "json"]
    (tmp_path / "images").mkdir()
    for name in ("7.png", "images/7.png"):
        tiny_image().save(tmp_path / name)
    *records, asked, text = [json.loads(block.text) for block in blocks]
    data = open_train_data(records, image_root=tmp_path, strict=True)
    assert [len(whole(data, index).turns) for index in range(len(data))] == [4, 2, 2, 2, 2]
    opened = open_source([asked])
    data = read_conversations(opened, image_root=tmp_path, strict=True, answered=False)
    assert [turn.role for turn in whole(data).turns] == ["user"]
    assert len(open_text([text], tiny_processor(), strict=True)) == 1


def test_the_page_names_files_and_limits() -> None:
    page = (DOCS / "training-data.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in FOLDER_FILES)
    assert f"{MAX_PIXELS:,}" in page and f"{MOST_CHARACTERS:,}" in page
    assert set(re.findall("PNG|JPEG|WEBP|GIF|BMP|TIFF", page.upper())) == set(FORMATS)


# --- Order ---


@given(length=st.integers(0, 60), epoch=st.integers(0, 5), seed=st.integers(-3, 2**40))
def test_an_epoch_is_a_permutation_that_seed_and_epoch_determine(
    length: int, epoch: int, seed: int
) -> None:
    torch.manual_seed(epoch)
    state = torch.get_rng_state()
    order = epoch_order(length, epoch, seed)
    assert sorted(order) == list(range(length))
    assert order == epoch_order(length, epoch, seed)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_epoch_and_seed_has_its_own_order() -> None:
    orders = {tuple(epoch_order(50, epoch, seed)) for epoch in range(5) for seed in range(5)}
    assert len(orders) == 25 and tuple(range(50)) not in orders


def test_an_order_has_no_negative_length() -> None:
    with pytest.raises(GracecError, match="at least 0"):
        epoch_order(-1, 0, 0)


# --- What is kept apart ---


def test_data_without_what_other_data_is_about(tmp_path: Path) -> None:
    """A picture is known by its name, its size and what it holds; a text by what is asked."""
    for name, seeds in (("train", (0, 1, 2)), ("test", (1, 5))):
        (tmp_path / name).mkdir()
        png(tmp_path / name, *seeds)
    other = tiny_image(7, (34, 32))  # by the name and with the size of one that it is not
    size = (tmp_path / "train" / "2.png").stat().st_size
    other.save(tmp_path / "test" / "2.png")
    content = (tmp_path / "test" / "2.png").read_bytes()[:size]
    (tmp_path / "test" / "2.png").write_bytes(content + b" " * (size - len(content)))
    text, asked = {"conversations": talk("yes ?", "no")}, {"question": "why ?", "answer": "no"}
    ours = [record(), record("1.png"), record("1.png", "where ?"), record("2.png"), text, asked]
    theirs = [record("1.png", "how many ?"), record("2.png"), {**asked, "answer": "never"}]
    (tmp_path / "train" / "a.jsonl").write_text("\n".join(map(json.dumps, ours)))
    (tmp_path / "test" / "a.jsonl").write_text("\n".join(map(json.dumps, theirs)))
    data, held = (open_train_data(tmp_path / name / "a.jsonl") for name in ("train", "test"))
    rest = data.without(held)
    assert [whole(rest, n).where.rpartition(":")[2] for n in range(len(rest))] == ["1", "4", "5"]
    assert rest.fingerprint != data.fingerprint
    assert data.without(rest.without(data)) is data  # nothing is without itself
    assert len(data.without(data)) == 0


def test_pictures_in_memory_are_compared_by_their_pixels() -> None:
    records_ = [{"image": tiny_image(n), "question": "a", "answer": "b"} for n in range(4)]
    data = open_train_data(records_)
    held = open_train_data([{**records_[2], "image": tiny_image(2), "question": "other"}])
    assert len(data.without(held)) == 3
    assert data.pictures(2) == held.pictures(0) != data.pictures(1)


def test_what_is_drawn_has_no_key_in_common_with_the_rest() -> None:
    keys = [(1,), (2,), (1, 3), (), (4,), (3,), (5,), ()]
    for seed in range(20):
        drawn = draw_apart(keys, 2, seed)
        assert 1 <= len(drawn) <= 2 and drawn == sorted(drawn)
        inside = {key for place in drawn for key in keys[place]}
        outside = {key for place in range(8) if place not in drawn for key in keys[place]}
        assert not inside & outside
    assert draw_apart([(1,)] * 3, 1, 0) == [0, 1, 2]
    assert len({tuple(draw_apart([()] * 9, 2, seed)) for seed in range(20)}) > 5
