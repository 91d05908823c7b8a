import hashlib
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from gracec.data import text
from gracec.data.text import WINDOW, open_text
from gracec.errors import GracecError, GracecWarning
from tests.data.collators import CHATML, subwords
from tests.fuzz import mutations
from tests.tiny import IMAGE, UNK, WORDS, tiny_image, tiny_processor
from tests.tiny_families import PROCESSORS
from tests.tiny_families import tiny_processor as processor_of

PROCESSOR = tiny_processor()
IDS = PROCESSOR.tokenizer.convert_tokens_to_ids(WORDS)
COUNT = len(WORDS)


def corpus(folder: Path, name: str = "corpus.txt", repeat: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join([" ".join(WORDS)] * repeat))
    return folder / name


def test_windows_are_the_tokens_of_the_text_in_order(tmp_path: Path) -> None:
    windows = open_text(corpus(tmp_path, repeat=2), PROCESSOR, 16)
    assert len(windows) == 2 * COUNT // 16
    assert [windows.sample(n) for n in range(len(windows))] == [
        (IDS * 2)[16 * n : 16 * n + 16] for n in range(len(windows))
    ]
    assert windows.notes == windows.problems == ()
    batch = windows.batch([2, 0])
    assert batch["input_ids"].tolist() == [windows.sample(2), windows.sample(0)]
    assert batch["attention_mask"].all() and (batch["labels"] == -100).all()
    with pytest.raises(IndexError):
        windows.sample(len(windows))


def test_a_short_text_is_one_window(tmp_path: Path) -> None:
    windows = open_text(corpus(tmp_path), PROCESSOR)
    assert COUNT < WINDOW
    assert [windows.sample(0)] == [IDS] and len(windows) == 1


def forms(folder: Path) -> dict[str, Any]:
    """The same two texts in every form."""
    one, two = " ".join(WORDS[:40]), " ".join(WORDS[40:])
    records = [{"text": one}, {"text": "", "url": "x"}, {"text": two}]
    for name in ("text", "lines", "rows", "shards"):
        (folder / name).mkdir()
    (folder / "text" / "a.txt").write_text(one)
    (folder / "text" / "b.md").write_text(f"\ufeff{two}")
    (folder / "lines" / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "rows" / "all.json").write_text(json.dumps(records))
    rows = Dataset.from_list([{"text": record["text"]} for record in records])
    rows.to_parquet(str(folder / "shards" / "x.parquet"))
    (folder / "shards" / "readme.md").write_text("not this")
    return {
        "folder of files": folder / "text",
        "jsonl": folder / "lines",
        "json": folder / "rows" / "all.json",
        "parquet": folder / "shards",
        "dataset": rows,
        "records": records,
    }


def test_every_form_of_a_text_gives_the_same_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = {name: open_text(form, PROCESSOR, 16) for name, form in forms(tmp_path).items()}
    whole = open_text(corpus(tmp_path / "one"), PROCESSOR, 16)
    for name, windows in found.items():
        assert torch.equal(windows.tokens, whole.tokens), name
        assert windows.fingerprint == whole.fingerprint, name


def test_the_fingerprint_is_that_of_the_tokens(tmp_path: Path) -> None:
    """It is kept with checkpoints: the same text has the same one, wherever it lies."""
    windows = open_text(corpus(tmp_path), PROCESSOR, 16)
    bare = hashlib.sha256(f"gracec text 1 ({COUNT // 16}, 16)\n".encode())
    bare.update(windows.tokens.numpy().tobytes())
    assert windows.fingerprint == bare.hexdigest()
    assert open_text(corpus(tmp_path / "b"), PROCESSOR, 16).fingerprint == windows.fingerprint
    assert open_text(corpus(tmp_path), PROCESSOR, 8).fingerprint != windows.fingerprint


@pytest.mark.parametrize("family", PROCESSORS)
def test_what_looks_like_a_control_token_is_letters(family: str, tmp_path: Path) -> None:
    processor = processor_of(family)
    token = processor.tokenizer.convert_ids_to_tokens(IMAGE)
    (tmp_path / "a.txt").write_text(f"a {token} of </s> is a picture . " * 9)
    windows = open_text(tmp_path / "a.txt", processor, 16)
    special = torch.tensor([IMAGE, processor.tokenizer.eos_token_id])
    assert not torch.isin(windows.tokens, special).any()
    assert windows.notes == ()


def test_every_window_begins_as_a_prompt_does(tmp_path: Path) -> None:
    processor = subwords(CHATML, "adds bos")
    bos = processor.tokenizer.bos_token_id
    windows = open_text(corpus(tmp_path, repeat=4), processor, 16)
    assert (windows.tokens[:, 0] == bos).all() and (windows.tokens[:, 1:] != bos).all()
    plain = open_text(corpus(tmp_path, repeat=4), subwords(CHATML, "byte level"), 16)
    assert (plain.tokens != bos).all()


def test_long_texts_are_read_in_pieces_and_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = corpus(tmp_path, repeat=9)
    whole = open_text(file, PROCESSOR, 16)
    monkeypatch.setattr(text, "_PIECE", 100)
    assert torch.equal(open_text(file, PROCESSOR, 16).tokens, whole.tokens)
    monkeypatch.setattr(text, "MOST_CHARACTERS", len(" ".join(WORDS)))
    limited = open_text(file, PROCESSOR, 16)
    assert torch.equal(limited.tokens, whole.tokens[: COUNT // 16])
    (note,) = limited.notes
    assert note.startswith(f"{file}: only the first 3") and note.endswith("characters are read")


def test_the_held_out_part_is_drawn_by_a_seed(tmp_path: Path) -> None:
    windows = open_text(corpus(tmp_path, repeat=9), PROCESSOR, 16)
    some, held = windows.split(0.25, 0)
    assert len(held) == round(0.25 * len(windows)) and len(some) + len(held) == len(windows)
    rows = {tuple(row) for part in (some, held) for row in part.tokens.tolist()}
    assert rows == {tuple(row) for row in windows.tokens.tolist()}
    assert windows.split(0.25, 0)[1].fingerprint == held.fingerprint
    assert windows.split(0.25, 1)[1].fingerprint != held.fingerprint
    with pytest.raises(GracecError, match="there is one window only"):
        open_text(corpus(tmp_path), PROCESSOR).split(0.5, 0)


def test_a_text_of_another_language_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ein kleiner roter Kreis a " * 9)
    windows = open_text(tmp_path / "a.txt", PROCESSOR, 16)
    assert (windows.tokens == UNK).float().mean() > 0.5
    assert windows.notes == (f"{tmp_path}/a.txt: the tokenizer knows less than half of the text",)


GOOD = {"text": " ".join(WORDS)}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a", "image": tiny_image()}, 'it has "image" beside "text": write it as a'),
        ({"text": "a", "images": ["0.png"]}, 'it has "images" beside "text"'),
        ({"text": "a", "video": "a.mp4"}, 'it has "video" beside "text"'),
        ({"text": "a \ud800"}, "it has half of a character"),
        ({"text": 3}, 'there is no "text"'),
        ({"text": "a", "question": "b", "answer": "c"}, "or a conversation beside it"),
        ("a", "expected an object, found str"),
    ],
)
def test_a_record_that_is_no_plain_text_is_left_out(record: Any, reason: str) -> None:
    with pytest.warns(GracecWarning, match="1 of 3 samples are broken"):
        windows = open_text([GOOD, record, GOOD], PROCESSOR, 16)
    (problem,) = windows.problems
    assert problem.startswith("record 1: ") and reason in problem
    assert torch.equal(windows.tokens, open_text([GOOD, GOOD], PROCESSOR, 16).tokens)
    with pytest.raises(GracecError, match="record 1: "):
        open_text([GOOD, record, GOOD], PROCESSOR, 16, strict=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: there is no text in it; give more text"),
        ("a.txt", b" \n", "there is no text in it"),
        ("a.txt", b"\xff\xfe", "a.txt: not UTF-8; save it so"),
        ("a.jsonl", b'{"question": "a", "answer": "b"}', "a.jsonl: no plain text; give records"),
        ("a.jsonl", b"\n", "no plain text"),
        ("gone", None, "gone: does not exist"),
    ],
)
def test_what_is_no_text(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(GracecError, match=message) as error:
        open_text(tmp_path / name, PROCESSOR)
    assert "\n" not in str(error.value)


def test_what_the_tokenizer_does_not_do(tmp_path: Path) -> None:
    with pytest.raises(GracecError, match="object: has no tokenizer; give the model's processor"):
        open_text(corpus(tmp_path), object())
    processor = subwords(CHATML, "adds bos")
    with pytest.raises(GracecError, match="windows of 1 tokens have no place for text"):
        open_text(corpus(tmp_path), processor, 1)


def test_a_mutated_record_harms_no_other(tmp_path: Path) -> None:
    """It is read, or refused in one line; the texts beside it are what they were."""
    good = open_text([GOOD], PROCESSOR).sample(0)
    file, refused = tmp_path / "train.jsonl", 0
    for number in range(200):
        rng = random.Random(number)
        record = mutations.changed(rng, {"text": "the red circle", "url": "a", "id": 3})
        lines = [
            json.dumps(GOOD).encode(),
            mutations.dumped(rng, record),
            json.dumps(GOOD).encode(),
        ]
        file.write_bytes(b"\n".join(lines))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GracecWarning)
            windows = open_text(file, PROCESSOR, len(good))
        refused += bool(windows.problems)
        tokens = windows.tokens.flatten().tolist()
        assert tokens[: len(good)] == good, number
        assert all("\n" not in problem for problem in windows.problems)
    assert refused > 20
