import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from gracec import ir
from gracec.capture import capture
from gracec.errors import GracecError, PassError
from gracec.ir.program import Program, annotation
from gracec.kernels import onnxruntime as kernel
from gracec.module import freeze_module, prepare_module
from gracec.passes import PassResult, parse_pipeline, run_passes
from gracec.passes.flatten_convolutions import FLAT_CONVOLUTION
from gracec.passes.freeze import DEQUANTIZE, QUANTIZE_DEQUANTIZE, Freeze, frozen_weights
from gracec.passes.lower_qdq import DEQUANTIZE_LINEAR, LowerQdq, lowered_weights
from gracec.passes.plan_quantization import PlanQuantization
from gracec.recipe import Recipe
from tests.frozen_graphs import (
    EDITS,
    Edit,
    X,
    convolution_graph,
    edited,
    frozen_graph,
    linear_graph,
    read_by_another,
)
from tests.goldens import ONE_BLOCK, TWO_BLOCKS
from tests.nets import conv_net
from tests.signed import fake_quantized_by_halves
from tests.tiny import tiny_llava

Golden = Callable[..., None]
After = Callable[[str], Program]
FROZEN = "analyze-modality,plan-quantization,insert-fake-quant,freeze"
OPS = ("qdq", "matmulnbits")


def pipeline(ops: str) -> str:
    return f"{FROZEN},lower-qdq{{ops={ops}}}"


@pytest.mark.parametrize("ops", OPS)
def test_golden(after_block: After, golden: Golden, ops: str) -> None:
    text = ir.diff(after_block(FROZEN), after_block(pipeline(ops))) + "\n"
    made_by = LowerQdq(ops)
    golden(f"lower-qdq/llava-{ops}.txt", text, made_by=made_by, after=FROZEN, model=ONE_BLOCK)


def test_convolutions(golden: Golden) -> None:
    rule = {"bits": 8, "granularity": "per_channel"}
    recipe = Recipe.from_dict({"name": "net", "weights": {"module": rule}})
    images = {"x": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    frozen = freeze_module(prepare_module(conv_net(), images, recipe))
    lowered = LowerQdq(strict=True).run(frozen).program
    golden(
        "lower-qdq/convnet-qdq.txt",
        ir.diff(frozen, lowered) + "\n",
        made_by=LowerQdq(strict=True),
        after="prepare_module with int8/channel weights, freeze_module",
        model="conv_net() of tests/nets.py",
    )
    torch.testing.assert_close(lowered(**images)[0], frozen(**images)[0])
    assert set(lowered_weights(lowered)) == {"head.weight"}
    grouped = Recipe.from_dict(
        {"name": "net", "weights": {"module": {"bits": 4, "group_size": 16}}}
    )
    lowered = LowerQdq().run(freeze_module(prepare_module(conv_net(), images, grouped))).program
    assert lowered_weights(lowered).keys() == {"head.weight"}


@pytest.mark.parametrize("ops", OPS)
def test_the_lowered_graph_computes_what_the_frozen_one_does(
    after: After, batch: dict[str, Tensor], ops: str
) -> None:
    expected, found = after(FROZEN)(**batch)[0], after(pipeline(ops))(**batch)[0]
    torch.testing.assert_close(found, expected)
    assert set(lowered_weights(after(pipeline(ops)))) == set(frozen_weights(after(FROZEN)))


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_negative_scales(after: After, batch: dict[str, Tensor], ops: str, bits: int) -> None:
    frozen = Freeze().run(fake_quantized_by_halves(after("analyze-modality"), bits=bits)).program
    lowered = LowerQdq(ops, strict=True).run(frozen).program
    assert lowered_weights(lowered).keys() == frozen_weights(frozen).keys()
    assert all((weight.scales < 0).any() for weight in lowered_weights(lowered).values())
    torch.testing.assert_close(lowered(**batch)[0], frozen(**batch)[0])


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_quantized_inputs(after: After, batch: dict[str, Tensor], recipe: str, ops: str) -> None:
    plan = f"analyze-modality,plan-quantization{{recipe={recipe}}},insert-observers"
    frozen = after(f"{plan},insert-fake-quant,freeze")
    lowered = LowerQdq(ops, strict=True).run(frozen).program
    assert not list(lowered.nodes(QUANTIZE_DEQUANTIZE))
    weights = lowered_weights(lowered)
    assert weights.keys() == frozen_weights(frozen).keys()
    kernels = {weight.kernel for weight in weights.values()}
    assert kernels == {kernel.MATMUL_INT8 if recipe == "w8a8" else kernel.MATMUL_NBITS}
    torch.testing.assert_close(lowered(**batch)[0], frozen(**batch)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_golden_of_quantized_inputs(
    after: After, after_block: After, golden: Golden, recipe: str, ops: str
) -> None:
    start, model = (after, TWO_BLOCKS) if recipe == "w8a8" else (after_block, ONE_BLOCK)
    plan = f"analyze-modality,plan-quantization{{recipe={recipe}}},insert-observers"
    before, made_by = f"{plan},insert-fake-quant,freeze", LowerQdq(ops, strict=True)
    frozen = start(before)
    text = ir.diff(frozen, made_by.run(frozen).program) + "\n"
    name = f"lower-qdq/llava-{recipe}-{ops}.txt"
    golden(name, text, made_by=made_by, after=before, model=model)


def test_inputs_that_the_kernels_do_not_take(after: After) -> None:
    for rule, reason in (({"bits": 4}, "int4/tensor"), ({"granularity": "per_channel"}, "channel")):
        recipe = Recipe.from_dict(
            {
                "name": "test",
                "weights": {"projector": {"bits": 7, "granularity": "per_channel"}},
                "activations": {"projector": rule},
            }
        )
        planned = PlanQuantization(recipe=recipe).run(after("analyze-modality")).program
        observed = run_passes(planned, parse_pipeline("insert-observers,insert-fake-quant,freeze"))
        with pytest.raises(PassError, match=f"the kernels take inputs in int8/tensor.*{reason}"):
            LowerQdq(strict=True).run(observed.program)


@pytest.mark.parametrize("ops", OPS)
def test_idempotent(after: After, ops: str) -> None:
    assert not LowerQdq(ops).run(after(pipeline(ops))).modified


def test_a_bias_is_added_after(batch: dict[str, Tensor]) -> None:
    recipe = Recipe.from_dict({"name": "v", "weights": {"vision": {"group_size": 32}}})
    program = _frozen(recipe)
    for ops in OPS:
        lowered = LowerQdq(ops).run(program).program
        assert len(lowered_weights(lowered)) == len(frozen_weights(program)) > 0
        torch.testing.assert_close(lowered(**batch)[0], program(**batch)[0])


def test_a_weight_that_the_kernel_does_not_take_runs_dense_and_is_named(
    after: After, batch: dict[str, Tensor]
) -> None:
    model = tiny_llava(intermediate_size=72)
    rule = {"bits": 4, "granularity": "per_channel"}
    program = _frozen(Recipe.from_dict({"name": "c", "weights": {"decoder": rule}}), model)
    result = LowerQdq().run(program)
    dense = [note for note in result.notes if "runs dense: the kernel takes blocks of 16" in note]
    assert len(dense) == 2
    assert all("down_proj" in note for note in dense)
    torch.testing.assert_close(result.program(**batch)[0], program(**batch)[0])
    with pytest.raises(PassError, match="a scale has 72 features; change the recipe"):
        LowerQdq(strict=True).run(program)


def test_two_linears_of_one_weight_share_nothing(after: After, batch: dict[str, Tensor]) -> None:
    program = after(FROZEN).copy()
    dequantized = next(node for node in program.graph.nodes if "dequantize" in str(node.target))
    (linear,) = dequantized.users
    with program.graph.inserting_before(linear):
        twin = program.graph.node_copy(linear)
        total = program.graph.call_function(torch.ops.aten.add.Tensor, (linear, twin))
    total.meta = dict(linear.meta)
    linear.append(total)
    linear.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    program.recompile()
    lowered = LowerQdq().run(program).program
    assert len(lowered_weights(lowered)) == 15
    operands = [node.args[0] for node in lowered.nodes(DEQUANTIZE_LINEAR)]
    assert len(set(operands)) == 15
    torch.testing.assert_close(lowered(**batch)[0], program(**batch)[0])


def test_it_needs_codes_in_float32(captured: Program, after: After) -> None:
    with pytest.raises(PassError, match="run freeze first"):
        LowerQdq().run(captured)
    program = after(FROZEN).copy()
    program.dtype = torch.bfloat16
    with pytest.raises(PassError, match="computes in torch.bfloat16; capture in float32"):
        LowerQdq().run(program)


def test_unknown_options(after: After) -> None:
    with pytest.raises(GracecError, match="unknown ops 'int4'; use qdq or matmulnbits"):
        LowerQdq("int4").run(after(FROZEN))
    with pytest.raises(GracecError, match="unknown mode 'exact'; use faithful or fast"):
        LowerQdq(mode="exact").run(after(FROZEN))


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize(("edit", "reason"), EDITS)
def test_codes_that_something_else_reads(edit: Edit, reason: str, ops: str) -> None:
    # Each reader has codes of its own, so the linear runs on the kernel beside another reader.
    runs_dense(edited(edit), reason, ops, kept=int(edit is read_by_another))


@pytest.mark.parametrize("ops", OPS)
def test_a_scale_of_no_block(ops: str) -> None:
    torch.manual_seed(0)
    program = frozen_graph(nn.Linear(20, 8), X[:, :20], bits=4, granularity="per_channel")
    runs_dense(program, "the kernel takes blocks of 16, a scale has 20 features", ops)


def test_filters_whose_scales_are_of_no_block() -> None:
    program = regrouped(convolution_graph(bits=4, granularity="per_channel"), groups=3)
    reason = "a scale has 12 features, which is neither a filter nor a block"
    lowered = runs_dense(program, reason, "qdq")
    (convolution,) = lowered.nodes(torch.ops.aten.conv2d.default)
    assert not list(lowered.nodes(FLAT_CONVOLUTION))
    assert annotation(convolution)["kernel"] == "dense"


def regrouped(program: Program, groups: int) -> Program:
    """A copy in which each row of codes has several scales."""
    copied = program.copy()
    (node,) = copied.nodes(DEQUANTIZE)
    codes, scales, width, dtype = node.args
    assert isinstance(scales, fx.Node) and isinstance(width, int)
    tensor = copied.tensor(str(scales.target))
    wide = tensor.repeat(1, groups) * torch.linspace(0.5, 1, groups)
    copied.set_tensor(str(scales.target), wide)
    scales.meta["val"] = scales.meta["val"].new_empty(wide.shape)
    node.args = (codes, scales, width // groups, dtype)
    copied.recompile()
    return copied


def runs_dense(program: Program, reason: str, ops: str, *, kept: int = 0) -> Program:
    """One reader runs dense for a reason, with the same values, and not at all if strict."""
    before = ir.format(program)
    result = LowerQdq(ops).run(program)
    assert result.notes == (f"weight runs dense: {reason}", f"{kept} weights run on INT4 kernels")
    assert not LowerQdq(ops).run(result.program).modified
    inputs = program.example_inputs
    torch.testing.assert_close(result.program(**inputs)[0], program(**inputs)[0])
    assert len(lowered_weights(result.program)) == kept and ir.format(program) == before
    with pytest.raises(PassError, match=re.escape(reason)):
        LowerQdq(ops, strict=True).run(program)
    return result.program


def _frozen(recipe: Recipe, model: torch.nn.Module | None = None) -> Program:
    captured = capture(model or tiny_llava())  # type: ignore[arg-type]
    analyzed = run_passes(captured, parse_pipeline("analyze-modality")).program
    planned = PlanQuantization(recipe=recipe).run(analyzed).program
    return run_passes(planned, parse_pipeline("insert-fake-quant,freeze")).program


def test_codes_that_are_left_or_shared_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = LowerQdq().run(linear_graph()).program
    monkeypatch.setattr(LowerQdq, "apply", lambda self, program: PassResult(program, False))
    with pytest.raises(PassError, match="lower-qdq: a dequantize node is left"):
        LowerQdq().run(linear_graph())
    (node,) = lowered.nodes(DEQUANTIZE_LINEAR)
    with lowered.graph.inserting_after(node):
        lowered.graph.node_copy(node)
    with pytest.raises(PassError, match="two nodes share codes or scales"):
        LowerQdq().run(lowered)
