import pytest
import torch
from transformers import LlavaForConditionalGeneration

from gracec.ir.program import Program
from gracec.models.cache_argument import CACHE_ARGUMENT
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.plan_quantization import Plan, plan_of
from gracec.report.memory import memory_plan, size


@pytest.fixture(scope="module")
def plan(captured: Program) -> Plan:
    pipeline = parse_pipeline("analyze-modality,plan-quantization")
    return plan_of(run_passes(captured, pipeline).program)


def test_the_kv_cache_and_the_logits_are_those_of_the_model(
    llava: LlavaForConditionalGeneration, plan: Plan
) -> None:
    found = memory_plan(llava, plan, torch.float32, batch=2, tokens=9 + 16)
    # Two images of 16 tokens; the second of the two prompts is one token shorter.
    inputs = {
        name: tensor
        for name, tensor in _example(llava, batch=2, images=2, text=9).items()
        if name != "labels"
    }
    with torch.no_grad():
        outputs = llava(**inputs, use_cache=True)
    layers = outputs[CACHE_ARGUMENT].layers
    cache = sum(
        t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values)
    )
    assert found.tokens == inputs["input_ids"].shape[1] == 9 + 16
    assert found.kv_cache == cache
    assert found.logits["float32"] == outputs.logits.numel() * 4
    assert found.logits["bfloat16"] == outputs.logits.numel() * 2


def _example(model: LlavaForConditionalGeneration, **shape: int) -> dict[str, torch.Tensor]:
    from gracec.capture import family_of

    return family_of(model).example_batch(model, **shape)


def test_the_stages_follow_the_stated_model(
    llava: LlavaForConditionalGeneration, plan: Plan
) -> None:
    found = memory_plan(llava, plan, torch.bfloat16)
    total, codes = llava.num_parameters(), 73728
    scales = sum(e.numel // e.spec.group_size for e in plan.entries if e.spec is not None)
    assert found.stages["load"] == found.copy == 4 * total
    lowered = 2 * (total - codes) + codes // 2 + codes // 2 + 4 * scales + 4 * scales
    largest = 128 * 64
    assert found.stages["lower"] == lowered + largest * 5
    example = _example(llava)
    positions, chosen = example["input_ids"].numel(), int(example["attention_mask"].sum())
    compared = 2 * positions * 128 * 4 + chosen * 128 * 8 * 7
    assert found.stages["verify"] == lowered + max(14 * largest, compared)
    assert found.compile_peak == found.libraries + max(found.stages.values())
    assert found.libraries > 100_000_000  # torch is loaded


def test_float16_is_mapped_and_widened(llava: LlavaForConditionalGeneration, plan: Plan) -> None:
    found = memory_plan(llava, plan, torch.bfloat16, stored=torch.float16)
    total = llava.num_parameters()
    assert found.weights["stored"] == 2 * total
    assert found.stages["load"] == 6 * total
    assert found.copy == 4 * total


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (1_234_000_000, "1.23 GB")],
)
def test_sizes_are_short(count: int, text: str) -> None:
    assert size(count) == text
