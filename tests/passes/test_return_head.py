"""The head and its input as outputs: the loss of them is the loss of the logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gracec import ir
from gracec.capture import capture, family_of
from gracec.errors import PassError
from gracec.ir.program import Program, annotation
from gracec.objective import GraceObjective, LazyLogits, Outputs, Targets, supervised_positions
from gracec.passes import PassResult, parse_pipeline, run_passes
from gracec.passes.base import Pass
from gracec.passes.free_scales import FreeScales
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.plan_quantization import PlanQuantization
from gracec.passes.return_head import ReturnHead, following
from gracec.passes.select_supervised import INDEX
from gracec.recipe import Recipe
from gracec.training.learner import Learner
from gracec.training.setup import capacity, trainable
from tests.tiny import tiny_llava
from tests.tiny_experts import tiny_experts
from tests.tiny_families import tiny_model

Golden = Callable[..., None]
After = Callable[[str], Program]
aten = torch.ops.aten
SELECTED = "analyze-modality,insert-taps,select-supervised"
CAP = 0.25
"""Small beside the logits of a tiny model, so that it bends them."""


def test_golden(after: After, golden: Golden) -> None:
    before = "analyze-modality,select-supervised"
    text = ir.diff(after(before), after(f"{before},return-head"))
    golden("return-head/llava.txt", text + "\n", made_by=ReturnHead(), after=before)


SOFT_CAP = ((aten.div.Tensor, CAP), (aten.tanh.default,), (aten.mul.Tensor, CAP))


def tied() -> PreTrainedModel:
    return tiny_llava(tie=True, num_hidden_layers=1)


def untied() -> PreTrainedModel:
    return tiny_llava(num_hidden_layers=1)


def qwen2_vl() -> PreTrainedModel:
    return tiny_model("qwen2_vl")


def experts() -> PreTrainedModel:
    return tiny_experts("llava_mixtral", layers=1)


def biased() -> PreTrainedModel:
    model: Any = untied()
    bias = torch.randn(len(model.lm_head.weight), generator=torch.Generator().manual_seed(1))
    model.lm_head.bias = nn.Parameter(bias)
    return model  # type: ignore[no-any-return]


def capped(program: Program, *steps: tuple[Any, ...]) -> Program:
    """The program with further ops on its logits; by default a soft-cap of them."""
    program = program.copy()
    node = program.outputs["logits"]
    for op, *operands in steps or (
        (aten.div.Tensor, CAP),
        (aten.tanh.default,),
        (aten.mul.Tensor, CAP),
    ):
        with program.graph.inserting_after(node):
            new = program.graph.call_function(op, (node, *operands))
        new.meta["val"] = op(node.meta["val"], *operands)
        node = new
    program.set_outputs({**program.outputs, "logits": node})
    program.recompile()
    return program


QUANTIZED = Recipe.from_dict(
    {"name": "h", "weights": {"decoder": {"group_size": 32}, "head": {"bits": 8, "group_size": 32}}}
)
FAKE: list[Pass] = [PlanQuantization(QUANTIZED), InsertFakeQuant(2)]
CASES: dict[str, tuple[Callable[[], PreTrainedModel], list[Pass], bool]] = {
    "tied": (tied, [], False),
    "quantized": (untied, FAKE, False),
    "scales alone": (untied, [*FAKE, FreeScales()], False),
    "biased": (biased, FAKE, False),
    "soft-capped": (biased, [], True),
    "qwen2_vl": (qwen2_vl, FAKE, False),
    "experts": (experts, [], False),
}


@cache
def analysed(make: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, Program]:
    model = make()
    return model, run_passes(capture(model), parse_pipeline("analyze-modality")).program


def step(program: Program, model: PreTrainedModel, learns: str, **options: Any) -> Any:
    """Normalisers, loss and the gradients of all that learns, by name. It teaches itself, a bit
    mistaken."""
    family, learner = family_of(model), Learner(program, model)
    batch = family.example_batch(model, batch=3, images=3, text=9)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[family.image_index(model, batch)[0] >= 0] = -100
    index, wanted = supervised_positions(labels)
    taken = {**family.prepare(model, batch), INDEX: index}
    targets = Targets(wanted.clamp(max=99), *family.image_index(model, batch))
    objective = GraceObjective(omega_warmup=0, **options)
    learning = trainable(program, ["vision"], learns)
    for parameter in program.graph_module.parameters():
        parameter.requires_grad_(any(parameter is one for one in learning.values()))
    with torch.no_grad():
        said = learner.outputs(program(**taken))
        assert said.hidden is not None
        wrong = said.logits * 1.1 if isinstance(said.logits, Tensor) else _mistaken(said.logits)
        taught = Outputs(wrong, said.hidden.roll(1, 2))
        normalisers = objective.normalisers(taught, targets)
    terms = objective.terms(learner.outputs(program(**taken)), taught, targets)
    loss = objective.loss(terms, normalisers, 0.7, 1)
    found = torch.autograd.grad(loss, list(learning.values()))
    return normalisers, loss, dict(zip(learning, found, strict=True))


def _mistaken(logits: LazyLogits) -> LazyLogits:
    after = logits.after or (lambda x: x)
    return LazyLogits(logits.hidden, logits.weight, logits.bias, lambda x: after(x) * 1.1)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_whole_logits(case: str) -> None:
    make, passes, caps = CASES[case]
    model, program = analysed(make)
    taps = parse_pipeline("insert-taps{block=-1},select-supervised")
    whole = run_passes(program, [*passes, *taps]).program
    whole = capped(whole) if caps else whole
    result = ReturnHead().run(whole)
    assert result.program.output_names[:2] == ("head_input", "head")
    assert ("head_bias" in result.program.output_names) == (make is biased)
    learns = "scales" if case == "scales alone" else "all"
    assert trainable(result.program, [], learns).keys() == trainable(whole, [], learns).keys()
    for frozen in (["head"], ["decoder", "projector", "vision"]):
        assert trainable(whole, frozen).keys() == trainable(result.program, frozen).keys()
    if passes:
        assert capacity(result.program) == capacity(whole)
    for options in ({}, {"chunk_size": 5, "vocabulary": 100}):
        expected, loss, gradients = step(whole, model, learns, **options)
        normalisers, found, others = step(result.program, model, learns, **options)
        torch.testing.assert_close(normalisers, expected, rtol=1e-6 if options else 0, atol=0)
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            bound = 1e-6 * gradient.abs().max().item() + 1e-9  # that of a key's bias is zero
            torch.testing.assert_close(others[name], gradient, rtol=0, atol=bound, msg=name)


def test_it_survives_reexport_and_a_second_run(after: After, batch: dict[str, Tensor]) -> None:
    program = ReturnHead().run(capped(after(SELECTED))).program
    assert not ReturnHead().run(program).modified
    taken = {**batch, INDEX: torch.tensor([4, 9, 30])}
    again = program.reexport().module()
    for one, other in zip(again(**taken), program(**taken), strict=True):
        assert torch.equal(one, other)
    steps = [annotation(node).get("follows") for node in again.graph.nodes]  # type: ignore[union-attr]
    assert [["div", CAP], ["tanh"], ["mul", CAP]] in steps


def test_casts_and_scales_are_followed_exactly(after: After) -> None:
    steps = ((aten.to.dtype, torch.float64), (aten.mul.Tensor, 3.0), (aten._to_copy.default,))
    program = ReturnHead().run(capped(after(SELECTED), *steps)).program
    seen = following(program)
    assert seen is not None
    x = torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen(x), x.double() * 3) and seen(x).dtype == torch.float64
    assert following(ReturnHead().run(after(SELECTED)).program) is None


def test_what_is_no_function_of_one_logit_keeps_them_whole(after: After) -> None:
    program = capped(after(SELECTED), (aten.softmax.int, -1))
    result = ReturnHead().run(program)
    assert not result.modified and result.program.output_names == program.output_names
    assert result.notes == ("logits are computed as a whole: aten.softmax.int follows the head",)
    with pytest.raises(PassError, match="return-head: aten.softmax.int follows the head, so that"):
        ReturnHead(strict=True).run(program)


def test_refusals(captured: Program, after: After, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PassError, match="the head is unknown; run analyze-modality first"):
        ReturnHead().run(captured)

    def both(self: ReturnHead, program: Program) -> PassResult:
        program.set_outputs({**program.outputs, "head": program.outputs["logits"]})
        return PassResult(program, True)

    monkeypatch.setattr(ReturnHead, "apply", both)
    with pytest.raises(PassError, match="either the head is returned or the logits are"):
        ReturnHead().run(after(SELECTED))
