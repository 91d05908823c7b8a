"""What each pass does to a block with routed experts."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from gracec import ir
from gracec.capture import capture
from gracec.ir.program import Program, annotation
from gracec.ir.queries import EXPERT_LINEAR, attends, chooses_experts
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.apply_codes import ApplyCodes
from gracec.passes.contract import check_contract
from gracec.passes.freeze import frozen_weights
from gracec.passes.plan_quantization import PlanQuantization, plan_of
from gracec.quant.frozen import code_hash
from gracec.recipe import Recipe
from tests.tiny_experts import tiny_experts

Golden = Callable[..., None]
MODEL = 'tiny_experts("llava_mixtral", layers=1) of tests/tiny_experts.py'
PASSES = (
    "analyze-modality",
    "plan-quantization",
    "insert-fake-quant",
    "freeze",
    "lower-torchao",
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_experts("llava_mixtral", layers=1)


@pytest.fixture(scope="module")
def after(model: PreTrainedModel) -> dict[str, Program]:
    """Pipeline -> program, from no pass to all of them."""
    programs = {"": capture(model)}
    for number, name in enumerate(PASSES):
        before = ",".join(PASSES[:number])
        result = run_passes(programs[before], parse_pipeline(name))
        programs[",".join(PASSES[: number + 1])] = result.program
    return programs


@pytest.mark.parametrize("number", range(len(PASSES)), ids=PASSES)
def test_golden(after: dict[str, Program], golden: Golden, number: int) -> None:
    before, name = ",".join(PASSES[:number]), PASSES[number]
    found = ir.diff(after[before], after[",".join(PASSES[: number + 1])])
    (made_by,) = parse_pipeline(name)
    golden(f"{name}/llava-mixtral.txt", found + "\n", made_by=made_by, after=before, model=MODEL)


def test_golden_of_lowering_to_onnx(after: dict[str, Program], golden: Golden) -> None:
    before = ",".join(PASSES[:-1])
    (made_by,) = parse_pipeline("lower-qdq")
    found = ir.diff(after[before], run_passes(after[before], [made_by]).program)
    golden("lower-qdq/llava-mixtral.txt", found + "\n", made_by=made_by, after=before, model=MODEL)
    check_contract(made_by, after[before])


@pytest.mark.parametrize("number", range(len(PASSES)), ids=PASSES)
def test_contract(after: dict[str, Program], number: int) -> None:
    (item,) = parse_pipeline(PASSES[number])
    check_contract(item, after[",".join(PASSES[:number])])


def test_codes_go_into_another_capture(after: dict[str, Program], model: PreTrainedModel) -> None:
    frozen = after[",".join(PASSES[:4])]
    weights = frozen_weights(frozen)
    program = capture(model)
    check_contract(ApplyCodes(weights), program)
    again = run_passes(program, [ApplyCodes(weights)]).program
    found = frozen_weights(again)
    assert {fqn: code_hash(w) for fqn, w in found.items()} == {
        fqn: code_hash(w) for fqn, w in weights.items()
    }
    inputs = frozen.example_inputs
    assert torch.equal(again(**inputs)[0], frozen(**inputs)[0])


def test_the_softmax_of_a_router_is_no_attention(after: dict[str, Program]) -> None:
    graph = after[""].graph
    softmax = [node for node in graph.nodes if "softmax" in str(node.target)]
    assert len(softmax) == 1 and not attends(softmax[0])
    assert len(chooses_experts(graph)) == 1


def test_an_attention_that_is_written_out_is_one() -> None:
    """The tower and the decoder of a model whose attention is no fused operator."""
    model = tiny_experts("llava_mixtral", layers=1)
    model.set_attn_implementation("eager")
    program = run_passes(capture(model), parse_pipeline("analyze-modality")).program
    softmax = [node for node in program.graph.nodes if "softmax" in str(node.target)]
    assert [attends(node) for node in softmax] == [True, True, True, False]
    assert len(list(program.nodes(role="block_output"))) == 1


def test_a_recipe_may_keep_experts(after: dict[str, Program]) -> None:
    recipe = Recipe.from_dict({"name": "test", "weights": {"projector": {"group_size": 32}}})
    program = PlanQuantization(recipe=recipe).run(after["analyze-modality"]).program
    kept = {e.fqn: e for e in plan_of(program).entries if ".experts." in e.fqn}
    assert {entry.reason for entry in kept.values()} == {"decoder: kept by recipe test"}
    assert {entry.shape for entry in kept.values()} == {(4, 256, 64), (4, 64, 128)}
    assert not [n for n in program.nodes(EXPERT_LINEAR) if "experts" in annotation(n)]


def test_the_bytes_of_experts_add_up(after: dict[str, Program]) -> None:
    plan = plan_of(after["analyze-modality,plan-quantization"])
    (up,) = [entry for entry in plan.entries if entry.fqn.endswith("gate_up_proj")]
    assert up.shape == (4 * 256, 64) and up.source_bytes == 4 * 256 * 64 * 4
    assert up.planned_bytes == 4 * 256 * 64 // 2 + 4 * 256 * 2
