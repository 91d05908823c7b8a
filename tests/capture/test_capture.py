import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from gracec.capture import capture, captured_equals_eager, families, family_of
from gracec.capture.families import Family
from gracec.errors import GateError, GracecError
from gracec.ir.program import Program
from tests.tiny import IMAGE, IMAGE_TOKENS, tiny_batch, tiny_llava


def test_the_graph_is_the_model_bit_for_bit_at_several_shapes(
    captured: Program, llava: LlavaForConditionalGeneration, batch: dict[str, Tensor]
) -> None:
    assert (batch["attention_mask"][:, 0] == 0).any(), "the batch must be padded on the left"
    longer = tiny_batch(llava, ("what is this ?", "is it red ?", "how many are there ?"), seed=7)
    one = tiny_batch(llava, ("where ?",), seed=3)
    family = family_of(llava)
    several = family.example_batch(llava, batch=2, images=5, text=11)
    assert captured_equals_eager(captured, llava, [batch, longer, one, several]) == 4
    assert captured_equals_eager(captured, llava) == 3


def test_bfloat16_and_an_untied_head(batch: dict[str, Tensor]) -> None:
    model = tiny_llava(dtype=torch.bfloat16, num_hidden_layers=3)
    program = capture(model)
    assert program.dtype == torch.bfloat16
    assert program.fqns["model.lm_head.weight"] == ("lm_head.weight",)
    assert captured_equals_eager(program, model, [batch]) == 1


@pytest.mark.parametrize("layers", [-1, [-2, -1]])
def test_other_feature_layers(layers: int | list[int], batch: dict[str, Tensor]) -> None:
    model = tiny_llava(vision_feature_layer=layers)
    assert captured_equals_eager(capture(model), model, [batch]) == 1


def test_the_gate_fails_when_the_graph_is_not_the_model(
    captured: Program, batch: dict[str, Tensor]
) -> None:
    with pytest.raises(GateError, match="captured graph and eager model differ by"):
        captured_equals_eager(captured, tiny_llava(seed=1, tie=True), [batch])


def test_capture_leaves_the_mode_of_the_model_alone() -> None:
    model = tiny_llava()
    model.train()
    program = capture(model)
    assert model.training
    assert captured_equals_eager(program, model.eval()) == 3


def test_a_text_model_is_refused() -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
    )
    with pytest.raises(GracecError, match="'llama' is not a generating vision-language model"):
        capture(LlamaForCausalLM(config))


def test_a_model_that_cannot_be_traced_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()
    projector = model.model.multi_modal_projector

    def depends_on_data(features: Tensor) -> Tensor:
        return features if features.sum() > 0 else -features

    monkeypatch.setattr(projector, "forward", depends_on_data)
    with pytest.raises(GracecError, match="torch.export cannot trace the model") as error:
        capture(model)
    assert "\n" not in str(error.value)


def test_a_prompt_cut_inside_its_image_names_the_sample(
    llava: LlavaForConditionalGeneration, batch: dict[str, Tensor]
) -> None:
    family = family_of(llava)
    cut = dict(batch, input_ids=batch["input_ids"].clone())
    row = cut["input_ids"][1]
    row[torch.nonzero(row == IMAGE)[0]] = 7
    with pytest.raises(
        GracecError, match="sample 1 of the batch: the prompt holds 15 image tokens"
    ):
        family.prepare(llava, cut)


def test_images_without_a_place_are_refused(
    llava: LlavaForConditionalGeneration, batch: dict[str, Tensor]
) -> None:
    family = family_of(llava)
    more = dict(batch, pixel_values=torch.zeros(3, 3, 32, 32))
    with pytest.raises(GracecError, match="places for 32 visual tokens, the 3 images"):
        family.prepare(llava, more)
    wrong = dict(batch, pixel_values=torch.zeros(2, 3, 40, 40))
    with pytest.raises(GracecError, match="the tower takes 32 x 32"):
        family.prepare(llava, wrong)
    with pytest.raises(GracecError, match="pixel_values is missing"):
        family.prepare(llava, {"input_ids": batch["input_ids"]})


def test_families_are_found_and_complete() -> None:
    assert "llava" in families()
    assert all(isinstance(family, Family) for family in families().values())


def test_the_processor_and_the_example_agree(
    llava: LlavaForConditionalGeneration, batch: dict[str, Tensor]
) -> None:
    example = family_of(llava).example_batch(llava, batch=2, images=2)
    for inputs in (example, batch):
        assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [IMAGE_TOKENS] * 2
