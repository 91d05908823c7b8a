"""A process that holds one runtime and measures when it is told to.

python worker.py JSON

It answers a line when the model is loaded, and then a line for each line that it reads. It imports
nothing of gracec, so that the environment of the peers can run it too.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from engines import ENGINES, Stream, imports

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import forget_peak, peak_mib, resident_mib

CONTEXT = 64
"""Length of the prompt before what is decoded."""
COMPARED = 32
"""Greedy tokens that are compared with those of torch."""


def word_range(vocabulary: int) -> range:
    """The tokens that a prompt is drawn from; the lowest are special in many vocabularies."""
    return range(min(64, vocabulary // 2), vocabulary)


def prompt(length: int, words: range) -> list[int]:
    """Seeded random tokens, the same in every environment."""
    return random.Random(0).choices(words, k=length)


def measure(stream: Stream, words: range, prefill: int, count: int) -> dict[str, Any]:
    """Seconds of a long prompt; seconds to the first token after a short one, and of the others.

    Args:
        prefill: length of the long prompt.
        count: tokens after the first one.
    """
    start = time.perf_counter()
    next(stream(prompt(prefill, words), 1))
    long = time.perf_counter() - start
    steps = stream(prompt(CONTEXT, words), count + 1)
    start = time.perf_counter()
    tokens = [next(steps)]
    first = time.perf_counter() - start
    start = time.perf_counter()
    tokens += steps
    seconds = time.perf_counter() - start
    if len(tokens) != count + 1:
        raise RuntimeError(f"{len(tokens)} tokens instead of {count + 1}")
    return {
        "prefill": prefill / long,
        "first": first,
        "decode": count / seconds,
        "greedy": tokens[:COMPARED],
    }


def read(path: Path) -> None:
    """Have the files in the page cache, so that a load is not a load from a disk."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass


def end_with_parent() -> None:
    """Have Linux kill this process when its parent ends: a stopped one would stay for ever."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    end_with_parent()
    task = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what runtimes print does not end up among the answers
    imports(task["engine"])
    path = Path(task["path"])
    read(path)
    before = resident_mib()
    forget_peak()
    start = time.perf_counter()
    stream, size = ENGINES[task["engine"]](path, task["threads"], **task["options"])
    loaded = time.perf_counter() - start
    words = word_range(task["vocabulary"])
    list(stream(prompt(CONTEXT, words), 4))  # what a first call touches and allocates
    print(json.dumps({"load": loaded, "bytes": size}), file=answers, flush=True)
    for _ in sys.stdin:
        found = measure(stream, words, *task["lengths"])
        found["memory_mib"] = peak_mib() - before
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
