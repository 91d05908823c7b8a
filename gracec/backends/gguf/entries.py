"""Which tensor of a file is which weight of the model.

llama.cpp turns pairs of neighbours where Llama turns halves of a head, so the rows of its queries
and keys lie in another order. Rows of codes and of scales move together, and nothing is rounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gracec.backends.gguf.blocks import Codes, Rows
from gracec.frozen import Frozen

SUFFIXES = (".weight", ".bias")
TYPES = ("F16", "BF16", "F32")
FILTERS = ("F16", "F32")
"""Of what llama.cpp convolves with, which it has no bfloat16 kernel for."""
FLOAT = ("F32",)
"""Of vectors, and of positions."""


class Refused(Exception):
    """GGUF, or llama.cpp, cannot say a model; the message is the reason."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: in the file.
        fqn: of the weight in the model.
        heads: number of heads whose rows are put in the order of llama.cpp; 0 leaves them.
        part: which of how many equal parts of the rows it is.
        types: that it may be stored in, if it is not quantized.
        change: what is done to it, if it is not quantized.
        given: the tensor itself, where the model has none.
    """

    name: str
    fqn: str
    heads: int = 0
    part: tuple[int, int] = (0, 1)
    types: tuple[str, ...] = TYPES
    change: Callable[[Tensor], Tensor] | None = None
    given: Tensor | None = None

    def rows(self, frozen: Frozen) -> Rows:
        """What is stored."""
        if self.given is not None:
            return self.given
        found: Rows
        if self.fqn in frozen.weights:
            found = Codes.of(frozen.weights[self.fqn])
        else:
            found = frozen.others[self.fqn]
        count = len(found.codes if isinstance(found, Codes) else found)
        number, parts = self.part
        if parts > 1:
            found = found[slice(number * count // parts, (number + 1) * count // parts)]
        if self.heads:
            found = found[order_of_rows(count, self.heads)]
        if self.change is not None and not isinstance(found, Codes):
            found = self.change(found)
        return found

    def source(self) -> list[Any]:
        """What its weight is put together from again."""
        return [self.fqn, self.heads, self.part[0]]


def order_of_rows(rows: int, heads: int) -> Tensor:
    """Number of the row that each row of llama.cpp is in a rotary projection of Llama."""
    halves = torch.arange(rows).view(heads, 2, rows // heads // 2)
    return halves.transpose(1, 2).reshape(-1)


def mapped(names: Any, name: str, fqn: str) -> str:
    """What llama.cpp calls a tensor.

    Args:
        names: a name map of the package gguf.
        name: as its converter knows it.
    """
    found: str | None = names.get_name(key=name, try_suffixes=SUFFIXES)
    if found is None:
        raise Refused(f"llama.cpp has no place for {fqn}")
    return found


def split_rows(entry: Entry, name: str, into: tuple[str, ...]) -> list[Entry]:
    """An entry for each equal part of the rows, `name` replaced by these."""
    parts = enumerate(into)
    return [
        Entry(entry.name.replace(name, one), entry.fqn, part=(number, len(into)))
        for number, one in parts
    ]


def block_number(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def without_prefix(tensors: Mapping[str, Any], *prefixes: str) -> dict[str, str]:
    """FQN -> the rest of its name, of the tensors under these prefixes."""
    found = {}
    for fqn in tensors:
        for prefix in prefixes:
            if fqn.startswith(prefix):
                found[fqn] = fqn.removeprefix(prefix)
    return found
