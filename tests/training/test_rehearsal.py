"""What is counted on fake tensors, against real ones."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from gracec.capture import capture, family_of
from gracec.ir.program import Program
from gracec.passes import parse_pipeline, run_passes
from gracec.recipe import Training
from gracec.stages.pipelines import learning
from gracec.training.learner import Learner
from gracec.training.micro_batch import MicroBatch
from gracec.training.rehearsal import Rehearsal, Taught, rehearse, rehearse_teacher
from gracec.training.setup import allow_mixed_precision, objective_of, trainable
from tests.tiny_families import tiny_model

RULE = Training()
OBJECTIVE = objective_of(RULE, 2)


def learner(model: Any, program: Program | None = None) -> Learner:
    program = program or capture(model)
    analysed = run_passes(program, parse_pipeline("analyze-modality,plan-quantization")).program
    return Learner(run_passes(analysed, learning(RULE)).program, model)


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def pupil(request: pytest.FixtureRequest, llava: LlavaForConditionalGeneration) -> Learner:
    if request.param == "llava":
        return learner(llava, request.getfixturevalue("captured"))
    return learner(tiny_model(request.param))


def micro(pupil: Learner, rows: int) -> MicroBatch:
    family, model = family_of(pupil.model), pupil.model
    picture = family.example_images(model, 1, torch.Generator().manual_seed(0))
    pictures = {name: torch.cat([tensor] * rows) for name, tensor in picture.items()}
    batch = family.example_batch(model, batch=rows, images=rows, text=24, pictures=pictures)
    labels = batch["input_ids"].clone()
    labels[:, :-9] = -100
    return MicroBatch.read(pupil.model, {**batch, "labels": labels}, images=True)


def rehearsed(pupil: Learner, one: MicroBatch, **options: Any) -> tuple[Taught, Rehearsal]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    taught = rehearse_teacher(pupil, one, mode)
    learns = trainable(pupil.program, RULE.frozen)
    return taught, rehearse(pupil, taught, one, OBJECTIVE, learns, mode, **options)


class Kept:
    """Bytes of every storage that autograd keeps, but for those that were there before."""

    def __init__(self, known: list[Tensor]) -> None:
        self.known = {one.untyped_storage().data_ptr() for one in known}
        self.bytes: dict[int, int] = {}
        self.tensors: list[Tensor] = []  # so that no address is used twice

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.bytes[storage.data_ptr()] = storage.nbytes()
            self.tensors.append(tensor.detach())
        return tensor


def real_step(pupil: Learner, one: MicroBatch) -> tuple[Kept, Callable[[], None]]:
    """A real forward pass, and its backward pass."""
    parameters = trainable(pupil.program, RULE.frozen)
    for parameter in pupil.program.graph_module.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    values = pupil.inputs(one)
    # Not called as a module: what counts operations would look at each module that returns.
    graph = fx.Interpreter(pupil.program.graph_module)
    with torch.no_grad():
        taught = pupil.outputs(graph.run(*values.values()))
        normalisers = OBJECTIVE.normalisers(taught, one.targets)
    known = [*pupil.program.graph_module.parameters(), *pupil.program.graph_module.buffers()]
    known += [*values.values(), one.labels]
    kept = Kept(known)
    with saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        terms = OBJECTIVE.terms(pupil.outputs(graph.run(*values.values())), taught, one.targets)
        loss = OBJECTIVE.loss(terms, normalisers, 1.0, OBJECTIVE.omega_warmup)

    def backward() -> None:
        loss.backward()
        for parameter in parameters.values():
            parameter.grad = None
            parameter.requires_grad_(False)

    return kept, backward


def test_operations_and_saved_bytes_are_those_of_the_real_graph(pupil: Learner) -> None:
    """With attention as torch counts it: matmuls."""
    one = micro(pupil, 2)
    with sdpa_kernel(SDPBackend.MATH):
        taught, found = rehearsed(pupil, one)
        # torch's counter does not know the product that is added to a gradient in place.
        in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * math.prod(a) * b[1]}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            kept, backward = real_step(pupil, one)
            both = counter.get_total_flops()
            backward()
            backwards = counter.get_total_flops() - both
    # Attention of packed pictures is one operator, whose inside torch does not see: in 2 layers, in
    # 2 heads of 16, two products of each picture's 16 patches.
    packed = 0 if pupil.program.family == "llava" else 2 * 2 * 16 * 4 * 2 * 16**2
    assert taught.operations + found.forward == both + 2 * packed
    assert found.backward == backwards
    assert found.saved == pytest.approx(sum(kept.bytes.values()), rel=0.02)


def test_more_samples_take_more_and_blocks_again_take_less(pupil: Learner) -> None:
    sizes = {rows: rehearsed(pupil, micro(pupil, rows))[1] for rows in (1, 2, 4)}
    line = sizes[1].between(sizes[4], 1 / 3)
    for name in ("saved", "peak", "first", "kept", "computed_again"):
        assert getattr(sizes[1], name) < getattr(sizes[2], name) <= getattr(line, name)
    for found in sizes.values():
        assert found.kept < found.saved < found.peak
        assert found.computed_again < found.peak
        assert 0 < found.again < found.forward < found.backward
    assert sizes[2].forward == pytest.approx(2 * sizes[1].forward, rel=0.02)


def test_a_sample_keeps_less_in_bfloat16(pupil: Learner) -> None:
    narrow = Learner(allow_mixed_precision(pupil.program), pupil.model)
    kept: dict[bool, list[int]] = {False: [], True: []}
    for rows in (2, 4):
        one = micro(pupil, rows)
        for is_narrow, which in ((False, pupil), (True, narrow)):
            found = rehearsed(which, one, narrow=is_narrow)[1]
            kept[is_narrow].append(found.saved)
    wide, less = (after - before for before, after in kept.values())
    assert 0.4 * wide < less < 0.9 * wide
