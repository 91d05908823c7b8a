from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gracec import ir, quant
from gracec.capture import capture
from gracec.errors import PassError
from gracec.ir.program import Program
from gracec.passes import PassResult, parse_pipeline, run_passes
from gracec.passes.insert_fake_quant import (
    FAKE_QUANTIZE,
    InsertFakeQuant,
    fake_quantized,
    signs_of_scales,
)
from gracec.passes.plan_quantization import PlanQuantization, plan_of
from gracec.training.setup import trainable
from tests.goldens import ONE_BLOCK
from tests.signed import fake_quantized_by_halves, signed_recipe
from tests.tiny import tiny_llava

Golden = Callable[..., None]
After = Callable[[str], Program]
PLAN = "analyze-modality,plan-quantization"
PIPELINE = f"{PLAN},insert-fake-quant"


def test_golden(after_block: After, golden: Golden) -> None:
    text = ir.diff(after_block(PLAN), after_block(PIPELINE)) + "\n"
    made_by = InsertFakeQuant()
    golden("insert-fake-quant/llava.txt", text, made_by=made_by, after=PLAN, model=ONE_BLOCK)


def test_golden_of_signed_scales(after_block: After, golden: Golden) -> None:
    plan = PlanQuantization(recipe=signed_recipe())
    planned = plan.run(after_block("analyze-modality")).program
    made_by = InsertFakeQuant()
    golden(
        "insert-fake-quant/llava-signed.txt",
        ir.diff(planned, made_by.run(planned).program) + "\n",
        made_by=made_by,
        after="analyze-modality,plan-quantization with int4/g32/signed weights",
        model=ONE_BLOCK,
    )


def test_signs_are_buffers_that_are_not_trained(after: After, batch: dict[str, Tensor]) -> None:
    program = fake_quantized_by_halves(after("analyze-modality"))
    signs = signs_of_scales(program)
    assert signs.keys() == {f"{fqn}_scale_sign" for fqn in plan_of(program).quantized}
    unsigned = "analyze-modality,plan-quantization{recipe=w8a16},insert-fake-quant"
    assert signs_of_scales(after(unsigned)) == {}
    for fake in fake_quantized(program):
        sign = signs[f"{fake.scale_fqn}_sign"]
        assert sign.dtype == torch.int8 and not isinstance(sign, nn.Parameter)
        assert torch.equal(fake.scales.sign(), sign)
        assert (sign < 0).sum() == sign.numel() // 2
    learnt = trainable(program, frozen=[])
    assert not [name for name in learnt if name.endswith("_sign")]
    assert {name for name in learnt if name.endswith("_scale")} == {
        name.removesuffix("_sign") for name in signs
    }
    program(**batch)[0].square().mean().backward()
    for fake in fake_quantized(program):
        gradient = learnt[fake.scale_fqn].grad
        assert gradient is not None and gradient.abs().sum() > 0
        learnt[fake.scale_fqn].grad = None


@pytest.mark.parametrize("parametrization", ["log", "lsq"])
def test_a_program_with_signed_scales_is_saved_and_read(
    after: After, batch: dict[str, Tensor], tmp_path: Path, parametrization: str
) -> None:
    program = fake_quantized_by_halves(after("analyze-modality"), parametrization=parametrization)
    program.save(tmp_path / "program.pt2")
    found = Program.load(tmp_path / "program.pt2")
    assert torch.equal(found(**batch)[0], program(**batch)[0])
    for one, other in zip(fake_quantized(program), fake_quantized(found), strict=True):
        assert one.fqn == other.fqn and torch.equal(one.scales, other.scales)


def test_the_graph_computes_with_the_quantized_weights(
    after: After, batch: dict[str, Tensor]
) -> None:
    program = after(PLAN).copy()
    for node in program.graph.find_nodes(op="get_attr"):
        spec = plan_of(program).quantized.get(program.fqn(str(node.target)))
        if spec is not None:
            weight = program.tensor(str(node.target)).detach()
            scales = quant.search_scales(weight, spec.bits, spec.group_size, signed=spec.signed)
            codes = quant.quantize(weight, scales, spec.bits, spec.group_size)
            restored = quant.dequantize(codes, scales, spec.group_size)
            program.set_tensor(str(node.target), nn.Parameter(restored))
    assert torch.equal(after(PIPELINE)(**batch)[0], program(**batch)[0])


def test_idempotent(after: After) -> None:
    again = InsertFakeQuant().run(after(PIPELINE))
    assert not again.modified
    assert ir.diff(after(PIPELINE), again.program) == ""


def test_it_needs_a_plan(after: After) -> None:
    with pytest.raises(PassError, match="run plan-quantization first"):
        InsertFakeQuant().run(after("analyze-modality"))


def test_scales_are_parameters_beside_their_weights_and_get_gradients(
    after: After, batch: dict[str, Tensor]
) -> None:
    program = after(PIPELINE)
    names = {program.fqn(target) for target in program.fqns if target.endswith("_scale")}
    assert names == {f"{fqn}_scale" for fqn in plan_of(program).quantized}
    program(**batch)[0].square().mean().backward()
    for target in program.fqns:
        if target.endswith("_scale"):
            scale = program.tensor(target)
            assert isinstance(scale, nn.Parameter)
            assert scale.grad is not None
            assert scale.grad.abs().sum() > 0
            scale.grad = None


def test_fake_quant_stands_right_before_its_linear_and_survives_reexport(after: After) -> None:
    program = after(PIPELINE)
    nodes = list(program.graph.nodes)
    for number, node in enumerate(nodes):
        if node.target == FAKE_QUANTIZE:
            assert nodes[number + 1].args[1] is node
    count = sum(node.target == FAKE_QUANTIZE for node in program.reexport().graph.nodes)
    assert count == len(plan_of(program).quantized)


def test_weights_that_are_not_finite_are_named() -> None:
    model = tiny_llava()
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(PassError, match=r"layers\.1\.mlp\.up_proj\.weight.*NaN or infinity"):
        run_passes(capture(model), parse_pipeline(PIPELINE))


def test_a_planned_weight_that_is_left_is_an_error(
    after: After, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InsertFakeQuant, "apply", lambda self, program: PassResult(program, False))
    with pytest.raises(PassError, match="is planned but not fake-quantized"):
        InsertFakeQuant().run(after(PLAN))
