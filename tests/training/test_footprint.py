"""What is counted, against the tensors of a training that has taken a step."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from gracec.ir.program import Program
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.plan_quantization import PlanQuantization, plan_of
from gracec.recipe import Recipe
from gracec.training.footprint import Footprint
from gracec.training.learner import Learner
from gracec.training.loader import one_by_one
from gracec.training.loop import Run
from tests.training.test_loop import ALONE, SAMPLES, collate, rule, with_own_tensors


def total(tensors: Iterable[Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


@pytest.mark.parametrize("frozen", [["vision"], ["vision", "projector", "head"]])
def test_masters_moments_gradients_and_the_best_state_are_as_counted(
    captured: Program, llava: LlavaForConditionalGeneration, frozen: list[str]
) -> None:
    options = rule(distillation=ALONE, frozen=frozen)
    recipe = Recipe.from_dict({"name": "one", "weights": {"decoder": {"group_size": 16}}})
    analysed = run_passes(captured, parse_pipeline("analyze-modality")).program
    planned = run_passes(analysed, [PlanQuantization(recipe=recipe)]).program
    taps = parse_pipeline("select-supervised")
    found = Footprint.of(llava, run_passes(planned, taps).program, plan_of(planned), options)

    pipeline = parse_pipeline("insert-fake-quant{candidates=1},select-supervised")
    student = Learner(with_own_tensors(run_passes(planned, pipeline).program), llava)
    run = Run(student, None, one_by_one(collate), SAMPLES, options, None, None)
    run.take_step()
    run._keep(1.0, 1)
    masters = {name: one for name, one in run.parameters.items() if "_scale" not in name}
    scales = {name: one for name, one in run.parameters.items() if "_scale" in name}
    assert masters.keys() == found.learning
    assert 4 * found.masters == total(masters.values())
    assert 4 * found.scales == total(scales.values()) > 0
    assert 4 * found.learned == total(run.best.values())
    gradients = [one.grad for one in run.parameters.values() if one.grad is not None]
    assert 4 * found.learned == total(gradients)
    states = run.optimizer.state.values()
    assert 8 * found.learned == total(s[key] for s in states for key in ("exp_avg", "exp_avg_sq"))
    assert found.masters == found.with_gradient + found.plain
    assert found.masters + found.others == llava.num_parameters()  # all scales learn
    in_blocks = 2 * (found.block.quantized + found.block.plain + found.block.still)
    assert found.block.quantized == found.held // 2
    everything = sum(vars(found.root).values()) + in_blocks
    used = {name for names in captured.fqns.values() for name in names[:1]}
    sizes = {name: p.numel() for name, p in llava.named_parameters() if name in used}
    assert everything == sum(sizes.values())


def test_scales_alone_keep_codes_and_few_moments(
    captured: Program, llava: LlavaForConditionalGeneration
) -> None:
    options = rule(distillation=ALONE, learns="scales")
    recipe = Recipe.from_dict({"name": "one", "weights": {"decoder": {"group_size": 16}}})
    analysed = run_passes(captured, parse_pipeline("analyze-modality")).program
    planned = run_passes(analysed, [PlanQuantization(recipe=recipe)]).program
    found = Footprint.of(llava, planned, plan_of(planned), options)
    assert (found.masters, found.plain) == (0, 0)
    assert found.learned == found.scales == found.held // 16
    assert found.codes == sum(e.planned_bytes for e in plan_of(planned).entries if e.spec)
    assert torch.float32.itemsize * found.others == total(llava.parameters())
