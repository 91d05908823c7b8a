"""Records: what in them changes what is learned is honoured, refused or named."""

from __future__ import annotations

import base64
import io
import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import gracec
from gracec.data.conversations import Sample, open_train_data
from gracec.data.records import Broken, Conversation, Embedded, Turn, read_record, short
from gracec.errors import GracecWarning
from tests.data.collators import answers, collator
from tests.data.conversations import png, record, talk, write
from tests.tiny import tiny_image, tiny_llava, tiny_processor


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


TALK = ("<image> what ?", "red", "where ?", "left", "sure ?", "yes")


def chat(*masks: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Three questions with their answers; the n-th mask is put on the n-th answer."""
    turns: list[dict[str, Any]] = [*talk(*TALK)]
    for number, mask in enumerate(masks):
        turns[2 * number + 1] |= mask
    return {"image": "0.png", "conversations": turns, **more}


def learned(found: Conversation) -> list[bool]:
    return [turn.learned for turn in found.turns if turn.role == "assistant"]


@pytest.mark.parametrize("name", ["weight", "loss", "loss_mask", "train"])
@pytest.mark.parametrize("off", [0, False, 0.0])
def test_answers_are_left_out_of_what_is_learned(name: str, off: Any) -> None:
    found = read_record(chat({name: off}, {name: 1}, {}))
    assert learned(found) == [False, True, True] and not found.unread
    assert [turn.text for turn in found.turns] == list(TALK)


@pytest.mark.parametrize("mask", [[0, 1, 0], [1, 0, 0, 1, 1, 0]])
def test_a_record_may_mask_its_answers_or_its_turns(mask: list[int]) -> None:
    assert learned(read_record(chat(loss_mask=mask))) == [False, True, False]
    assert learned(read_record(chat({"loss": False}, loss_mask=[1, 1, 0]))) == [False, True, False]


def test_the_labels_are_those_of_the_answers_that_are_learned(tmp_path: Path) -> None:
    file = write(tmp_path, chat({}, {"weight": 0}), chat())
    data = open_train_data(file)
    samples = [one for one in map(data.sample, range(2)) if isinstance(one, Sample)]
    collate = collator()
    batch = collate(samples)
    assert answers(collate.processor, batch, 0) == ["red </s>", "yes </s>"]
    assert answers(collate.processor, batch, 1) == ["red </s>", "left </s>", "yes </s>"]
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "half": (chat({"weight": 0.5}), "the gpt turn has weight 0.5, which can be 0 or 1 only"),
    "text": (chat({"loss": "no"}), "the gpt turn has loss 'no', which can be 0 or 1 only"),
    "tokens": (chat({"loss_mask": [0, 1]}), r"loss_mask \[0, 1\], which can be 0 or 1 only"),
    "against": (chat({"loss": True, "weight": 0}), "to be learned and not: weight, loss disagree"),
    "nothing": (chat(*[{"loss": False}] * 3), "no answer of it is to be learned"),
    "record": (chat(weight=0), "the record says that nothing of it is to be learned"),
    "weighted": (chat(weight=0.3), "the record has weight 0.3, which can be 0 or 1 only"),
    "short mask": (chat(loss_mask=[1, 0]), "loss_mask has 2 entries for 6 turns"),
    "video": (chat(video="a.mp4"), 'it has "video", which no model is taught here'),
    "videos": (chat(videos=["a.mp4"]), 'it has "videos", which no model is taught here'),
    "audio": (chat(audio="a.wav"), 'it has "audio"'),
    "tools": (chat(tools=[{"name": "search"}]), 'it has "tools"'),
    "image and images": (chat(images=["1.png"]), '"image" and "images" name different pictures'),
    "two systems": (
        {"system": "be brief", "messages": [{"role": "system", "content": "be long"}]},
        '"system" is not what the system says',
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_honoured_breaks_the_record(name: str) -> None:
    bad, message = BROKEN[name]
    with pytest.raises(Broken, match=message):
        read_record(bad)


@pytest.mark.parametrize("empty", [None, [], ""])
def test_fields_that_hold_nothing_change_nothing(empty: Any) -> None:
    found = read_record(
        chat({"weight": None}, videos=empty, tools=empty, system=empty, weight=None)
    )
    assert learned(found) == [True] * 3 and found.turns[0].role == "user"
    assert read_record(chat(weight=1, loss=True)) == read_record(chat())


def test_a_record_may_say_what_the_system_says() -> None:
    found = read_record(chat(system="be brief"))
    assert [turn.role for turn in found.turns[:2]] == ["system", "user"]
    turns = [{"role": "system", "content": "be brief"}, *talk(*TALK)]
    assert read_record({"image": "0.png", "conversations": turns, "system": "be brief"}) == found


def message(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": "red"}
    return {"messages": [{"role": "user", "content": list(parts)}, answer], **more}


WORDS = {"type": "text", "text": "what ?"}


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_parts_may_name_their_pictures(key: str) -> None:
    first, second = ({"type": "image", key: name} for name in ("0.png", "1.png"))
    found = read_record(message(first, WORDS, second))
    assert found.images == ("0.png", "1.png")
    assert found.turns[0].text == "<image>\nwhat ?\n<image>"
    assert read_record(message(first, WORDS, second, images=["0.png", "1.png"])) == found
    some = message(first, WORDS, {"type": "image"}, images=["0.png", "1.png"])
    assert read_record(some) == found
    for listed in (["1.png", "0.png"], ["0.png"], "0.png"):
        with pytest.raises(Broken, match="are not those that the record lists"):
            read_record(message(first, WORDS, second, images=listed))
    with pytest.raises(Broken, match="are not those that the record lists"):
        read_record(message(first, {"type": "image"}))


DATA_URI = f"data:image/png;base64,{base64.b64encode(encoded(tiny_image(3))).decode()}"


def as_openai(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


@pytest.mark.parametrize(
    "part",
    [
        as_openai({"url": DATA_URI}),
        as_openai(DATA_URI),
        {"type": "image", "base64": DATA_URI.partition(",")[2]},
        {"type": "image", "image": encoded(tiny_image(3))},
        {"image": tiny_image(3)},
        as_openai({"url": "images/3.png", "detail": "low"}),
        as_openai({"url": "file://images/3.png"}),
        as_openai({"url": "file://FOLDER/images/3.png"}),
        as_openai({"url": "file://localhostFOLDER/images/3.png"}),
    ],
)
def test_parts_hold_pictures_as_clients_write_them(part: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    tiny_image(3).save(tmp_path / "images" / "3.png")
    named = part.get("image_url")
    if isinstance(named, dict):
        named["url"] = named["url"].replace("FOLDER", str(tmp_path))
    data = open_train_data([message(WORDS, part)], image_root=tmp_path)
    sample = data.sample(0)
    assert isinstance(sample, Sample) and sample.turns[0].text == "what ?\n<image>"
    assert sample.images[0].tobytes() == tiny_image(3).tobytes()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("https://example.org/a.png", "is an address, nothing is fetched"),
        ("data:image/png,rawbytes", "is no data URI in base64"),
        ("data:image/png;base64,@@", "an image in base64 is none"),
        ("data:image/png;base64,", "an image in base64 is empty"),
        (f"data:image/png;base64,{'A' * 400}", "an image in base64 has more than 256 bytes"),
        ("file:///etc/hostname", "is an absolute path"),
        ("file://../secret.png", 'has ".." in its path'),
        (
            f"data:image/png;base64,{base64.b64encode(b'no picture').decode()}",
            "cannot be decoded",
        ),
    ],
)
def test_what_is_no_picture_of_the_data_is_refused(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gracec.data.records.MOST_ENCODED", 256)
    records = [message(WORDS), message(WORDS), message(WORDS, as_openai({"url": name}))]
    with pytest.warns(GracecWarning):
        problem = the_problem(records, tmp_path)
    assert reason in problem and len(problem) < 300


def the_problem(records: list[Any], root: Path) -> str:
    data = open_train_data(records, image_root=root)
    for number in range(len(data)):
        data.sample(number)
    (problem,) = data.problems
    return problem


IMAGES = {"images": ["0.png"]}
ASKS = [{"role": "user", "content": "what ?"}]
SAYS = [{"role": "assistant", "content": "red"}]


@pytest.mark.parametrize(
    "said",
    [
        {"prompt": "what ?", "completion": "red"},
        {"prompt": ASKS, "completion": SAYS},
        {"prompt": ASKS, "completion": "red"},
        {"prompt": [{"role": "user", "content": [{"type": "image"}, WORDS]}], "completion": SAYS},
        {"messages": [*ASKS, *SAYS]},
        {"question": "what ?", "answer": "red"},
    ],
)
def test_prompts_and_completions_are_conversations(said: dict[str, Any]) -> None:
    found = read_record({**said, **IMAGES})
    assert found.turns == (Turn("user", "<image>\nwhat ?"), Turn("assistant", "red"))
    assert found.images == ("0.png",) and not found.unread


def test_of_a_prompt_nothing_is_learned() -> None:
    prompt = [*ASKS, *SAYS, {"role": "user", "content": "sure ?"}]
    more = [{"role": "assistant", "content": "yes"}, *ASKS, *SAYS]
    assert learned(read_record({"prompt": prompt, "completion": more})) == [False, True, True]
    assert len(read_record({"prompt": prompt}, answered=False).turns) == 3
    with pytest.raises(Broken, match='has "chosen" and no "completion"'):
        read_record({"prompt": prompt, "chosen": more, "rejected": more})


def test_lines_are_read_whatever_the_name(tmp_path: Path) -> None:
    lines = write(tmp_path, record(), record(answer="blue")).read_bytes()
    for name in ("a.ndjson", "a.json", "b.json"):
        (tmp_path / name).write_bytes(lines if name != "b.json" else b"\n" + lines)
        assert len(open_train_data(tmp_path / name)) == 2
    (tmp_path / "a.json").write_text(json.dumps(record(), indent=2))
    assert len(open_train_data(tmp_path / "a.json")) == 1


def test_placeholders_in_texts_are_counted_among_the_parts() -> None:
    text = {"type": "text", "text": "<image> and"}
    named = {"type": "image", "image": "1.png"}
    found = read_record(message(text, named, images=["0.png", "1.png"]))
    assert found.images == ("0.png", "1.png")
    with pytest.raises(Broken, match="are not those"):
        read_record(message(text, named, images=["1.png", "0.png"]))


def test_pictures_that_are_inside_are_compared_by_what_they_hold() -> None:
    buffer = io.BytesIO()
    tiny_image().save(buffer, "PNG")
    for data in (buffer.getvalue(), bytearray(buffer.getvalue()), memoryview(buffer.getvalue())):
        (ref,) = read_record(message({"type": "image"}, WORDS, images=[{"bytes": data}])).images
        assert isinstance(ref, Embedded) and ref.bytes() == buffer.getvalue()
        assert ref.size == len(buffer.getvalue())


def test_keys_that_nothing_reads_are_named_once(tmp_path: Path) -> None:
    turns = talk("<image> what ?", "red")
    odd = {"image": "0.png", "conversations": [turns[0], {**turns[1], "thinking": "hm"}]}
    file = write(tmp_path, {**odd, "caption": "x", "id": 1}, {**odd, "caption": "y"}, record())
    png(tmp_path, 0)
    data = open_train_data(file)
    assert data.problems == []
    (note,) = data.notes
    assert note == f"{file}: nothing reads the keys 'caption', 'thinking'"
    assert [record_part.notes for record_part in two_parts(tmp_path)] == [[note], []]


def two_parts(folder: Path) -> Any:
    png(folder, 1)
    file = folder / "train.jsonl"
    file.write_text(file.read_text() + file.read_text().replace("0.png", "1.png"))
    return open_train_data(file).split(0.5, 0)


def test_the_keys_of_another_form_are_not_read() -> None:
    found = read_record({**chat(), "messages": [], "question": "what ?", "source": "x"})
    assert found.unread == {"messages", "question"}
    both = {"image": "0.png", "question": "what ?", "answer": "red", "type": "what"}
    assert not read_record(both).unread


def test_the_report_of_a_training_names_them() -> None:
    one = {"question": "what color is this ?", "answer": "red", "difficulty": 3}
    records = [{**one, "image": tiny_image(number)} for number in range(4)]
    compiled = gracec.compile(
        tiny_llava(), "w8a8", train_data=records, processor=tiny_processor(), progress=False
    )
    (note,) = [note for note in compiled.report.notes if note.source == "calibration"]
    assert note.text == "the records: nothing reads the keys 'difficulty'"


def batch_of(records: list[Any]) -> Any:
    data = open_train_data(records)
    return collator()([data.sample(number) for number in range(len(data))])


@pytest.mark.parametrize("text", ["the </s> token", "what is <image> here ?", "a cat \U0001f408 ?"])
def test_odd_texts_do_not_stop_a_batch(text: str) -> None:
    """An end token or a placeholder too many is a broken record; an emoji is a text."""
    records = [{**record(tiny_image()), "conversations": talk(f"<image> {text}", "red")}]
    records += [record(tiny_image(number)) for number in range(3)]
    expected = 4 if "\U0001f408" in text else 3
    with pytest.warns(GracecWarning) if expected == 3 else nullcontext():
        batch = batch_of(records)
    assert len(batch["labels"]) == expected


KEYS = st.sampled_from(
    "image images conversations messages question answer from role value content type text bytes "
    "path url image_url base64 prompt completion weight loss loss_mask train system video tools "
    "other".split()
)
VALUES = st.sampled_from(["user", "image", "<image>", "", "\ud83d", 0, 1, 0.5, None, True, b"x"])
JSON = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5)
)
GOOD = record(tiny_image())


@given(whole=st.dictionaries(KEYS, JSON, max_size=2), turn=st.dictionaries(KEYS, JSON, max_size=2))
def test_no_record_stops_the_others(whole: dict[str, Any], turn: dict[str, Any]) -> None:
    """Fields of a good one are replaced and added; it is read, or left out with a reason."""
    first, answer = talk("<image> what ?", "red")
    odd = {"image": tiny_image(), "conversations": [first, {**answer, **turn}], **whole}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GracecWarning)
        data = open_train_data([GOOD, odd, GOOD])
        samples = [data.sample(number) for number in range(len(data))]
    assert sum(isinstance(one, Sample) for one in samples) == 3 - len(data.problems) >= 2
    for problem in data.problems:
        assert problem.encode() and "\n" not in problem


def test_what_a_message_shows_can_be_written() -> None:
    assert short("a\n b \ud83d") == "a b \\ud83d"
    short("\ud83d" * 300).encode()


def test_a_question_without_an_answer_is_read_where_nothing_is_learned() -> None:
    asked = {"image": "0.png", "question": "what ?"}
    for record_ in (asked, {**asked, "answer": None}):
        found = read_record(record_, answered=False)
        assert found.turns == (Turn("user", "<image>\nwhat ?"),) and found.images == ("0.png",)
        with pytest.raises(Broken):
            read_record(record_)
    turns = [*talk("<image> what ?", "red", "where ?")]
    found = read_record({"image": "0.png", "conversations": turns}, answered=False)
    assert [turn.role for turn in found.turns] == ["user", "assistant", "user"]
    with pytest.raises(Broken, match="must be questions and answers in alternation"):
        read_record({"image": "0.png", "conversations": turns})
    for wrong in ([], [{"role": "system", "content": "be brief"}], [*turns, *turns]):
        with pytest.raises(Broken):
            read_record({"image": "0.png", "conversations": wrong}, answered=False)
    for answer in ("", 3):
        with pytest.raises(Broken):
            read_record({**asked, "answer": answer}, answered=False)
    assert read_record(chat(), answered=False) == read_record(chat())
