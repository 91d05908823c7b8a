"""Seeded mutations of texts, bytes, JSON values and files."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

TEXTS = (
    *("", " ", "\n---\n", "\ud800", "\x00", "\x1b[2J", "a" * 5_000, "../../outside", "/etc/passwd"),
    *("<script>", "{{ 9 * 9 }}", "{% for i in range(9) %}", "$x$", "%s%n", "nan", "-1", "1e999"),
    *("🦆", "\ufeff", "C:\\a", "a/b/c", "None", "true", "[]", "<image>", "</s>"),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 10**8, -(10**8), 2**31, 2**63, 10**40, 0.5, -0.5, 1e-300, 1e300, 1e8),
    *(float("inf"), float("-inf"), float("nan")),
)
DEEP = json.loads("[" * 90 + "]" * 90)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [None], {"a": 1}, [[1]], {"": {}}, DEEP)
TOKENS = (
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b",",
    b":",
    b"\\",
    b"\x00",
    b"\xff",
    b"\n",
    b"9",
    b"<<",
    b"&",
)


def value(rng: random.Random) -> Any:
    """A text, a number or something else."""
    return copy.deepcopy(rng.choice(rng.choice([TEXTS, NUMBERS, OTHERS])))


def changed(rng: random.Random, whole: Any) -> Any:
    """A value with one to three places replaced, removed, added, repeated or renamed."""
    whole = copy.deepcopy(whole)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(whole))
        if not places:
            return value(rng)
        holder, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.55:
            holder[key] = value(rng)
        elif kind < 0.75:
            del holder[key]
        elif isinstance(holder, dict) and kind < 0.9:
            holder[rng.choice(TEXTS)] = value(rng)
        elif isinstance(holder, dict):
            holder[f"{key}{rng.choice(['s', '_', ' '])}"] = holder.pop(key)
        else:
            holder.insert(rng.randrange(len(holder) + 1), value(rng))
    return whole


def _places(whole: Any) -> Any:
    inside = whole.items() if isinstance(whole, dict) else enumerate(whole)
    for key, item in list(inside):
        yield whole, key
        if isinstance(item, (dict, list)):
            yield from _places(item)


def torn(rng: random.Random, data: bytes) -> bytes:
    """Bytes that are cut, doubled, replaced by tokens or by what no parser likes."""
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(7)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.choice(TOKENS) + data[at:]
    if kind == 2:
        return data[:at] + rng.choice(TOKENS) + data[at + 1 :]
    if kind == 3:
        return data[:at] + rng.choice(TOKENS) * 100_000 + data[at:]
    if kind == 4:
        return data[at:] + data[:at]
    if kind == 5:
        return data.replace(b'"', b"'") + rng.randbytes(rng.randrange(1, 20))
    end = rng.randrange(at, len(data) + 1)
    return data[:end] + data[at:end] + data[end:]


def dumped(rng: random.Random, whole: Any) -> bytes:
    """JSON, perhaps with a byte order mark, a key twice or numbers of thousands of digits."""
    data = json.dumps(whole).encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.03:
        return b"\xef\xbb\xbf" + data
    if kind < 0.06:
        return data.replace(b": 1", b": " + b"1" * 5_000, 1)
    if kind < 0.09:
        return data.replace(b"{", b'{"format_version": 1, ', 1)
    return data


def edit_json(
    rng: random.Random, file: Path, seal: Callable[[dict[str, Any]], Any] | None = None
) -> bool:
    """Change a JSON file; whether it was sealed anew afterwards."""
    data = file.read_bytes()
    if rng.random() < 0.25:
        file.write_bytes(torn(rng, data))
        return False
    whole = changed(rng, json.loads(data))
    sealed = False
    if seal is not None and isinstance(whole, dict) and rng.random() < 0.5:
        try:
            whole, sealed = seal(whole), True
        except ValueError:  # what no hash can be made of
            sealed = False
    file.write_bytes(dumped(rng, whole))
    return sealed


def edit_yaml(rng: random.Random, file: Path) -> None:
    """Change a YAML file."""
    data = file.read_bytes()
    if rng.random() < 0.4:
        file.write_bytes(torn(rng, data))
        return
    whole = changed(rng, yaml.safe_load(data))
    try:
        text = yaml.safe_dump(whole, allow_unicode=True)
    except (yaml.YAMLError, UnicodeError):
        text = json.dumps(whole)
    bomb = "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
    if rng.random() < 0.05:
        text = f"a0: &a0 {{x: 1}}\n{bomb}{text}"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
