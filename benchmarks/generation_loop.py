"""What `generate` of transformers costs a token, over a loop of nothing but the graphs.

    python benchmarks/generation_loop.py      writes benchmarks/results/generation_loop.json

The shipped EmojiVQA student in INT4 on ONNX Runtime, one prompt with its picture, one thread. Both
give the same greedy tokens. Times are of the processor, so that other work on the machine hardly
counts; rounds in turn, their median with the least and the greatest.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import write_result

EMOJIVQA = Path(__file__).resolve().parents[1] / "examples" / "emojivqa"
TOKENS, ROUNDS = 64, 15


def exported(folder: Path) -> Any:
    """The student as the runner has it, with no token that ends an answer."""
    import gracec

    out = folder / "student"
    recipe = "w4a16-ptq"
    gracec.compile(EMOJIVQA / "student", recipe, output_dir=out, formats="onnx", progress=False)
    model = gracec.load(out, "onnxruntime")
    model.generation_config.eos_token_id = None
    return model


def milliseconds(run: Callable[[], torch.Tensor], rounds: list[float]) -> torch.Tensor:
    """The tokens of a round, whose processor time a token is added."""
    start = time.process_time()
    tokens = run()
    rounds.append(1000 * (time.process_time() - start) / TOKENS)
    return tokens


def measure() -> list[dict[str, Any]]:
    """A row for each loop."""
    from gracec.capture import family_of
    from gracec.capture.greedy import greedy
    from gracec.models.loading import load_model

    source = load_model(EMOJIVQA / "student")
    family = family_of(source)
    batch = family.example_batch(source, batch=1, images=1)
    prepared = family.prepare(source, batch)
    length = batch["input_ids"].shape[1]
    with tempfile.TemporaryDirectory() as folder:
        model = exported(Path(folder))

        def alone() -> torch.Tensor:
            with torch.no_grad():
                steps = list(greedy(model, prepared, max_new_tokens=TOKENS))
            return torch.stack([step.tokens for step in steps], dim=1)

        def whole() -> torch.Tensor:
            made = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
            tokens: torch.Tensor = made[:, length:]
            return tokens

        loops = {"the graphs alone": alone, "generate of transformers": whole}
        taken: dict[str, list[float]] = {name: [] for name in loops}
        for run in loops.values():
            milliseconds(run, [])  # not counted
        for _ in range(ROUNDS):
            one, other = (milliseconds(run, taken[name]) for name, run in loops.items())
            assert torch.equal(one, other)
    return [
        {
            "loop": name,
            "rounds": ROUNDS,
            "processor ms a token": f"{statistics.median(found):.2f} "
            f"({min(found):.2f} to {max(found):.2f})",
        }
        for name, found in taken.items()
    ]


def main() -> None:
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    what = "greedy answers of the shipped student on ONNX Runtime"
    write_result("generation_loop", what, measure(), load=load)


if __name__ == "__main__":
    main()
