from collections.abc import Callable

import pytest
import torch

from gracec.errors import GracecError
from gracec.ir.program import Program
from gracec.objective import DualAscentController, EpochLagrangianController, FixedController
from gracec.recipe import Training
from gracec.training.setup import (
    capacity,
    controller_of,
    in_fixed_order,
    objective_of,
    parameter_groups,
    precision_of,
    rate,
    trainable,
)

After = Callable[[str], Program]
FAKE = "analyze-modality,plan-quantization,insert-fake-quant{candidates=8}"


def test_all_but_frozen_parts_learn(after: After) -> None:
    program = after(FAKE)
    decoder = trainable(program, ["vision", "projector"])
    assert all(name.startswith(("model.language_model.", "lm_head.")) for name in decoder)
    assert "model.language_model.layers.0.mlp.up_proj.weight_scale" in decoder
    assert "model.language_model.norm.weight" in decoder
    projector = trainable(program, ["vision"]).keys() - decoder.keys()
    assert projector and all(name.startswith("model.multi_modal_projector.") for name in projector)
    vision = trainable(program, []).keys() - trainable(program, ["vision"]).keys()
    assert vision and all(name.startswith("model.vision_tower.") for name in vision)


def test_scales_and_vectors_have_no_weight_decay(after: After) -> None:
    program = after(FAKE)
    parameters = trainable(program, ["vision"])
    rule = Training(lr=1.0, scale_lr=2.0, weight_decay=0.5)
    groups = parameter_groups(program, parameters, rule)
    names = {id(parameter): name for name, parameter in parameters.items()}
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    for group in groups:
        for parameter in group["params"]:
            scale = names[id(parameter)].endswith("_scale")
            assert group["lr"] == (2.0 if scale else 1.0)
            assert group["weight_decay"] == (0.5 if parameter.dim() > 1 and not scale else 0.0)


def test_scales_of_inputs_learn_as_scales_do(after: After) -> None:
    plan = "analyze-modality,plan-quantization{recipe=w8a8},insert-observers"
    program = after(f"{plan},insert-fake-quant{{candidates=8}}")
    parameters = trainable(program, ["vision"])
    found = {name for name in parameters if name.endswith("input_scale")}
    assert found == {
        f"model.multi_modal_projector.linear_{number}.input_scale" for number in (1, 2)
    }
    rule = Training(lr=1.0, scale_lr=2.0)
    groups = parameter_groups(program, parameters, rule)
    of = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {of[id(parameters[name])] for name in found} == {2.0}


def test_the_rate_rises_falls_and_never_stands_still_at_zero() -> None:
    found = [rate(step, 100, 0.1) for step in range(100)]
    assert found[0] == pytest.approx(0.1)
    assert max(found) == found[9] == 1.0
    assert found[9:] == sorted(found[9:], reverse=True)
    assert 0 < found[-1] < 0.001
    assert rate(0, 1, 0.0) == 1.0


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, DualAscentController),
        ({"controller": "epoch-lagrangian", "eta": 0.1}, EpochLagrangianController),
        ({"controller": "fixed", "beta": 0.2}, FixedController),
        ({"kind": "none", "omega": 0}, FixedController),
    ],
)
def test_the_controller_is_that_of_the_recipe(fields: dict[str, object], kind: type) -> None:
    rule = Training.model_validate({"distillation": fields})
    assert isinstance(controller_of(rule, 100), kind)


def test_a_short_run_warms_omega_up_in_half_of_it() -> None:
    assert objective_of(Training(), 10_000).omega_warmup == 400
    assert objective_of(Training(), 100).omega_warmup == 50


def test_capacity_is_high_for_spread_codes_and_one_without_any(after: After) -> None:
    assert 0.6 < capacity(after(FAKE)) < 1
    assert capacity(after("analyze-modality")) == 1.0


def test_scales_alone_learn_where_the_recipe_says_so(after: After) -> None:
    for text in (FAKE, f"{FAKE},free-scales"):
        program = after(text)
        found = trainable(program, ["vision"], "scales")
        assert len(found) == 14 and all(name.endswith(".weight_scale") for name in found)
        groups = parameter_groups(program, found, Training(lr=1.0, scale_lr=2.0))
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(2.0, 0.0)]
        assert not trainable(program, ["vision", "decoder"], "scales")
    freed = after(f"{FAKE},free-scales")
    learn = trainable(freed, ["vision"])
    assert "model.language_model.norm.weight" in learn and found.keys() < learn.keys()


def test_capacity_counts_codes_whose_scales_learn(after: After) -> None:
    assert capacity(after(f"{FAKE},free-scales")) == capacity(after(FAKE))


@pytest.mark.parametrize(
    ("capability", "auto"), [((9, 0), torch.bfloat16), ((7, 5), torch.float32)]
)
def test_precision_is_that_of_the_device_unless_it_is_said(
    capability: tuple[int, int], auto: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert precision_of(Training(), cuda) == auto
    assert precision_of(Training(), cpu) == torch.float32
    for device in (cuda, cpu):
        assert precision_of(Training(precision="bfloat16"), device) == torch.bfloat16
        assert precision_of(Training(precision="float32"), device) == torch.float32


def test_sums_of_a_device_have_a_fixed_order_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    cuda, fixed = torch.device("cuda"), torch.are_deterministic_algorithms_enabled
    with in_fixed_order(Training(), cuda):
        assert not fixed()
    with in_fixed_order(Training(deterministic=True), torch.device("cpu")):
        assert not fixed()  # it always has one, and would only be slower

    @in_fixed_order(Training(deterministic=True), cuda)
    def sums() -> None:
        assert fixed()
        raise RuntimeError("x does not have a deterministic implementation\nand more")

    with pytest.raises(GracecError, match=r"^training\.deterministic: x does not have a determin"):
        sums()
    assert not fixed()
