"""Memory of each process before a training in shards begins, against its plan.

    python benchmarks/sharded_memory.py        writes benchmarks/results/sharded_memory.json

A random LLaVA learns from a wider one in two processes (gloo) on the CPU. Measured is the largest
resident set above what the process held before any model: while the student is sharded, and while
the teacher is loaded, captured and sharded after it. Planned is the same from configurations alone.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import forget_peak, peak_mib, resident_mib, write_result
from plan import recipe, records, warm_up, write_models

MIB = 1 << 20
RANKS = 2
SHAPE: dict[str, Any] = {
    "family": "llava",
    "text": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8},
    "vocabulary": 8192,
    "teacher": 1024,
    "image": 32,
    "words": 30,
    "training": {
        "batch_size": 8,
        "micro_batch_size": 1,
        "strategy": "sharded",
        "activation_checkpointing": "blocks",
    },
}
TIMES = {
    "_running": "before the student is sharded",
    "_take": "before the teacher is sharded",
}
"""Method of a run -> the time of a plan that it is."""


def measure(folder: Path) -> None:
    """One of the processes, until the training would begin."""
    import torch.distributed as dist

    import gracec
    from gracec.training.loop import Run
    from gracec.training.ranks import join_ranks

    ranks, os.environ["WORLD_SIZE"] = os.environ["WORLD_SIZE"], "1"
    warm_up(recipe({**SHAPE, "training": {"batch_size": 8}}))
    os.environ["WORLD_SIZE"] = ranks
    join_ranks(torch.device("cpu"))
    libraries, found = resident_mib(), dict[str, float]()

    def measured(name: str) -> Any:
        method = getattr(Run, name)

        def call(self: Run, *arguments: Any) -> Any:
            forget_peak()
            result = method(self, *arguments)
            found[TIMES[name]] = peak_mib() - libraries
            if name == "_take":
                dist.barrier()
                print(json.dumps(found), flush=True)
                os._exit(0)
            return result

        return call

    for name in TIMES:
        setattr(Run, name, measured(name))
    gracec.compile(
        folder / "student",
        recipe(SHAPE),
        teacher=folder / "teacher",
        train_data=records(SHAPE),
        progress=False,
    )


def planned(folder: Path) -> dict[str, float]:
    """Time -> MiB, from the configurations."""
    from gracec.models.hub import find_description
    from gracec.planning import BANDWIDTH, TFLOPS, Pair, Planner, Rehearsals
    from gracec.report.training_plan import Setting
    from gracec.training.planned_samples import Stated

    chosen = recipe(SHAPE)
    rule = chosen.training.model_copy(update={"precision": "float32"})
    places = [find_description(folder / name) for name in ("student", "teacher")]
    pair = Pair.read(*places, chosen, rule, "cpu", None)
    samples = pair.samples(None, Stated(1, (32, 32), 40, 20))
    rates, rehearsals = (TFLOPS["cpu"], BANDWIDTH["cpu"]), Rehearsals(pair, samples)
    planner = Planner(pair, samples, RANKS, 1 << 40, *rates, rehearsals)
    times = planner.bytes_at(Setting(1, "float32", True, "sharded"), 4)
    return {name: sum(times[name].values()) / MIB for name in TIMES.values()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="one of the processes, on these models")
    options = parser.parse_args()
    if options.folder:
        measure(options.folder)
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        folder = Path(name)
        write_models(SHAPE, folder)
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
        free.close()
        shared = {**os.environ, "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
        shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        # Without it malloc keeps some of what is freed.
        shared |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}
        children = [
            subprocess.Popen(
                [sys.executable, __file__, f"--folder={folder}"],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        said = [child.communicate()[0] for child in children]
        measured = [json.loads(one.splitlines()[-1]) for one in said]
        plan = planned(folder)
    rows = []
    for at, mib in plan.items():
        most = max(one[at] for one in measured)
        row = {"time": at, "planned_mib": round(mib), "measured_mib": round(most)}
        rows.append({**row, "planned over measured": round(mib / most, 2)})
    what = f"memory of each of {RANKS} processes before a training in shards begins"
    write_result("sharded_memory", what, rows, load=load)


if __name__ == "__main__":
    main()
