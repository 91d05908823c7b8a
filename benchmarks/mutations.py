"""Take away one check after the other, and see that a test misses it.

    python benchmarks/mutations.py              every entry of wiring.py; minutes
    python benchmarks/mutations.py --list
    python benchmarks/mutations.py --only 'frozen equals fake-quantized'

Nothing is edited in place: the tests run in a copy of the tree. They run there without a mutation
first, since a test that fails anyway would say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from measure import RESULTS, write_result
from wiring import ROOT, Mutation, mutations

NAME = "mutations"
WHAT = "checks that were taken away one by one, and the first test that missed each"
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", ".*_cache", "node_modules", "build", "dist", "out"
)
SECONDS = 900
"""After which a test counts as hanging."""


class Unclear(Exception):
    """A mutation about which nothing can be said, with the reason."""


@dataclass(frozen=True)
class Verdict:
    """What became of a mutation.

    Attributes:
        killed_by: the first test that failed; None if it survived.
        seconds: until then.
    """

    mutation: Mutation
    killed_by: str | None
    seconds: float

    def row(self) -> dict[str, Any]:
        """Of the results file."""
        return {
            "mutation": self.mutation.name,
            "file": self.mutation.file,
            "killed_by": self.killed_by,
            "seconds": round(self.seconds, 1),
        }


def mutated(root: Path, mutation: Mutation) -> str:
    """What the file of a mutation holds with it.

    Raises:
        Unclear: if the text is not there, or more than once.
    """
    source = (root / mutation.file).read_text(encoding="utf-8")
    count = source.count(mutation.text)
    if count != 1:
        raise Unclear(f"{mutation.name}: its text occurs {count} times in {mutation.file}")
    return source.replace(mutation.text, mutation.replacement)


@contextmanager
def applied(tree: Path, mutation: Mutation) -> Iterator[None]:
    """The tree with one mutation, while the context lasts."""
    file, changed = tree / mutation.file, mutated(tree, mutation)
    before = file.read_text(encoding="utf-8")
    file.write_text(changed, encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(before, encoding="utf-8")


def first_failure(tree: Path, tests: Sequence[str]) -> str | None:
    """The first of these tests that fails in a tree, or None.

    Raises:
        Unclear: if they cannot be run, or hang.
    """
    options = ["-q", "-x", "-rfE", "--no-header", "-p", "no:cacheprovider"]
    # What is compiled from one mutation must not be taken for the next.
    more = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=tree,
            env={**os.environ, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise Unclear(f"{' '.join(tests)}: not done after {SECONDS} s") from error
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or (done.returncode == 1 and failed is None):
        raise Unclear(f"{' '.join(tests)}: pytest ended with {done.returncode}\n{done.stdout}")
    return failed[1] if done.returncode and failed else None


def verdict(tree: Path, mutation: Mutation) -> Verdict:
    """Try one mutation in a copy of the tree."""
    start = time.monotonic()
    with applied(tree, mutation):
        killed_by = first_failure(tree, mutation.tests)
    return Verdict(mutation, killed_by, time.monotonic() - start)


def verdicts(root: Path, wanted: Sequence[Mutation], jobs: int = 1) -> Iterator[Verdict]:
    """Try mutations in copies of a tree, one for each job.

    Raises:
        Unclear: if a text is not there, or a test fails without a mutation.
    """
    for mutation in wanted:
        mutated(root, mutation)
    with tempfile.TemporaryDirectory(prefix="gracec-mutations-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            tree = Path(shutil.copytree(root, Path(folder) / str(number), ignore=LEFT_OUT))
            trees.put(tree)
        tests = list(dict.fromkeys(test for mutation in wanted for test in mutation.tests))
        failed = first_failure(tree, tests)
        if failed is not None:
            raise Unclear(f"{failed} fails without any mutation")

        def in_a_tree(mutation: Mutation) -> Verdict:
            tree = trees.get()
            try:
                return verdict(tree, mutation)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(in_a_tree, wanted)


def kept_rows(names: Sequence[str], tried: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the results file for mutations that are still in the list and were not tried now."""
    path = RESULTS / f"{NAME}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return [row for row in rows if row["mutation"] in names and row["mutation"] not in tried]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="this one; may be repeated"
    )
    parser.add_argument("--jobs", type=int, default=1, help="mutations that are tried at once")
    options = parser.parse_args()
    every = mutations()
    names = [mutation.name for mutation in every]
    if unknown := set(options.only) - set(names):
        parser.error(f"there is no mutation {min(unknown)!r}; see --list")
    if options.list:
        print(*names, sep="\n")
        return 0
    wanted = [one for one in every if one.name in options.only or not options.only]
    load, rows = os.getloadavg()[0], kept_rows(names, [one.name for one in wanted])
    survivors = []
    try:
        for found in verdicts(ROOT, wanted, options.jobs):
            rows.append(found.row())
            survivors += [] if found.killed_by else [found.mutation.name]
            said = f"killed by {found.killed_by}" if found.killed_by else "SURVIVED"
            print(f"{found.mutation.name}: {said} ({found.seconds:.0f} s)", file=sys.stderr)
    except Unclear as error:
        print(error, file=sys.stderr)
        return 2
    rows.sort(key=lambda row: names.index(row["mutation"]))
    write_result(NAME, WHAT, rows, load=load)
    print(f"{len(survivors)} of {len(wanted)} survived", *survivors, sep="\n  ", file=sys.stderr)
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
