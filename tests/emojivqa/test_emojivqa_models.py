"""The shipped models load like any other, and answer from the image."""

import pytest
import torch
from emojivqa import losses
from emojivqa.evaluation import exact_match
from emojivqa.models import SIZES, pixels
from emojivqa.packing import arrays, layout
from emojivqa.questions import evaluation_questions
from emojivqa.tokenizer import prompt
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

MODELS = sorted(SIZES)


@pytest.fixture(scope="module", params=MODELS)
def shipped(request, example):
    """(model in float32, its processor)"""
    folder = example / request.param
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def ask(processor, picture, questions: list[str]):
    texts = [
        processor.apply_chat_template(prompt(q), add_generation_prompt=True) for q in questions
    ]
    images = [Image.fromarray(picture)] * len(texts)
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


def test_weights_are_half_precision_safetensors(example) -> None:
    for name in MODELS:
        model = AutoModelForImageTextToText.from_pretrained(example / name)
        assert model.dtype == torch.float16
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert not list((example / name).glob("*.bin"))


def test_processor_pixels_are_those_of_training(shipped) -> None:
    _, processor = shipped
    data = arrays("validation", range(2))
    seen = ask(processor, data["images"][1], ["where is the cat ?"])["pixel_values"]
    torch.testing.assert_close(seen, pixels(torch.from_numpy(data["images"][1:])))


def test_packed_logits_are_those_of_single_prompts(shipped) -> None:
    model, processor = shipped
    data = arrays("validation", range(1))
    questions = evaluation_questions("validation", 0)
    form = layout(questions)
    tokens = torch.from_numpy(data["tokens"]).long()
    with torch.no_grad():
        visual = losses.visual_tokens(model, pixels(torch.from_numpy(data["images"])))
        packed = losses.answer_logits(model, visual, tokens, form)[0]
        for number, question in enumerate(questions):
            single = ask(processor, data["images"][0], [question.text])
            alone = model(**single).logits[0, -1]
            first = int((form.owner == number).nonzero()[0])
            torch.testing.assert_close(packed[first], alone, atol=1e-4, rtol=1e-4)


def test_packed_scores_are_those_of_generation(shipped) -> None:
    model, processor = shipped
    scenes = range(4)
    data = arrays("validation", scenes)
    hits, _ = exact_match(model, "validation", data)
    for index in scenes:
        questions = evaluation_questions("validation", index)
        inputs = ask(processor, data["images"][index], [q.text for q in questions])
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said = processor.batch_decode(
            made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert [s == q.answer for s, q in zip(said, questions, strict=True)] == hits[index].tolist()


def test_answers_come_from_the_image(shipped) -> None:
    model, _ = shipped
    data = arrays("validation", range(60))
    hits, _ = exact_match(model, "validation", data)
    blind, _ = exact_match(model, "validation", data, blind=True)
    assert hits.float().mean() > blind.float().mean() + 0.15
