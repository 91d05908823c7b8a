"""Records and conversations that the tests of training data share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gracec.data.records import Turn
from tests.tiny import tiny_image


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


def said(*turns: str) -> tuple[Turn, ...]:
    return tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(turns))
