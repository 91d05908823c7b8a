from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from gracec import ir
from gracec.capture import capture_serving, family_of
from gracec.capture.serving import (
    ServingProgram,
    apply_codes,
    composed_equals_training,
    empty_cache,
)
from gracec.errors import GateError, GracecError
from gracec.ir.program import Program
from gracec.passes import PassResult
from gracec.passes.apply_codes import ApplyCodes
from gracec.passes.freeze import frozen_weights
from gracec.quant.frozen import FrozenWeight
from tests.tiny import tiny_llava

Golden = Callable[..., None]
After = Callable[[str], Program]
Serving = dict[str, ServingProgram]
FROZEN = "analyze-modality,plan-quantization,insert-fake-quant,freeze"
CACHE = ["past_key_values.0.key", "past_key_values.0.value", "past_key_values.1.key"]


@pytest.fixture(scope="module")
def frozen_serving(serving: Serving, after: After) -> Serving:
    return apply_codes(serving, frozen_weights(after(FROZEN)))[0]


def test_golden(serving: Serving, golden: Golden) -> None:
    for name, graph in serving.items():
        text = ir.format(graph.program)
        golden(f"serving/llava-{name}.txt", text, made_by="none", after=f"capture_serving: {name}")


def test_names_and_symbols(serving: Serving) -> None:
    assert list(serving) == ["vision_encoder", "embed_tokens", "decoder"]
    vision, embedding, decoder = serving.values()
    assert vision.inputs == {"pixel_values": ("batch_size", 3, 32, 32)}
    assert vision.outputs == {"image_features": ("num_image_tokens", 64)}
    assert embedding.inputs == {"input_ids": ("batch_size", "sequence_length")}
    assert embedding.outputs == {"inputs_embeds": ("batch_size", "sequence_length", 64)}
    assert list(decoder.inputs)[:7] == [
        *("inputs_embeds", "attention_mask", "position_ids", "num_logits_to_keep"),
        *CACHE,
    ]
    assert list(decoder.outputs)[:3] == ["logits", "present.0.key", "present.0.value"]
    total = "past_sequence_length + sequence_length"
    assert decoder.inputs["attention_mask"] == ("batch_size", total)
    assert decoder.inputs[CACHE[0]] == ("batch_size", 2, "past_sequence_length", 16)
    assert decoder.outputs["present.1.value"] == ("batch_size", 2, total, 16)


def logits_of(program: Program) -> Callable[..., Tensor]:
    return lambda **inputs: program(**inputs)[0]


def test_together_they_are_the_training_graph(
    llava: LlavaForConditionalGeneration, serving: Serving, captured: Program
) -> None:
    assert composed_equals_training(serving, logits_of(captured), llava) <= 1e-6


def test_with_the_codes_of_the_training_graph(
    llava: LlavaForConditionalGeneration, frozen_serving: Serving, after: After
) -> None:
    assert composed_equals_training(frozen_serving, logits_of(after(FROZEN)), llava) <= 1e-6


def test_other_weights_are_found(
    llava: LlavaForConditionalGeneration, serving: Serving, after: After
) -> None:
    with pytest.raises(GateError, match="off by .* from what training computes"):
        composed_equals_training(serving, logits_of(after(FROZEN)), llava)


def test_some_logits_are_the_last_ones(serving: Serving) -> None:
    decoder = serving["decoder"]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "inputs_embeds": torch.randn(1, 5, 64, generator=generator),
        "attention_mask": torch.ones(1, 5, dtype=torch.int64),
        "position_ids": torch.arange(5).unsqueeze(0),
        **empty_cache(decoder.inputs, 1, torch.float32, torch.device("cpu")),
    }
    everything = decoder.run({**inputs, "num_logits_to_keep": torch.tensor(0)})["logits"]
    assert everything.shape == (1, 5, 128)
    for count in (1, 3):
        last = decoder.run({**inputs, "num_logits_to_keep": torch.tensor(count)})["logits"]
        torch.testing.assert_close(last, everything[:, -count:])


def test_codes_are_held_to_the_names_and_hashes_of_the_plan(serving: Serving, after: After) -> None:
    weights = frozen_weights(after(FROZEN))
    applied, equal = apply_codes(serving, weights)
    assert equal == len(weights) == 14
    assert set(frozen_weights(applied["decoder"].program)) == set(weights)
    stray = FrozenWeight.from_codes(
        torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 1), next(iter(weights.values())).spec
    )
    with pytest.raises(GateError, match="elsewhere: the weight has codes but is in no serving"):
        apply_codes(serving, {**weights, "elsewhere": stray})
    with pytest.raises(GateError, match="in two serving graphs"):
        apply_codes({**serving, "again": serving["decoder"]}, weights)


def test_a_dimension_that_came_out_fixed_is_an_error(
    llava: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(llava)
    graphs = family.serving_graphs(llava)
    vision = graphs["vision_encoder"]
    wrong = {"image_features": (32, 64)}
    broken = {"vision_encoder": replace(vision, outputs=wrong)}
    monkeypatch.setattr(type(family), "serving_graphs", lambda *_: broken)
    with pytest.raises(GateError, match="dimension 0 of image_features is .*, not 32"):
        capture_serving(llava)


def test_a_family_without_serving_graphs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()
    family = type(family_of(model))
    monkeypatch.setattr(family, "serving", {})
    with pytest.raises(GracecError, match="family llava: has no serving graphs yet"):
        capture_serving(model)


def test_codes_that_come_out_otherwise_are_an_error(
    serving: Serving, after: After, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, fqn = ApplyCodes.apply, "model.language_model.layers.0.mlp.up_proj.weight"

    def off_by_one(item: ApplyCodes, program: Program) -> PassResult:
        result = apply(item, program)
        (target,) = (t for t, names in result.program.fqns.items() if names[0] == f"{fqn}.codes")
        codes = result.program.tensor(target).clone()
        codes[0, 0] ^= 1
        result.program.set_tensor(target, codes)
        return result

    weights = frozen_weights(after(FROZEN))
    monkeypatch.setattr(ApplyCodes, "apply", off_by_one)
    with pytest.raises(GateError, match=f"{fqn}: the codes are other than those of the training"):
        apply_codes(serving, weights)
