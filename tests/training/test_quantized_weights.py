"""Quantizing once a step is quantizing in the graph: the same loss, the same gradients."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gracec.capture import capture
from gracec.ir.program import Program
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.plan_quantization import PlanQuantization
from gracec.quant.ops import fake_quantize_gradients
from gracec.recipe import Recipe
from gracec.training.quantized_weights import QuantizedWeights
from gracec.training.setup import allow_mixed_precision, trainable
from tests.signed import with_halves_negative
from tests.tiny_experts import tiny_experts
from tests.tiny_families import tiny_model

FAKE = "analyze-modality,plan-quantization,insert-fake-quant{candidates=4}"
Run = Callable[[], Tensor]


def prepared(kind: str) -> Program:
    """A graph with fake-quantized weights of which everything but the tower learns."""
    if kind == "lsq":
        rule = {"bits": 3, "granularity": "per_tensor", "parametrization": "lsq", "signed": True}
        recipe = Recipe.from_dict({"name": kind, "weights": {"decoder": rule}})
        captured = run_passes(capture(tiny_model("llava")), parse_pipeline("analyze-modality"))
        passes = [PlanQuantization(recipe), InsertFakeQuant(candidates=4)]
        return with_halves_negative(run_passes(captured.program, passes).program)
    model: PreTrainedModel
    model = tiny_experts("llava_mixtral") if kind == "experts" else tiny_model(kind.split()[0])
    pipeline = f"{FAKE},free-scales" if kind.endswith("scales") else FAKE
    return run_passes(capture(model), parse_pipeline(pipeline)).program


def loss_of(outputs: Sequence[Tensor], part: int) -> Tensor:
    """Something that depends on half of the logits, another half for each micro-batch."""
    return outputs[0][..., part::2].square().mean()


@pytest.mark.parametrize("kind", ["llava", "llava scales", "qwen2_vl", "experts", "lsq"])
def test_loss_and_gradients_are_those_of_the_graph_that_quantizes(kind: str) -> None:
    program = prepared(kind)
    parameters = trainable(program, ["vision"], "scales" if kind.endswith("scales") else "all")
    for parameter in program.graph_module.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    def gradients(run: Callable[[int], Tensor], parts: int, after: Callable[[], None]) -> list:
        for parameter in parameters.values():
            parameter.grad = None
        losses = [run(part) for part in range(parts)]
        for loss in losses:
            loss.backward()
        after()
        found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        return [[loss.item() for loss in losses], found]

    inputs = program.example_inputs
    quantized = QuantizedWeights(program)
    quantized.materialize()
    quantized.require_gradients()
    with torch.no_grad():  # as an optimizer step would
        for parameter in parameters.values():
            parameter += 0.01 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    quantized.refresh()
    for parts, at_once in ((1, False), (2, False), (2, True)):
        quantized.require_gradients(at_once=at_once)
        expected = gradients(lambda part: loss_of(program(**inputs), part), parts, lambda: None)
        found = gradients(
            lambda part: loss_of(quantized.program(**inputs), part),
            parts,
            (lambda: None) if at_once and kind.endswith("scales") else quantized.hand_on_gradients,
        )
        assert found[0] == expected[0]
        assert found[1].keys() == expected[1].keys() and len(found[1]) > 10
        for name, grad in found[1].items():
            if parts == 1:
                assert torch.equal(grad, expected[1][name]), name
            # A scale of a whole weight is a sum of thousands that nearly cancel.
            bound = (5e-5 if kind == "lsq" else 2e-6) * expected[1][name].abs().max()
            assert (grad - expected[1][name]).abs().max() <= bound, name
        assert all(weight.held.grad is None for weight in quantized)


@pytest.mark.parametrize("kind", ["llava", "experts", "llava scales"])
def test_weights_in_bfloat16_are_what_autocast_makes_of_them(kind: str) -> None:
    found = []
    for narrow in (False, True):
        program = prepared(kind)
        learns = trainable(program, ["vision"], "scales" if kind.endswith("scales") else "all")
        for parameter in program.graph_module.parameters():
            parameter.requires_grad_(any(parameter is one for one in learns.values()))
        quantized = QuantizedWeights(program)
        quantized.materialize(narrow=narrow)
        quantized.require_gradients(at_once=True)
        quantized.refresh()
        running, losses = allow_mixed_precision(quantized.program), []
        for part in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = running(**program.example_inputs)
            losses.append(loss_of([one.float() for one in outputs], part))
            losses[-1].backward()
        quantized.hand_on_gradients()
        found.append([*losses, *(one.grad for one in learns.values())])
        dtypes = {weight.held.dtype for weight in quantized}
        assert torch.bfloat16 in dtypes if narrow else dtypes == {torch.float32}
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_some_rows_of_a_weight_have_their_part_of_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(2, 6, 64, generator=generator).unbind()
    halves = slice(0, 4), slice(4, 6)
    for parametrization, shape in (("log", (6, 2)), ("lsq", (6, 2)), ("log", (1, 1))):
        group_size = 32 if shape == (6, 2) else 64
        param = torch.rand(shape, generator=generator) - 1.5
        options = (3, group_size, parametrization, "bf16")

        def part(rows: slice, param: Tensor = param, options: tuple = options) -> tuple:
            own = param if len(param) == 1 else param[rows]
            out = torch.empty_like(weight[rows])
            return fake_quantize_gradients(
                weight[rows], own, None, grad[rows], *options, out=out, rows=6
            )

        of_weight, of_scale = part(slice(0, 6))
        parts = [part(rows) for rows in halves]
        assert torch.equal(torch.cat([one for one, _ in parts]), of_weight)
        if len(param) == 1:
            torch.testing.assert_close(sum(one for _, one in parts), of_scale)
        else:
            assert torch.equal(torch.cat([one for _, one in parts]), of_scale)


def test_the_gradient_may_be_written_where_it_came_from() -> None:
    weight, grad = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).unbind()
    param, options = torch.full((8, 2), -1.5), (4, 32, "log", "fp32")
    apart = fake_quantize_gradients(
        weight, param, None, grad.clone(), *options, out=torch.empty_like(weight)
    )
    inside = fake_quantize_gradients(weight, param, None, grad, *options, out=grad)
    assert inside[0] is grad
    assert all(torch.equal(one, other) for one, other in zip(apart, inside, strict=True))
    assert bool((grad == 0).any())  # what was clipped


def test_a_graph_that_quantizes_nothing_runs_as_it_is() -> None:
    program = run_passes(capture(tiny_model("llava")), parse_pipeline("analyze-modality")).program
    quantized = QuantizedWeights(program)
    quantized.materialize()
    assert quantized.program is program and not list(quantized)
    assert any(isinstance(one, nn.Parameter) for one in program.graph_module.parameters())
