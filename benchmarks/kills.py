"""Kill trainings, compilations, saves and exports at random moments, and let the next run finish.

    python benchmarks/kills.py                 100 kills; half an hour on two cores
    python benchmarks/kills.py --kills 8       a few

Every other kill is at a random moment of the work, the others at a random point of the sequence in
which something is written. After every kill: what is there is the whole old artifact or the whole
new one, the next run ends in the bits of one that nobody disturbed, it names what the killed
process left and clears it away, and no file of the user is gone, neither beside the output nor in
the directory of the training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import write_result  # noqa: E402

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["gracec.compiler", "gracec.backends.onnx.format", "tests.tiny"])
SECONDS = 600
RECIPE = {
    "name": "kills",
    "weights": {"decoder": {"group_size": 32}},
    "training": {
        "steps": 5,
        "batch_size": 4,
        "micro_batch_size": 4,
        "lr": 3e-3,
        "scale_lr": 1e-2,
        "evaluate_every": 2,
        "checkpoint_every": 1,
        "held_out": 0.25,
        "distillation": {"kind": "none", "omega": 0},
    },
}
NOTED = ("report", "manifest_sha256")
"""What two runs may say differently: which of them was interrupted."""
READY, SAID, OUT = "ready", "said.json", "out"
MINE = b"of the user"


# What is killed. Each works in a folder, with `out` as its output, and returns what it said.


def _training(folder: Path, ready: Callable[[], None]) -> list[str]:
    import gracec
    from tests.tiny import tiny_image, tiny_llava, tiny_processor

    records = [
        {
            "image": tiny_image(number),
            "conversations": [
                {"from": "human", "value": "<image>\nwhat color is this ?"},
                {"from": "gpt", "value": ("red", "green", "blue", "yellow")[number % 4]},
            ],
        }
        for number in range(12)
    ]
    model, words = tiny_llava(tie=True, num_hidden_layers=1), tiny_processor()
    ready()
    found = gracec.compile(
        model,
        gracec.Recipe.from_dict(RECIPE),
        train_data=records,
        processor=words,
        output_dir=folder / OUT,
        resume=True,
        overwrite=True,
        progress=False,
    )
    return [str(note) for note in found.report.notes]


def _compiling(folder: Path, ready: Callable[[], None]) -> list[str]:
    import gracec
    from tests.tiny import tiny_llava, tiny_processor

    model, words = tiny_llava(tie=True, num_hidden_layers=1), tiny_processor()
    ready()
    found = gracec.compile(
        model, "w4a16-ptq", processor=words, output_dir=folder / OUT, overwrite=True
    )
    return [str(note) for note in found.report.notes]


def _saving(folder: Path, ready: Callable[[], None]) -> list[str]:
    import gracec

    loaded = gracec.load(folder / "source", "torchao")
    ready()
    return list(loaded.save_pretrained(folder / OUT, "hf,torchao", overwrite=True))


def _exporting(folder: Path, ready: Callable[[], None]) -> list[str]:
    import gracec
    from gracec.errors import GracecError

    loaded = gracec.load(folder / "source", "torchao")
    ready()
    try:
        return list(loaded.export_onnx(folder / OUT))
    except GracecError as error:
        if (folder / OUT).exists():  # the killed one had got there
            return [str(error)]
        raise


SHARES = (0.25, 0.2, 0.35, 0.2)
"""Of the kills; a save takes the least time."""
JOBS = {
    "training": _training,
    "compiling": _compiling,
    "saving over an artifact": _saving,
    "exporting ONNX": _exporting,
}


def _child(job: str, folder: Path, point: int | None) -> None:
    """Run a job; say when it begins, and at its end what it said and how many points it passed.

    Args:
        point: number of the point, of those that `gracec.directories` names, to be killed at.
    """
    import torch

    from gracec import directories

    passed = 0

    def reached(name: str) -> None:
        nonlocal passed
        passed += 1
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    directories.reached = reached
    torch.set_num_threads(1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        said = JOBS[job](folder, (folder / READY).touch)
    said += [str(one.message) for one in warned]
    told = {"said": said, "points": passed}
    (folder / SAID).write_text(json.dumps(told), encoding="utf-8")


@dataclass
class Trial:
    """A folder in which a job is done, with files of a user beside what it writes."""

    job: str
    folder: Path
    files: dict[str, bytes] = field(default_factory=dict)

    def put(self, name: str) -> None:
        """A file of the user."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(MINE)
        self.files[name] = MINE

    def start(self, point: int | None = None) -> Any:
        """Begin the job in a process of its own, up to where its work begins."""
        for name in (READY, SAID):
            (self.folder / name).unlink(missing_ok=True)
        child = _SERVER.Process(target=_child, args=(self.job, self.folder, point))
        child.start()
        while child.exitcode is None and not (self.folder / READY).exists():
            time.sleep(0.002)
        return child

    def finish(self) -> tuple[list[str], int, float]:
        """Do the job to its end: what it said, the points that it passed, and its seconds."""
        child, begun = self.start(), time.monotonic()
        child.join(SECONDS)
        if child.exitcode != 0:
            raise RuntimeError(f"{self.job} ended with {child.exitcode} in {self.folder}")
        found = json.loads((self.folder / SAID).read_text(encoding="utf-8"))
        return found["said"], found["points"], time.monotonic() - begun

    def result(self) -> dict[str, Any]:
        """What the job wrote: name -> hash, and the manifest but for its notes."""
        out = self.folder / OUT
        found: dict[str, Any] = {}
        for path in sorted(path for path in out.rglob("*") if path.is_file()):
            name = path.relative_to(out).as_posix()
            if name == "gracec.json":
                manifest = json.loads(path.read_text(encoding="utf-8"))
                found |= {key: value for key, value in manifest.items() if key not in NOTED}
                report = {k: v for k, v in manifest["report"].items() if k != "notes"}
                found["report"] = report
                found["files"] = {k: v for k, v in manifest["files"].items() if k != "README.md"}
            elif name != "README.md":  # which has the notes
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def left(self) -> list[Path]:
        """What a killed process left that nobody asked for."""
        rooms = list(self.folder.rglob(".*.gracec"))
        found = [room / name for room in rooms for name in ("new", "replaced")]
        return [*(p for p in found if p.exists()), *self.folder.rglob(".step-*.removed")]

    def gone(self) -> list[str]:
        """Files of the user that are not as they were."""
        paths = {name: self.folder / name for name in self.files}
        return [n for n, path in paths.items() if not path.is_file() or path.read_bytes() != MINE]

    def unexpected(self) -> list[str]:
        """Names in the folder that neither the user nor the result accounts for."""
        names = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*")}
        own = {READY, SAID, OUT, "source", *self.files}
        own |= {parent.as_posix() for name in self.files for parent in Path(name).parents}
        return sorted(
            name
            for name in names
            if name not in own and not name.startswith((f"{OUT}/", "source/"))
        )


def prepare(job: str, folder: Path, made: Mapping[str, Path]) -> Trial:
    """A folder with what the job needs, and files of a user."""
    folder.mkdir()
    trial = Trial(job, folder)
    trial.put("notes.txt")
    trial.put(f".{OUT}.backup/thesis.tex")
    if job in ("saving over an artifact", "exporting ONNX"):
        shutil.copytree(made["new"], folder / "source")
    if job in ("compiling", "saving over an artifact"):
        shutil.copytree(made["old"], folder / OUT)
    return trial


def kill(
    trial: Trial, at: int | float, old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, bool]:
    """Kill a job, look at what is there, let it finish, and look again.

    Args:
        at: number of the point, or seconds of work, to kill it at.
        old, new: what is there before and afterwards, undisturbed.
    """
    child = trial.start(at if isinstance(at, int) else None)
    child.join(SECONDS if isinstance(at, int) else at)
    child.kill()
    child.join()
    whole = trial.result() in (new, old)
    left = trial.left()
    run = trial.folder / f"{OUT}.training"
    steps = sorted(run.glob("step-*/checkpoint.json"))
    if steps:  # the user looks at what is there, and writes something down
        trial.put(f"{OUT}.training/notes.txt")
        trial.put(f"{OUT}.training/{steps[-1].parent.name}/why.txt")
    said = "\n".join(trial.finish()[0])
    return {
        "killed": child.exitcode == -signal.SIGKILL,
        "whole at once": whole,
        "the same bits": trial.result() == new,
        LEFT: bool(left),
        "what was left was named": all(str(path) in said for path in left),
        "nothing else is left": not trial.left() and not trial.unexpected(),
        "files of the user are there": not trial.gone(),
    }


def measure(kills: int, seed: int, work: Path) -> list[dict[str, Any]]:
    """A row for each job: how often it was killed, and how often each thing held."""
    rng, rows = random.Random(seed), []
    made = _artifacts(work)
    for number, (job, share) in enumerate(zip(JOBS, SHARES, strict=True)):
        count = round(kills * share)
        calm = prepare(job, work / f"{number}-calm", made)
        old = calm.result()
        _, points, seconds = calm.finish()
        new, held = calm.result(), list[dict[str, bool]]()
        while len(held) < count:
            folder = work / f"{number}-{len(held)}"
            trial = prepare(job, folder, made)
            at = rng.randint(1, points) if len(held) % 2 else rng.uniform(0, seconds)
            found = kill(trial, at, old, new)
            print(
                f"{job} {len(held) + 1}/{count} at {at:.3g}: {found}", file=sys.stderr, flush=True
            )
            right = all(found[name] for name in ALWAYS)
            if right:
                shutil.rmtree(folder)
            if found.pop("killed") or not right:  # it may be done before its moment comes
                held.append(found)
        rows.append(
            {
                "what": job,
                "kills": count,
                "seconds undisturbed": round(seconds, 1),
                "points": points,
                **{name: sum(found[name] for found in held) for name in (LEFT, *ALWAYS)},
            }
        )
    return rows


LEFT = "something was left"
ALWAYS = (
    *("whole at once", "the same bits", "what was left was named"),
    *("nothing else is left", "files of the user are there"),
)
"""What has to hold after every kill."""


def _artifacts(work: Path) -> dict[str, Path]:
    """Two artifacts that differ, made in a process of its own."""
    found = {name: work / f"artifact-{name}" for name in ("old", "new")}
    child = _SERVER.Process(target=_make, args=(found,))
    child.start()
    child.join(SECONDS)
    if child.exitcode != 0:
        raise RuntimeError(f"the artifacts were not made: {child.exitcode}")
    return found


def _make(directories: Mapping[str, Path]) -> None:
    import torch

    import gracec
    from tests.tiny import tiny_llava, tiny_processor

    torch.set_num_threads(1)
    for seed, directory in enumerate(directories.values()):
        model = tiny_llava(seed, tie=True, num_hidden_layers=1)
        gracec.compile(model, "w4a16-ptq", processor=tiny_processor(), output_dir=directory)


def main() -> None:
    """Measure, and write the results file; exit code 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder to keep what did not hold in")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    work = options.work or Path(tempfile.mkdtemp(prefix="gracec-kills-"))
    work.mkdir(parents=True, exist_ok=True)
    rows = measure(options.kills, options.seed, work)
    write_result(
        "kills",
        "SIGKILL at random moments: how often each thing held after the next run",
        rows,
        arguments=f"--kills {options.kills} --seed {options.seed}",
        load=load,
    )
    wrong = [row for row in rows if any(row[name] != row["kills"] for name in ALWAYS)]
    if options.work is None and not wrong:
        shutil.rmtree(work)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
