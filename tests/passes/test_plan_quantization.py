from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gracec import ir
from gracec.capture import capture
from gracec.errors import PassError
from gracec.ir.program import Program
from gracec.passes import PassResult, parse_pipeline, run_passes
from gracec.passes.plan_quantization import PlanQuantization, plan_of
from gracec.recipe import Recipe
from tests.goldens import ONE_BLOCK
from tests.tiny import tiny_llava

Golden = Callable[..., None]
After = Callable[[str], Program]
PIPELINE = "analyze-modality,plan-quantization"


def planned(program: Program, strict: bool = False, **weights: dict[str, int] | None) -> Program:
    recipe = Recipe.from_dict({"name": "test", "weights": weights})
    return PlanQuantization(recipe=recipe, strict=strict).run(program).program


def test_golden(after_block: After, golden: Golden) -> None:
    before = "analyze-modality"
    text = ir.diff(after_block(before), after_block(PIPELINE)) + "\n"
    made_by = PlanQuantization()
    golden("plan-quantization/llava.txt", text, made_by=made_by, after=before, model=ONE_BLOCK)


def test_numerics_are_kept_bit_for_bit(
    captured: Program, after: After, batch: dict[str, Tensor]
) -> None:
    assert torch.equal(after(PIPELINE)(**batch)[0], captured(**batch)[0])


def test_idempotent(after: After) -> None:
    again = PlanQuantization().run(after(PIPELINE))
    assert not again.modified


def test_it_needs_the_parts(captured: Program) -> None:
    with pytest.raises(PassError, match="run analyze-modality first"):
        PlanQuantization().run(captured)


def test_a_plan_comes_before_fake_quant(after: After) -> None:
    with pytest.raises(PassError, match="weights are quantized already; plan before insert-fake"):
        PlanQuantization().run(after(f"{PIPELINE},insert-fake-quant"))


def test_every_weight_has_a_spec_or_a_reason_and_bytes_add_up(
    after: After, llava: torch.nn.Module
) -> None:
    plan = plan_of(after(PIPELINE))
    assert all((entry.spec is None) == bool(entry.reason) for entry in plan.entries)
    matrices = {n: p for n, p in llava.named_parameters() if p.dim() > 1}
    assert {entry.fqn for entry in plan.entries} == set(matrices)
    assert sum(e.source_bytes for e in plan.entries) == sum(
        4 * p.numel() for p in matrices.values()
    )
    assert all("language_model.layers" in fqn for fqn in plan.quantized)
    covered = sum(matrices[fqn].numel() for fqn in plan.quantized)
    assert plan.coverage == covered / sum(p.numel() for p in matrices.values())
    entry = next(entry for entry in plan.entries if entry.spec and entry.spec.group_size == 64)
    assert entry.planned_bytes == entry.numel // 2 + entry.numel // 64 * 2


def test_a_group_that_does_not_divide_falls_back_for_the_whole_set_and_says_so() -> None:
    model = tiny_llava(hidden_size=96, intermediate_size=128, num_attention_heads=6)
    analyzed = run_passes(capture(model), parse_pipeline("analyze-modality")).program
    recipe = Recipe.from_dict({"name": "test", "weights": {"decoder": {"group_size": 64}}})
    result = PlanQuantization(recipe=recipe).run(analyzed)
    specs = {fqn.split(".")[-2]: spec for fqn, spec in plan_of(result.program).quantized.items()}
    assert {specs[name].group_size for name in ("q_proj", "k_proj", "v_proj")} == {32}
    assert specs["down_proj"].group_size == 64
    assert any("q_proj" in n and "group 64 does not divide 96" in n for n in result.notes)
    with pytest.raises(
        PassError, match=r"q_proj.weight: plan-quantization: group 64 does not divide"
    ):
        PlanQuantization(recipe=recipe, strict=True).run(analyzed)


def test_a_width_that_no_group_divides_keeps_its_precision_with_a_reason() -> None:
    model = tiny_llava(intermediate_size=120)
    analyzed = run_passes(capture(model), parse_pipeline("analyze-modality")).program
    entries = plan_of(planned(analyzed, decoder={"group_size": 64})).entries
    down = [entry for entry in entries if "down_proj" in entry.fqn]
    assert all(entry.spec is None and "no group divides" in entry.reason for entry in down)


def test_each_part_can_be_chosen(after: After) -> None:
    program = planned(after("analyze-modality"), vision={"bits": 8, "group_size": 32}, projector={})
    parts = {entry.part for entry in plan_of(program).entries if entry.spec}
    assert parts == {"vision", "projector"}
    conv = [e for e in plan_of(program).entries if "patch_embedding" in e.fqn]
    assert conv[0].reason == "aten.conv2d.default is not a linear layer"


def test_the_last_layer_that_fits_decides_and_the_plan_says_which(after: After) -> None:
    fields = {
        "name": "mixed",
        "weights": {"decoder": {"bits": 4, "group_size": 16}},
        "layers": {
            "decoder.down": {"bits": 8, "group_size": 32},
            "decoder.blocks[-1].down": {"bits": 3, "group_size": 16},
            "*layers.0.self_attn.*": None,
        },
    }
    result = PlanQuantization(recipe=Recipe.from_dict(fields)).run(after("analyze-modality"))
    entries = {
        entry.fqn.split("language_model.")[-1]: entry for entry in plan_of(result.program).entries
    }

    def decided(name: str) -> tuple[int | None, str]:
        entry = entries[f"layers.{name}_proj.weight"]
        return entry.spec and entry.spec.bits, entry.rule

    assert decided("0.mlp.up") == (4, "")
    assert decided("0.mlp.down") == (8, "decoder.down")
    assert decided("1.mlp.down") == (3, "decoder.blocks[-1].down")
    assert decided("0.self_attn.q") == (None, "*layers.0.self_attn.*")
    assert entries["layers.0.self_attn.q_proj.weight"].reason.endswith(
        "by *layers.0.self_attn.* of recipe mixed"
    )
    assert decided("1.self_attn.q") == (4, "")
    notes = [str(note) for note in result.notes]
    assert "layers decoder.down: 1 int8/g32" in notes
    assert "layers *layers.0.self_attn.*: 8 kept" in notes


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"decoder.blocks[9]": None}, r"no weight fits 'decoder.blocks\[9\]'; there are 2 blocks"),
        ({"lm.*": None}, "no weight fits 'lm.*'; names are such as model.vision_tower"),
        ({"decoder.k": {"bits": 8}}, "reads the same activation as .*q_proj.weight, and runtimes"),
        ({"decoder.v": None}, "v_proj.weight: plan-quantization: it reads the same activation"),
    ],
)
def test_layers_that_fit_nothing_or_part_what_is_fused_are_refused(
    after: After, layers: dict[str, object], message: str
) -> None:
    fields = {"name": "mixed", "weights": {"decoder": {"group_size": 16}}, "layers": layers}
    with pytest.raises(PassError, match=message):
        PlanQuantization(recipe=Recipe.from_dict(fields)).run(after("analyze-modality"))


def test_a_tied_head_is_refused_with_its_reason(after: After) -> None:
    program = planned(after("analyze-modality"), decoder={"group_size": 32}, head={})
    (head,) = [entry for entry in plan_of(program).entries if entry.part == "head"]
    assert head.reason == "tied to the token embedding"
    with pytest.raises(PassError, match="tied to the token embedding"):
        planned(after("analyze-modality"), strict=True, decoder={"group_size": 32}, head={})


def test_a_recipe_that_quantizes_nothing_is_refused(after: After) -> None:
    with pytest.raises(PassError, match="quantizes nothing"):
        planned(after("analyze-modality"), decoder=None)


class Experts(nn.Module):
    """Stands in for a decoder MLP: a fused weight read in slices, and a stack of two experts."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.fused = nn.Parameter(torch.randn(128, 64, generator=generator) * 0.05)
        self.stack = nn.Parameter(torch.randn(2, 64, 64, generator=generator) * 0.05)
        self.gains = nn.Parameter(torch.ones(1, 64))

    def forward(self, x: Tensor) -> Tensor:
        first = nn.functional.linear(x, self.fused[:64])
        second = nn.functional.linear(x, self.fused[64:])
        rows = (first * second).reshape(1, -1, 64).expand(2, -1, -1)
        return torch.bmm(rows, self.stack).sum(0).reshape(x.shape) * self.gains


def test_sliced_weights_and_expert_stacks_are_counted_with_their_reason() -> None:
    model = tiny_llava()
    model.model.language_model.layers[1].mlp = Experts().eval()
    program = run_passes(capture(model), parse_pipeline(PIPELINE)).program
    prefix = "model.language_model.layers.1.mlp."
    entries = {e.fqn.removeprefix(prefix): e for e in plan_of(program).entries if prefix in e.fqn}
    assert entries["fused"].reason == "only a view of the weight is used"
    assert entries["stack"].reason == "aten.bmm.default is not a linear layer"
    assert entries["gains"].reason == "read by aten.mul.Tensor, which is no matmul"
    assert [entries[name].part for name in ("fused", "stack", "gains")] == [
        "decoder",
        "decoder",
        "other",
    ]
    assert entries["stack"].source_bytes == 4 * 2 * 64 * 64
    with pytest.raises(PassError, match=r"mlp\.(fused|stack): plan-quantization: "):
        run_passes(
            run_passes(capture(model), parse_pipeline("analyze-modality")).program,
            [PlanQuantization(recipe=Recipe.from_dict(G32), strict=True)],
        )


G32 = {"name": "g32", "weights": {"decoder": {"group_size": 32}}}


def test_a_weight_without_a_decision_is_an_error(
    after: After, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlanQuantization, "apply", lambda self, program: PassResult(program, False))
    with pytest.raises(PassError, match="has 0 decisions, one is needed"):
        PlanQuantization().run(after("analyze-modality"))
