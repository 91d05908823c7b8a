"""The texts: windows of token ids that are measured, and that calibrate.

Measured are 16 windows of the language reference that comes with Python. "same" is the 64 windows
of that text behind them. "foreign" is 32 windows of the descriptions and licences of the packages
that constraints.txt pins, as they lie in the environment, in an order that a seed draws.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

LENGTH, MEASURED = 512, 16
WINDOWS = {"same": 64, "foreign": 32}
"""Protocol -> windows that calibrate."""
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
LEAST, MOST_DESCRIPTION, MOST_LICENCE = 2000, 12_000, 4000
"""Characters: shorter texts are left out, longer ones cut."""


def reference() -> str:
    """The language reference: the help topics of Python, by name."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def package_texts() -> list[str]:
    """Descriptions and licences of the pinned packages, by name, as far as they are installed."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    names = sorted(line.split("==")[0].strip().lower() for line in lines if "==" in line)
    found = []
    for name in names:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        description = package.metadata.get_payload()
        if isinstance(description, str) and len(description) > LEAST:
            found.append(description[:MOST_DESCRIPTION])
        for file in sorted(package.files or (), key=str):
            if ".dist-info/" in str(file) and "LICENSE" in file.name.upper():
                path = Path(str(package.locate_file(file)))
                text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
                if len(text) > LEAST:
                    found.append(text[:MOST_LICENCE])
    return list(dict.fromkeys(found))


def cut(tokenizer: Any, text: str) -> Tensor:
    """Whole windows of a text [n, LENGTH]; each begins as the tokenizer begins a text, if it does
    (Gemma's loses half its sense without)."""
    start = tokenizer("")["input_ids"]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    own = LENGTH - len(start)
    ids = ids[: len(ids) // own * own].view(-1, own).long()
    return torch.cat([torch.tensor(start).long().expand(len(ids), -1), ids], dim=1)


def windows(tokenizer: Any, protocol: str) -> Tensor:
    """Token ids [n, LENGTH] of "measured", "same" or "foreign"."""
    if protocol == "foreign":
        ids = torch.cat([cut(tokenizer, text) for text in package_texts()])
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
        return enough(ids, WINDOWS[protocol])
    ids = enough(cut(tokenizer, reference()), MEASURED + WINDOWS["same"])
    return ids[:MEASURED] if protocol == "measured" else ids[MEASURED:]


def enough(ids: Tensor, needed: int) -> Tensor:
    if len(ids) < needed:
        raise SystemExit(f"the text has {len(ids)} windows, {needed} are needed")
    return ids[:needed]


def fingerprint(ids: Tensor) -> str:
    """The first digits of a SHA-256 of the tokens: packages of other versions show."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
