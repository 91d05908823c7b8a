"""Decode and prefill speed of every runtime, beside the memory bandwidth of the machine.

    python benchmarks/decode/prepare.py --model smollm2      first: the models, exports and peers
    python benchmarks/decode/run.py --model smollm2          writes results/decode_smollm2.json

Each variant and number of threads is a process of its own. In every round each takes its turn, in
an order of its own, while the others are stopped; the bandwidth is measured in every round. A
process stays up while memory allows it; one that does not fit is started for its turn. A run that
was interrupted goes on with the next round, if need be with fewer variants: a row says in how many
rounds it was measured, and ratios are of the rounds that have both. Those of a finished run stay
beside the models as rounds-finished.jsonl: called rounds.jsonl, they can be added to.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rounds import (
    Round,
    best_threads,
    figures,
    interval,
    ratios,
    same_tokens,
    verdict,
)
from variants import HALF, LENGTHS, LLAMA, MODELS, REFERENCES, TORCH, VARIANTS, WORK, Variant
from worker import COMPARED, CONTEXT

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import write_result

HERE = Path(__file__).resolve().parent
THREADS = (1, 2)
RESERVE = {"smollm2": 4.0, "1b": 10.0, "tiny": 1.0}
"""GiB that the largest variant takes while it loads: workers stay up while this much is left."""
STREAMED = 256 << 20
EVERYTHING = ["*"]
ROUNDS, FINISHED = "rounds.jsonl", "rounds-finished.jsonl"
RATIOS = (
    ("decode", TORCH, 7.0),
    ("decode", HALF, 3.0),
    ("decode", LLAMA, 1.3),
    ("prefill", LLAMA, 2.0),
)
"""What gracec's fastest variant is held against: metric, reference, ratio."""
SHARE, WEIGHTS, SECONDS = 60, 30, 60
"""Per cent of the bandwidth; weights in per cent of bfloat16; of the export."""


class Worker:
    """One variant at one number of threads, in a process that is stopped between its turns.

    Raises:
        RuntimeError: from `start` and `measure`, with the last line of a process that failed.
    """

    def __init__(
        self,
        variant: Variant,
        threads: int,
        work: Path,
        python: Path,
        words: int,
        lengths: tuple[int, int],
    ) -> None:
        task = {
            "engine": variant.engine,
            "path": str(work / variant.path),
            "threads": threads,
            "options": dict(variant.options),
            "vocabulary": words,
            "lengths": lengths,
        }
        self.variant, self.threads = variant, threads
        self.command = [str(python), str(HERE / "worker.py"), json.dumps(task)]
        self.log = work / "logs" / f"{variant.name.replace(' ', '-')}-{threads}.txt"
        self.process: subprocess.Popen[str] | None = None
        self.facts: dict[str, Any] = {}

    def start(self) -> None:
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
            )
        self.facts = self._answer()

    def measure(self) -> dict[str, Any]:
        """Take the turn."""
        if self.process is None:
            self.start()
        process = self.process
        assert process is not None and process.stdin is not None
        process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        found = self._answer()
        process.send_signal(signal.SIGSTOP)
        return {**self.facts, **found}

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.end()
            lines = self.log.read_text(encoding="utf-8").strip().splitlines()
            raise RuntimeError(f"ended with {code}: {lines[-1] if lines else 'no message'}")
        found: dict[str, Any] = json.loads(line)
        return found


def bandwidth(array: torch.Tensor) -> float:
    """GB/s of the fastest of 5 reads of an array much larger than the caches."""
    best, before = 0.0, torch.get_num_threads()
    for threads in THREADS:
        torch.set_num_threads(threads)
        for _ in range(5):
            start = time.perf_counter()
            array.sum()
            best = max(best, array.nbytes / (time.perf_counter() - start) / 1e9)
    torch.set_num_threads(before)
    return best


def available_gib() -> float:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith("MemAvailable:"))
    return int(line.split()[1]) / 2**20


def take_rounds(
    workers: Sequence[Worker], count: int, reserve: float, file: Path, missing: dict[str, str]
) -> list[dict[str, Any]]:
    """Measure round by round; each is a line of a file, with which the next run goes on."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rounds: list[dict[str, Any]] = [json.loads(line) for line in lines]
    array = torch.ones(STREAMED // 4)
    try:
        while len(rounds) < count:
            load = os.getloadavg()[0]
            found: dict[str, dict[str, Any]] = {}
            began = time.time()
            speeds = [bandwidth(array)]
            for worker in random.Random(len(rounds)).sample(workers, len(workers)):
                name = worker.variant.name
                if name in missing:
                    continue
                try:
                    found.setdefault(name, {})[str(worker.threads)] = worker.measure()
                except RuntimeError as error:
                    missing[name] = str(error)
                    print(f"{name}: {error}", file=sys.stderr)
                if available_gib() < reserve:
                    worker.end()
            speeds.append(bandwidth(array))
            measured = {name: by for name, by in found.items() if name not in missing}
            rounds.append({"load": load, "bandwidth": max(speeds), "variants": measured})
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(rounds[-1]) + "\n")
            took = time.time() - began
            print(f"round {len(rounds)} of {count}: {took:.0f} s", file=sys.stderr)
    finally:
        for worker in workers:
            worker.end()
    return rounds


def row(
    variant: Variant,
    rounds: Sequence[Round],
    speeds: Sequence[float],
    facts: Mapping[str, Any],
    expected: Sequence[int] | None,
) -> dict[str, Any]:
    """The figures of a variant: each speed at the number of threads that is best for it.

    Args:
        speeds: bandwidth in each round, GB/s.
        facts: of `prepare.py`.
        expected: greedy tokens of torch on the same weights.
    """
    name = variant.name
    best, long = (best_threads(rounds, name, metric) for metric in ("decode", "prefill"))

    def all_of(metric: str, threads: str = best) -> list[Any]:
        return figures(rounds, name, threads, metric)

    read = all_of("bytes")[0]
    own = [speed for one, speed in zip(rounds, speeds, strict=True) if name in one]
    shares = [d * read / speed / 1e9 for d, speed in zip(all_of("decode"), own, strict=True)]
    against = {
        column: str(interval(ratios(rounds, name, reference, "decode")))
        for column, reference in REFERENCES.items()
        if any(reference in one for one in rounds)
    }
    same = None
    if expected is not None:
        greedy = all_of("greedy")
        count = min(COMPARED, len(greedy[0]))
        same = f"{min(same_tokens(tokens, expected[:count]) for tokens in greedy)} of {count}"
    return {
        "variant": name,
        "rounds": len(all_of("decode")),
        "threads": int(best),
        "decode_tokens_per_s": round(statistics.median(all_of("decode")), 1),
        **against,
        "percent_of_bandwidth": round(100 * statistics.median(shares)),
        "prefill_threads": int(long),
        "prefill_tokens_per_s": round(statistics.median(all_of("prefill", long))),
        "first_token_ms": round(1000 * statistics.median(all_of("first")), 1),
        "load_s": round(statistics.median(all_of("load")), 2),
        "weights_mib": round(read / 2**20, 1),
        "file_mib": facts["mib"],
        "memory_mib": round(max(all_of("memory_mib"))),
        "export_s": facts["seconds"] if variant.ops else None,
        "tokens_as_torch": same,
    }


def target(name: str, at: str, variant: str, found: str, verdict: str) -> dict[str, str]:
    return {"target": name, "at": at, "variant": variant, "found": found, "verdict": verdict}


def targets(rounds: Sequence[Round], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Each target beside the variant of gracec that is fastest at it."""
    by_name = {one["variant"]: one for one in rows}
    fast = [one for one in rows if one["variant"].startswith("gracec fast")]
    if not fast:
        return []
    best = {
        metric: max(fast, key=lambda one: one[f"{metric}_tokens_per_s"])
        for metric in ("decode", "prefill")
    }
    found = []
    for metric, reference, ratio in RATIOS:
        if reference not in by_name:
            continue
        name = best[metric]["variant"]
        inside = interval(ratios(rounds, name, reference, metric))
        what = f"{metric}, over {reference}"
        found.append(target(what, f">= {ratio}", name, str(inside), verdict(inside, ratio)))
    chosen = best["decode"]
    share = chosen["percent_of_bandwidth"]
    plain = [("percent of the memory bandwidth", f">= {SHARE}", share, share >= SHARE)]
    if HALF in by_name:
        part = 100 * chosen["weights_mib"] / by_name[HALF]["weights_mib"]
        plain.append(("weights, percent of bfloat16", f"<= {WEIGHTS}", part, part <= WEIGHTS))
    seconds = chosen["export_s"]
    if seconds is not None:
        plain.append(("seconds of the export", f"<= {SECONDS}", seconds, seconds <= SECONDS))
    name = chosen["variant"]
    return found + [
        target(what, at, name, f"{value:.1f}", "reached" if reached else "missed")
        for what, at, value, reached in plain
    ]


def peer_versions(python: Path) -> dict[str, str]:
    """Versions of the runtimes, and of those in the environment of the peers."""
    names = ("onnxruntime-genai", "llama_cpp_python", "onnxruntime")
    found = {name: version(name) for name in ("onnxruntime", "torchao", "transformers")}
    if python.is_file():
        script = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
        done = subprocess.run(
            [python, "-c", script, *names], stdout=subprocess.PIPE, text=True, check=True
        )
        versions = zip(names, done.stdout.split(), strict=True)
        found |= {f"{name} (peers)": number for name, number in versions}
    return found


def said(options: argparse.Namespace) -> str:
    """What of the command decides the figures: not where files and peers lie."""
    words = ["--model", options.model, "--rounds", str(options.rounds)]
    if options.only != EVERYTHING:
        words += ["--only", *options.only]
    return shlex.join(words)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--only", nargs="+", default=EVERYTHING, help="variants with such names, and the references"
    )
    parser.add_argument("--work", type=Path, default=WORK, help="the folder of prepare.py")
    parser.add_argument("--peers", type=Path, help="an environment as in peer_requirements.txt")
    parser.add_argument("--out", help="name of the result; default decode_MODEL")
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    work = options.work / options.model
    lengths = LENGTHS[options.model]
    peers = (options.peers or options.work / "peers") / "bin" / "python"
    made = json.loads((work / "made.json").read_text(encoding="utf-8"))
    missing: dict[str, str] = {}
    workers = []
    for variant in VARIANTS:
        chosen = any(fnmatch.fnmatch(variant.name, pattern) for pattern in options.only)
        if not chosen and variant.name not in REFERENCES.values():
            continue
        facts = made["files"].get(variant.path, {"error": "not made yet: run prepare.py"})
        if "error" in facts:
            missing[variant.name] = facts["error"]
            continue
        python = peers if variant.peer else Path(sys.executable)
        workers += [Worker(variant, n, work, python, made["words"], lengths) for n in THREADS]
    file = work / ROUNDS
    found = take_rounds(workers, options.rounds, RESERVE[options.model], file, missing)
    rounds = [one["variants"] for one in found]
    speeds = [one["bandwidth"] for one in found]
    rows: list[dict[str, Any]] = []
    for variant in VARIANTS:
        if any(variant.name in one for one in rounds):
            expected = made["greedy"].get(variant.weights)
            facts = made["files"][variant.path]
            rows.append(row(variant, rounds, speeds, facts, expected))
    machine = {
        "rounds": len(rounds),
        "bandwidth_gb_per_s": str(interval(speeds)),
        "load_before_each_round": ", ".join(f"{one['load']:.1f}" for one in found),
    }
    lost = [{"variant": name, "missing": reason} for name, reason in missing.items()]
    what = (
        f"decoding {lengths[1]} tokens after {CONTEXT}, and reading {lengths[0]}, with "
        f"{MODELS[options.model]}"
    )
    write_result(
        options.out or f"decode_{options.model}",
        what,
        [*targets(rounds, rows), machine, *rows, *lost],
        arguments=said(options),
        script="decode/run.py",
        load=load,
        versions=peer_versions(peers),
    )
    file.rename(work / FINISHED)


if __name__ == "__main__":
    main()
