"""Training data: what is read and refused, which tokens are labelled, and in which order."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast

from gracec.errors import GracecError, GracecWarning
from gracec.evaluate.vqa import encode
from gracec.training import data as module
from gracec.training.data import (
    BrokenSample,
    Collator,
    EmptyBatch,
    Sample,
    TrainData,
    Turn,
    epoch_order,
    open_train_data,
)
from tests.docs.fences import DOCS, fences
from tests.tiny import (
    CHAT_TEMPLATE,
    EOS,
    IMAGE,
    IMAGE_TOKENS,
    PAD,
    PATCH_SIZE,
    WORDS,
    tiny_image,
    tiny_llava,
    tiny_processor,
)

STUDENT = Path(__file__).resolve().parents[2] / "examples/emojivqa/student"
# Each turn begins with <s>; the tests' usual template asks for an answer without it.
TEMPLATE = CHAT_TEMPLATE
ENDLESS = TEMPLATE.replace("{{ '</s> ' if message['role'] == 'assistant' else '' }}", "")
MARKED = (
    "{% for message in messages %}{{ message['role'] | upper + ' : ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ part['text'] }}"
    "{% endgeneration %} END{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT :' }}{% endif %}"
)


def talk(*texts: str) -> list[dict[str, str]]:
    return [
        {"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)
    ]


def record(name: Any = "0.png", question: str = "what is it ?", answer: str = "red") -> Any:
    return {"image": name, "conversations": talk(f"<image>\n{question}", answer)}


def png(folder: Path, *seeds: int) -> None:
    for seed in seeds:
        tiny_image(seed, (32 + seed, 32)).save(folder / f"{seed}.png")


def write(folder: Path, *records: Any) -> Path:
    png(folder, 0)
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in records]
    file = folder / "train.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def whole(data: TrainData, index: int = 0) -> Sample:
    found = data.sample(index)
    assert isinstance(found, Sample), found
    return found


def said(*turns: str) -> tuple[Turn, ...]:
    return tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(turns))


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
        module.Image, "open", lambda file, **more: (opened.append(file), real(file, **more))[1]
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
    "no turns": ({"image": "0.png"}, 'neither "conversations" nor "messages"'),
    "turns": ({"conversations": "hello"}, '"conversations" must be a list'),
    "turn": ({"conversations": ["hello"]}, "a turn must be an object, not str"),
    "role": ({"conversations": [{"from": "tool", "value": "x"}]}, "unknown role 'tool'"),
    "no text": ({"conversations": [{"from": "human"}]}, "the human turn has no text"),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "must be a text or an image",
    ),
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
        ("a.json", b"[]", "no records"),
        ("a.jsonl", b"\n\n", "no records"),
        ("a.csv", b"image", "not training data; give a .json"),
        ("a/readme.txt", b"", "no training data in this folder; put one of train.jsonl"),
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
        ([record()], "there is no folder to look in; pass image_root"),
    ],
)
def test_other_bad_sources(source: Any, message: str) -> None:
    with pytest.raises(GracecError, match=message):
        open_train_data(source)


def test_the_image_root_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(GracecError, match="gone: the image root is not a folder"):
        open_train_data(write(tmp_path, record()), image_root=tmp_path / "gone")


# --- Batches ---


@cache
def model() -> nn.Module:
    return tiny_llava()


@cache
def student() -> LlavaProcessor:
    processor: LlavaProcessor = AutoProcessor.from_pretrained(STUDENT)
    return processor


def collator(template: str | None = TEMPLATE, **more: Any) -> Collator:
    return Collator(tiny_processor(chat_template=template), model(), **more)


def sample(*turns: str, images: int | None = None, where: str = "a.jsonl:1") -> Sample:
    count = sum(turn.count("<image>") for turn in turns) if images is None else images
    return Sample(said(*turns), tuple(tiny_image(seed) for seed in range(count)), where)


ONE = sample("<image>\nwhat is this ?", "red circle")
TWO = sample(
    "<image>\nwhat is this ?",
    "red circle",
    "where is it ?",
    "left of the star .",
    "how many ?",
    "one",
)


def answers(processor: Any, batch: Mapping[str, Tensor], row: int) -> list[str]:
    """The labelled spans of a row as text; that labels equal the tokens is asserted."""
    labels, ids = batch["labels"][row], batch["input_ids"][row]
    assert labels.dtype == torch.int64 and labels.shape == ids.shape
    marked = labels != -100
    assert torch.equal(labels[marked], ids[marked])
    assert not (marked & (batch["attention_mask"][row] == 0)).any()
    assert IMAGE not in labels.tolist()
    spans: list[list[int]] = []
    for at in range(len(ids)):
        if marked[at]:
            if not at or not marked[at - 1]:
                spans.append([])
            spans[-1].append(int(ids[at]))
    return [processor.tokenizer.decode(span) for span in spans]


@pytest.mark.parametrize("template", [TEMPLATE, ENDLESS, MARKED, None])
def test_labels_are_the_answers_and_the_last_one_ends(template: str | None) -> None:
    collate = collator(template)
    text = sample("yes or no ?", "no")
    both = sample("<image> <image>\nwhich of the two is red ?", "the left one")
    batch = collate([ONE, text, TWO, both])
    ends = template in (TEMPLATE, None)
    end = " </s>" if ends else ""
    assert answers(collate.processor, batch, 0) == ["red circle </s>"]
    assert answers(collate.processor, batch, 1) == ["no </s>"]
    expected = [f"red circle{end}", f"left of the star .{end}", "one </s>"]
    assert answers(collate.processor, batch, 2) == expected
    assert answers(collate.processor, batch, 3) == ["the left one </s>"]
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    images = (batch["input_ids"] == IMAGE).sum(1).tolist()
    assert images == [count * IMAGE_TOKENS for count in (1, 0, 1, 2)]
    for row in range(4):
        length = int(batch["attention_mask"][row].sum())
        assert batch["attention_mask"][row, :length].all()  # padded on the right
        assert (batch["input_ids"][row, length:] == PAD).all()
        assert batch["input_ids"][row, length - 1] == EOS
    assert batch["input_ids"].shape[1] == int(batch["attention_mask"].sum(1).max())
    assert collate.problems == []


@pytest.mark.parametrize("template", [TEMPLATE, ENDLESS, None])
def test_what_comes_before_the_answer_is_what_evaluation_asks(template: str | None) -> None:
    collate = collator(template)
    batch = collate([ONE])
    asked = encode(collate.processor, ["what is this ?"], list(ONE.images))
    before = int((batch["labels"][0] == -100).sum())
    assert batch["input_ids"][0, :before].tolist() == asked["input_ids"][0].tolist()
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])


def test_the_shipped_processor_labels_answer_and_eos() -> None:
    processor: Any = student()
    collate = Collator(processor, model())
    one = sample("<image>\nwhere is the cat ?", "top left")
    many = sample("<image>\nwhere is the cat ?", "top left", "how many animals ?", "cat")
    batch = collate([one, many])
    word = processor.tokenizer.convert_tokens_to_ids
    expected = [*map(word, ["top", "left"]), word("<eos>")]
    assert batch["labels"][0][batch["labels"][0] != -100].tolist() == expected
    assert answers(processor, batch, 1) == ["top left <eos>", "cat <eos>"]
    asked = encode(processor, ["where is the cat ?"], list(one.images))["input_ids"][0]
    assert batch["input_ids"][0, : len(asked)].tolist() == asked.tolist()
    assert batch["labels"][0, len(asked) :][:3].tolist() == expected


class Rows(LlavaProcessor):
    """Writes a row mark between rows of an image, as other families do."""

    def replace_image_token(self, image_inputs: Any, image_idx: int, **more: Any) -> str:
        row = IMAGE_SIZE_IN_PATCHES * self.image_token
        return " top ".join([row] * IMAGE_SIZE_IN_PATCHES)


IMAGE_SIZE_IN_PATCHES = int(IMAGE_TOKENS**0.5)

# As llava-hf has it: blanks after every text, no end token, and marks around the answers.
LLAVA = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
UNMARKED = LLAVA.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def subwords(template: str, style: str) -> LlavaProcessor:
    """A processor whose tokenizer splits words, blanks being a part of what follows them."""
    byte_level = style == "byte level"
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    pre: Any = pre_tokenizers
    tokenizer.pre_tokenizer = (
        pre.ByteLevel(add_prefix_space=False) if byte_level else pre.Metaspace()
    )
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>"]
    corpus = [" ".join(WORDS), "USER: ASSISTANT: user assistant\n", "a red circle. left of it."] * 3
    trainer = BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    if style == "adds bos":
        tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    build: Any = PreTrainedTokenizerFast
    processor: Any = tiny_processor(chat_template=template)
    processor.tokenizer = build(
        tokenizer_object=tokenizer, additional_special_tokens=special[4:], **names
    )
    return cast(LlavaProcessor, processor)


@pytest.mark.parametrize("template", [LLAVA, UNMARKED, "<s>" + UNMARKED, CHATML, None])
@pytest.mark.parametrize("style", ["byte level", "metaspace", "adds bos"])
def test_tokenizers_that_join_blanks_and_words(template: str | None, style: str) -> None:
    processor: Any = subwords(template or "", style)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = [EOS, end] if template == CHATML else [EOS]
    other = nn.Module()
    other.generation_config = SimpleNamespace(eos_token_id=ends)  # type: ignore[assignment]
    batch = Collator(processor, other)([TWO, ONE])
    found = answers(processor, batch, 0)
    last = "<|im_end|>" if template == CHATML else "</s>"
    said = [text.replace("</s>", "").replace("<|im_end|>", "").strip() for text in found]
    assert said == ["red circle", "left of the star .", "one"]
    assert found[-1].strip().removeprefix("one") == last, "no blank between answer and end"
    if template in (CHATML, None):
        assert all(text.endswith(last) for text in found)
    asked = encode(processor, ["what is this ?"], list(ONE.images))["input_ids"][0].tolist()
    assert batch["input_ids"][1, : len(asked)].tolist() == asked
    assert int(batch["labels"][1, len(asked) - 1]) == -100
    if template != LLAVA:
        assert int(batch["labels"][1, len(asked)]) != -100


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_images_that_become_more_than_image_tokens(template: str | None) -> None:
    base: Any = tiny_processor()
    build: Any = Rows
    rows = build(
        image_processor=base.image_processor,
        tokenizer=base.tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    batch = Collator(rows, model())([TWO, sample("no ?", "yes", "<image> what ?", "a star")])
    first = ["red circle </s>", "left of the star . </s>", "one </s>"]
    assert answers(rows, batch, 0) == first
    assert answers(rows, batch, 1) == ["yes </s>", "a star </s>"]


def test_any_stop_token_of_the_model_ends_an_answer() -> None:
    other: Any = tiny_llava()
    processor = tiny_processor(chat_template=TEMPLATE.replace("</s>", "END"))
    processor.tokenizer.add_tokens(["END"])
    end = processor.tokenizer.convert_tokens_to_ids("END")
    other.generation_config.eos_token_id = [end, EOS]
    assert answers(processor, Collator(processor, other)([TWO]), 0) == [
        "red circle END",
        "left of the star . END",
        "one END",
    ]
    other.generation_config.eos_token_id = EOS
    last = answers(processor, Collator(processor, other)([ONE]), 0)
    assert last == ["red circle END </s>"]


def test_the_end_that_is_added_is_the_tokenizers_own() -> None:
    other: Any = tiny_llava()
    other.generation_config.eos_token_id = [PAD, EOS]
    processor = tiny_processor(chat_template=ENDLESS)
    assert answers(processor, Collator(processor, other)([ONE]), 0) == ["red circle </s>"]


def test_an_end_in_the_next_question_does_not_end_an_answer() -> None:
    old, new = "== 'assistant' else '' }}", "== 'user' else '' }}"
    collate = collator(TEMPLATE.replace(old, new))
    found = answers(collate.processor, collate([TWO]), 0)
    assert found == ["red circle", "left of the star .", "one </s>"]


def test_a_prompt_of_other_tokens_is_an_error() -> None:
    """Its text is the same, but its last blank is a token that no conversation has."""
    processor = subwords(UNMARKED.replace("'ASSISTANT:'", "'ASSISTANT: '"), "metaspace")
    with pytest.raises(GracecError, match="a.jsonl:1: the conversation does not begin with the pr"):
        Collator(processor, model())([ONE])


def test_the_model_can_be_trained_on_a_batch() -> None:
    batch = collator()([ONE, TWO])
    loss = model()(**batch).loss
    assert torch.isfinite(loss)


def test_a_prompt_that_the_conversation_does_not_begin_with_is_an_error() -> None:
    with pytest.raises(GracecError, match="a.jsonl:1: the conversation does not begin with the pr"):
        collator(CHAT_TEMPLATE.replace("{{ '<s> ASSISTANT : ' }}", "{{ 'ASSISTANT :' }}"))([ONE])


def test_a_turn_that_is_written_otherwise_later_is_an_error() -> None:
    last = "{{ '</s> ' if message['role'] == 'assistant' and loop.last else '' }}"
    template = TEMPLATE.replace("{{ '</s> ' if message['role'] == 'assistant' else '' }}", last)
    collate = collator(template)
    assert answers(collate.processor, collate([ONE]), 0) == ["red circle </s>"]
    with pytest.raises(GracecError, match="a.jsonl:1: the chat template writes answer 1 otherwise"):
        collate([TWO])


def test_an_answer_without_tokens_breaks_the_sample() -> None:
    for turns in (("<image> what ?", "nothing"), ("<image> what ?", "nothing", "why ?", "no")):
        endless = collator(ENDLESS)
        endless.processor.tokenizer.backend_tokenizer.normalizer = Replace("nothing", "")
        with pytest.warns(
            GracecWarning, match="a.jsonl:7: the tokenizer knows no token for an answ"
        ):
            batch = endless([sample(*turns, where="a.jsonl:7"), ONE])
        assert len(batch["labels"]) == 1


def test_marks_that_are_not_around_every_answer_are_an_error() -> None:
    marked = MARKED.replace("message['role'] == 'assistant'", "part['text'] == 'red circle'")
    with pytest.raises(GracecError, match="a.jsonl:1: the chat template marks 1 answers of 3"):
        collator(marked)([TWO])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("'<image> ' if", "'' if", "no place|0 places|refuses|the text has no place"),
        ("'<image> ' if", "'<image> <image> ' if", "2 places for 1 images|refuses the sample"),
    ],
)
def test_a_template_that_miscounts_pictures_is_an_error(old: str, new: str, message: str) -> None:
    assert old in TEMPLATE
    with pytest.raises(GracecError, match=message) as caught:
        collator(TEMPLATE.replace(old, new))([ONE])
    assert str(caught.value).startswith("a.jsonl:1: ")


def test_a_template_that_refuses_names_the_sample() -> None:
    guard = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    bad = Sample((Turn("system", "be short"), *ONE.turns), ONE.images, "a.jsonl:9")
    with pytest.raises(GracecError, match=r"a.jsonl:9: the processor refuses .*\(no system\)"):
        collator(guard + TEMPLATE)([ONE, bad])


@pytest.mark.parametrize(
    "bad",
    [
        sample("<image> what ?", "red </s> blue", where="a.jsonl:7"),
        sample("<image> what <pad> ?", "red", where="a.jsonl:7"),
    ],
)
def test_control_tokens_in_a_text_break_the_sample(bad: Sample) -> None:
    collate = collator()
    with pytest.warns(GracecWarning, match="a control token"):
        batch = collate([bad, ONE])
    assert len(batch["labels"]) == 1 and len(batch["pixel_values"]) == 1
    assert collate.problems[0].startswith("a.jsonl:7: the text has '<")
    assert len(collate.problems) == 1
    with pytest.raises(GracecError, match="a.jsonl:7: .*control token"):
        collator(strict=True)([bad, ONE])


def test_broken_samples_are_left_out_of_the_batch() -> None:
    collate = collator()
    broken = BrokenSample("a.jsonl:2", "corrupt image", "cannot be decoded")
    batch = collate([broken, ONE, broken])
    alone = collate([ONE])
    assert batch.keys() == alone.keys()
    assert all(torch.equal(batch[name], alone[name]) for name in alone)
    assert collate.problems == []  # the data reports them
    with pytest.raises(EmptyBatch, match="a.jsonl:2: broken samples leave nothing"):
        collate([broken])
    with pytest.raises(EmptyBatch, match="leave no picture"):
        collate([broken, sample("yes or no ?", "no")])


def test_a_batch_without_a_picture_is_an_error() -> None:
    with pytest.raises(GracecError, match="no sample of the batch has a picture") as caught:
        collator()([sample("yes or no ?", "no")])
    assert not isinstance(caught.value, EmptyBatch)
    with pytest.raises(GracecError, match="a batch needs a sample"):
        collator()([])


def test_truncation() -> None:
    full = collator()([TWO])
    labelled = torch.nonzero(full["labels"][0] != -100).flatten().tolist()
    cut = labelled[3] + 2  # inside the second answer
    batch = collator(max_length=cut)([TWO])
    assert all(torch.equal(batch[name], full[name][:, :cut]) for name in full if "pix" not in name)
    assert answers(collator().processor, batch, 0) == ["red circle </s>", "left of"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = collator(max_length=full["labels"].shape[1])([TWO])
    assert torch.equal(exact["labels"], full["labels"])


def test_truncation_that_leaves_no_answer_breaks_the_sample() -> None:
    first = int(torch.nonzero(collator()([TWO])["labels"][0] != -100)[0])
    collate = collator(max_length=first)
    short = sample("<image> ?", "no", where="a.jsonl:3")
    with pytest.warns(GracecWarning, match=f"max_length {first} leaves no token of an answer"):
        batch = collate([TWO, short])
    assert answers(collate.processor, batch, 0) == ["no </s>"]
    assert len(batch["pixel_values"]) == 1
    assert len(collate.problems) == 1 and collate.problems[0].startswith("a.jsonl:1: ")
    with pytest.raises(GracecError, match="a.jsonl:1: max_length"):
        collator(max_length=first, strict=True)([TWO, short])


def test_truncation_inside_a_picture_is_an_error() -> None:
    late = sample("is it red ?", "yes", "<image> and this ?", "no", where="a.jsonl:5")
    ids = collator()([late])["input_ids"][0].tolist()
    end = len(ids) - ids[::-1].index(IMAGE)
    collator(max_length=end)([late])
    for length in (end - 1, end - IMAGE_TOKENS + 1, end - IMAGE_TOKENS):
        with pytest.raises(GracecError, match="a.jsonl:5: max_length .* a part of a picture"):
            collator(max_length=length)([sample("yes or no ?", "no"), late])


def test_processors_that_cannot_be_used() -> None:
    class Bare:
        tokenizer = None

    with pytest.raises(GracecError, match="Bare: has no tokenizer"):
        Collator(Bare(), model())
    with pytest.raises(GracecError, match="max_length must be at least 1"):
        collator(max_length=0)
    processor: Any = tiny_processor()
    processor.tokenizer.pad_token = None
    with pytest.raises(GracecError, match="no padding token"):
        Collator(processor, model())
    processor = tiny_processor()
    processor.image_token = None
    with pytest.raises(GracecError, match="has no image token"):
        Collator(processor, model())
    processor = tiny_processor()
    processor.tokenizer.eos_token = None
    with pytest.raises(GracecError, match="neither the model nor the tokenizer has an end-of"):
        Collator(processor, nn.Linear(1, 1))


def test_from_file_to_batch(tmp_path: Path) -> None:
    data = open_train_data(write(tmp_path, record(), {"conversations": talk("no ?", "yes")}))
    collate = collator()
    batch = collate([data.sample(index) for index in range(len(data))])
    assert [answers(collate.processor, batch, row) for row in (0, 1)] == [
        ["red </s>"],
        ["yes </s>"],
    ]


# --- The page ---


def test_the_records_of_the_page_can_be_read(tmp_path: Path) -> None:
    blocks = [fence for fence in fences("training-data.md") if fence.language == "json"]
    (tmp_path / "images").mkdir()
    for name in ("7.png", "images/7.png"):
        tiny_image().save(tmp_path / name)
    records = [json.loads(block.text) for block in blocks]
    data = open_train_data(records, image_root=tmp_path, strict=True)
    assert [len(whole(data, index).turns) for index in range(len(data))] == [4, 2]


def test_the_page_names_files_and_limits() -> None:
    page = (DOCS / "training-data.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in module.FOLDER_FILES)
    assert f"{module.MAX_PIXELS:,}" in page
    assert set(re.findall("PNG|JPEG|WEBP|GIF|BMP|TIFF", page.upper())) == set(module.FORMATS)


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
