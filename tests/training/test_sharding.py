"""Ranks that hold rows of everything train as one process does."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from gracec.capture import Family, capture, family_of
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.free_scales import FreeScales
from gracec.passes.freeze import Freeze, frozen_weights
from gracec.recipe import Training
from gracec.training import sharding
from gracec.training.checkpoints.directory import latest_checkpoint
from gracec.training.checkpoints.fingerprint import Fingerprint
from gracec.training.checkpoints.optimizer import optimizer_state
from gracec.training.curve import Curve, Seconds
from gracec.training.learner import LaterTeacher, Learner
from gracec.training.loader import one_by_one
from gracec.training.loop import Run, train
from gracec.training.micro_batch import Batch
from gracec.training.shards import whole
from tests.children import start, wait
from tests.tiny_experts import tiny_experts
from tests.tiny_families import tiny_model

FAKE = "analyze-modality,plan-quantization,insert-fake-quant{candidates=4},"
TAPS = "insert-taps,select-supervised,return-head"
SAMPLES = 5
FINGERPRINT = Fingerprint("model", "teacher", "data", "processor", "recipe")
STEP = {
    "batch_size": 5,
    "micro_batch_size": 1,
    "steps": 2,
    "lr": 1e-3,
    "warmup": 0.0,
    "weight_decay": 0.01,
    "evaluate_every": 1,
    "checkpoint_every": 1,
    "distillation": {"omega_warmup": 0},
}


def model_of(kind: str, seed: int) -> PreTrainedModel:
    return tiny_experts("llava_mixtral") if kind == "experts" else tiny_model(kind, seed=seed)


def learner(kind: str, *, teaches: bool = False, scales: bool = False) -> Learner:
    model = model_of(kind, seed=int(teaches))
    passes = parse_pipeline(("analyze-modality," if teaches else FAKE) + TAPS)
    program = run_passes(capture(model), passes).program
    if scales:
        program = run_passes(program, [FreeScales()]).program
    return Learner(program, model)


def collate(model: PreTrainedModel, numbers: Any) -> Batch:
    """Samples of different length: five ranks of tokens for any number of ranks."""
    family: Family = family_of(model)
    (number,) = numbers
    batch = dict(family.example_batch(model, batch=1, images=1, text=5 + number))
    generator = torch.Generator().manual_seed(number)
    pixels = batch["pixel_values"]
    batch["pixel_values"] = torch.randn(pixels.shape, generator=generator).to(pixels.dtype)
    labels = batch["input_ids"].masked_fill(family.image_mask(model, batch), -100)
    batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def go(kind: str, *, directory: Path | None = None, stop: int = 0, **fields: Any) -> Any:
    """A training: its rows, and every parameter of the student after it."""
    fields = {**STEP, **fields}
    rule = Training.model_validate(fields)
    student = learner(kind, scales=rule.learns == "scales")
    batches = one_by_one(lambda numbers: collate(student.model, numbers))
    held_out = [collate(student.model, [7])]

    def log(row: dict[str, Any]) -> None:
        if stop and row["step"] == stop and "ce" not in row and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGKILL)

    curve: Curve = train(
        student,
        learner(kind, teaches=True) if rule.distillation.needs_teacher else None,
        batches,
        SAMPLES,
        held_out,
        rule,
        fingerprint=FINGERPRINT if directory else None,
        directory=directory,
        resume=directory is not None,
        log=log,
    )
    names = student.program.fqns
    tensors = {name: student.program.tensor(name).detach().clone() for name in names}
    codes = {
        fqn: weight.stored
        for fqn, weight in frozen_weights(run_passes(student.program, [Freeze()]).program).items()
    }
    return {"rows": curve.rows, "held_out": curve.held_out, "tensors": tensors, "codes": codes}


def first_gradients(kind: str, **fields: Any) -> dict[str, Any]:
    """The terms of the first step, and the gradient of everything that learns."""
    rule = Training.model_validate({**STEP, **fields})
    student = learner(kind, scales=rule.learns == "scales")
    batches = one_by_one(lambda numbers: collate(student.model, numbers))
    held: list[int] = []

    def make() -> tuple[Learner, str]:
        """What the student holds by then is noted."""
        held.append(sum(map(memory, student.program.graph_module.parameters())))
        return learner(kind, teaches=True), ""

    run = Run(student, LaterTeacher(make, 0), batches, SAMPLES, rule, None, None)
    running = sum(map(memory, run.running.program.graph_module.parameters()))
    run.curve.seconds.append(Seconds())
    terms = run._accumulate()
    gradients = {n: whole(p.grad) for n, p in run.parameters.items() if p.grad is not None}
    own = {"held": held[0], "running": running, "shards": run.shards is not None}
    return {"terms": terms, "gradients": gradients, **own}


def memory(tensor: torch.Tensor) -> int:
    """Bytes that a tensor holds on this rank."""
    return 0 if tensor.is_meta else tensor.untyped_storage().nbytes()


def as_rank(
    rank: int, ranks: int, out: Path, work: Callable[..., Any], kind: str, fields: dict[str, Any]
) -> None:
    store = f"file://{out / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    found = work(kind, **fields)
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


def over_ranks(
    ranks: int,
    out: Path,
    work: Callable[..., Any],
    kind: str,
    *,
    ends: Sequence[int] = (0,),
    **fields: Any,
) -> list[Any]:
    """What each rank comes to; `ends` is how their processes have to end."""
    out.mkdir()
    fields = {"strategy": "sharded", **fields}
    children = [start(as_rank, rank, ranks, out, work, kind, fields) for rank in range(ranks)]
    assert [wait(child) for child in children] == (list(ends) * ranks)[:ranks]
    files = [out / f"{rank}.pt" for rank in range(ranks)]
    return [torch.load(file, weights_only=True) for file in files if file.exists()]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "ranks", "fields"),
    [
        ("llava", 2, {"activation_checkpointing": "blocks"}),
        pytest.param("llava", 4, {"precision": "bfloat16"}, marks=SLOW),
        pytest.param("llava", 2, {"learns": "scales", "cross_entropy": 0.5}, marks=SLOW),
        pytest.param("qwen2_vl", 2, {}, marks=SLOW),
        pytest.param("qwen2_vl", 4, {"precision": "bfloat16"}, marks=SLOW),
        pytest.param("experts", 3, {}, marks=SLOW),
    ],
)
def test_loss_and_gradients_are_those_of_one_process(
    kind: str, ranks: int, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Five samples: ranks have different numbers of them, and of tokens."""
    expected = first_gradients(kind, **fields)
    found = over_ranks(ranks, tmp_path / "ranks", first_gradients, kind, **fields)
    assert len(found) == ranks
    for one in found:
        assert one["shards"] and not expected["shards"]
        # When the teacher came, the student had given away all that is in shards, ŵ among it.
        assert one["held"] == one["running"] == 0 < min(expected["held"], expected["running"])
        assert one["gradients"].keys() == expected["gradients"].keys()
        for name, value in expected["terms"].items():
            assert one["terms"][name] == pytest.approx(value, rel=1e-6), name
        # The last bit of a normaliser can decide how a number is rounded to bfloat16, by 2^-9.
        bound = 1e-3 if fields.get("precision") == "bfloat16" else 1e-6
        for name, grad in expected["gradients"].items():
            other = one["gradients"][name]
            if other.shape != grad.shape:  # of routed experts, which are one matrix in shards
                other = other.view(grad.shape)
            assert (other - grad).abs().max() <= bound * grad.abs().max(), name


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_auto_shards_what_does_not_fit(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Run:
        student, teacher = learner("llava"), learner("llava", teaches=True)
        batches = one_by_one(lambda numbers: collate(student.model, numbers))
        return Run(student, teacher, batches, SAMPLES, Training.model_validate(STEP), None, None)

    fits = run()
    assert fits.shards is None and not fits.said
    monkeypatch.setattr(sharding, "FOR_PARAMETERS", 1e-9)
    shards = run()
    assert shards.shards is not None
    assert "sharded over 1 processes: each would need 0.0 GB for the whole" in shards.said[0]
    learn = sum(one.nbytes for one in fits.originals.values())
    running = {id(one): one.nbytes for one in fits.running.program.graph_module.parameters()}
    for one in fits.originals.values():
        running.pop(id(one), None)
    assert fits.teacher is not None
    taught = sum(one.nbytes for one in fits.teacher.program.graph_module.parameters())
    needed = sharding.bytes_of_a_rank(fits.running.program, fits.originals, fits.teacher)
    assert needed == sum(running.values()) + 4 * learn + taught


@pytest.mark.slow
def test_routed_experts_go_on_with_either_strategy(one_rank: None, tmp_path: Path) -> None:
    """They are a matrix in shards, and in a checkpoint what the model has."""
    alone = {"distillation": {"kind": "none", "omega": 0}}
    held: dict[str, torch.Tensor] = {}
    for step, strategy in enumerate(("sharded", "ddp", "sharded")):
        rule = Training.model_validate({**STEP, **alone, "strategy": strategy, "steps": 3})
        student = learner("experts")
        batches = one_by_one(lambda numbers, of=student.model: collate(of, numbers))
        run = Run(student, None, batches, SAMPLES, rule, FINGERPRINT, tmp_path)
        if step:
            run.resume()
            found = state_of(run)
            assert run.step == step and found.keys() == held.keys()
            assert all(torch.equal(found[name], one) for name, one in held.items())
        run.take_step()
        run._keep(1.0 / run.step, run.step)
        run._save()
        held = state_of(run)
        assert max(one.dim() for one in held.values()) == 3


def state_of(run: Run) -> dict[str, torch.Tensor]:
    """What learns, its best state and its moments, as the student's model has them."""
    moments = optimizer_state(run.optimizer, run.parameters).tensors
    parts = (run.parameters, run.best, {n: one for n, one in moments.items() if "exp_avg" in n})
    wholes = [{name: whole(one).clone() for name, one in part.items()} for part in parts]
    if run.shards is not None:
        wholes = [run.shards.as_held(part) for part in wholes]
    return {f"{at} {name}": one for at, part in enumerate(wholes) for name, one in part.items()}


def test_a_rank_is_killed_and_the_others_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    """As many ranks come to the same codes and bits, one process to nearly the same."""
    whole_run = over_ranks(2, tmp_path / "whole", go, "llava")
    run = tmp_path / "run"
    ends = [1, signal.SIGKILL]
    over_ranks(2, tmp_path / "killed", go, "llava", ends=ends, directory=run, stop=2)
    assert latest_checkpoint(run) == run / "step-00000001"
    shutil.copytree(run, tmp_path / "copy")
    resumed = over_ranks(2, tmp_path / "resumed", go, "llava", directory=run)
    for one, other in zip(resumed, whole_run, strict=True):
        assert one["rows"] == other["rows"] and one["held_out"] == other["held_out"]
        for part in ("tensors", "codes"):
            assert one[part].keys() == other[part].keys() and one[part]
            assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    nearly(go("llava", directory=tmp_path / "copy"), whole_run[0])


def nearly(found: Any, expected: Any) -> None:
    """Within rounding of one another."""
    for row, one in zip(found["rows"], expected["rows"], strict=True):
        for name in ("ce", "distillation", "rcka", "grad_norm"):
            assert row[name] == pytest.approx(one[name], rel=1e-5), name
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in found["tensors"].items():
        other = expected["tensors"][name]
        assert tensor.shape == other.shape and tensor.dtype == other.dtype
        # AdamW divides a gradient by its size: a step is `lr` at most, whatever that is.
        assert (tensor.float() - other.float()).abs().max() <= 2e-2 * STEP["lr"], name
