"""Question answering: prompts and padding with a real model, figures with a scripted one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from gracec.data.pictures import load_image
from gracec.data.prompts import Prompts
from gracec.data.questions import VqaSample
from gracec.errors import GracecError
from gracec.evaluate.ask import answer, evaluate_vqa
from gracec.evaluate.scores import (
    Prediction,
    VqaReport,
    format_table,
    normalise_answer,
    paired_difference,
    summarise,
)
from tests.tiny import IMAGE_TOKENS, tiny_image, tiny_llava, tiny_processor

QUESTIONS = ("what is this ?", "where is the small red circle ?", "how many ?", "is it blue ?")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[VqaSample]:
    folder = tmp_path_factory.mktemp("images")
    found = []
    for number in range(10):
        path = folder / f"{number}.png"
        tiny_image(number).save(path)
        question = QUESTIONS[number % len(QUESTIONS)]
        found.append(VqaSample(path, question, "red", question.split()[0]))
    return found


class Scripted:
    """Answers "red" or "blue" by which of the channels is brighter; red when it sees nothing."""

    device = torch.device("cpu")

    def __init__(self, processor: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self.answers = processor.tokenizer.convert_tokens_to_ids(["red", "blue"])

    def generate(self, **inputs: Any) -> Tensor:
        self.calls.append(inputs)
        channels = inputs["pixel_values"].mean(dim=(2, 3))
        ids = [self.answers[int(blue > red)] for red, _, blue in channels.tolist()]
        return torch.cat([inputs["input_ids"], torch.tensor(ids)[:, None]], dim=1)


def coloured(folder: Path, colours: Sequence[str], answers: Sequence[str]) -> list[VqaSample]:
    found = []
    for number, (colour, expected) in enumerate(zip(colours, answers, strict=True)):
        path = folder / f"{number}.png"
        Image.new("RGB", (32, 32), colour).save(path)
        found.append(VqaSample(path, "what color is it ?", expected, "color"))
    return found


def prediction(index: int, predicted: str, answer: str, type: str = "all") -> Prediction:
    return Prediction(index, type, predicted, answer, predicted == answer)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  Red. ", "red"),
        ("top\n LEFT !?", "top left"),
        ("3.5", "3.5"),
        ("u.s.a.", "u.s.a"),
        ("?", "?"),
        ("", ""),
    ],
)
def test_normalise_answer(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


def test_answers_do_not_depend_on_the_batch(samples: list[VqaSample]) -> None:
    model, processor = tiny_llava(), tiny_processor()
    seen: list[tuple[int, int]] = []
    together = evaluate_vqa(
        model, processor, samples, batch_size=4, progress=lambda *at: seen.append(at)
    )
    alone = evaluate_vqa(model, processor, samples, batch_size=1)
    assert together == alone
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert [one.index for one in together.predictions] == list(range(10))
    # The answers are those of this image: others come without it.
    assert any(one.predicted != one.blind for one in together.predictions)
    assert all(one.predicted for one in together.predictions)


def test_questions_about_no_image(samples: list[VqaSample]) -> None:
    """Beside others and alone; the control without an image has nothing to take away."""
    model, processor = tiny_llava(), tiny_processor()
    texts = [VqaSample(None, one.question, "red") for one in samples[:4]]
    mixed = [texts[0], samples[4], *texts[1:]]
    together = evaluate_vqa(model, processor, mixed, batch_size=2)
    alone = evaluate_vqa(model, processor, mixed, batch_size=1)
    assert together == alone
    for sample, one in zip(mixed, together.predictions, strict=True):
        if sample.image is None:
            assert one.predicted == one.blind
            text = processor.tokenizer(f"<s> USER : {sample.question} <s> ASSISTANT :")
            tokens = model.generate(
                **text.convert_to_tensors("pt", prepend_batch_axis=True),
                max_new_tokens=8,
                do_sample=False,
            )
            new = tokens[0, len(text["input_ids"][0]) :]
            assert one.predicted == processor.decode(new, skip_special_tokens=True).strip()


def test_one_answer_is_about_the_picture_as_the_reader_has_it(tmp_path: Path) -> None:
    model, processor = tiny_llava(), tiny_processor()
    exif = Image.Exif()
    exif[0x0112] = 6
    tiny_image(4).save(tmp_path / "turned.jpg", exif=exif)
    ask = [QUESTIONS[0]]
    found = answer(model, processor, Image.open(tmp_path / "turned.jpg"), *ask)
    assert found == answer(model, processor, load_image(tmp_path / "turned.jpg"), *ask)
    assert found != answer(model, processor, tiny_image(4), *ask)
    with pytest.raises(GracecError, match="the question: the picture has more than 8 bits"):
        answer(model, processor, Image.new("I", (4, 4)), *ask)


def test_the_blind_control_sees_no_image(samples: list[VqaSample]) -> None:
    same_question = [VqaSample(one.image, QUESTIONS[0], "red") for one in samples]
    report = evaluate_vqa(tiny_llava(), tiny_processor(), same_question)
    assert len({one.blind for one in report.predictions}) == 1
    assert len({one.predicted for one in report.predictions}) > 1


def test_prompts_are_templated_left_padded_and_greedy(samples: list[VqaSample]) -> None:
    processor = tiny_processor()
    model = Scripted(processor)
    evaluate_vqa(model, processor, samples[:2], max_new_tokens=3)
    seeing, blind = model.calls
    longest = processor.tokenizer.decode(seeing["input_ids"][1])
    images = " ".join(["<image>"] * IMAGE_TOKENS)
    assert longest == f"<s> USER : {images} {QUESTIONS[1]} <s> ASSISTANT :"
    assert seeing["attention_mask"][0].tolist()[:2] == [0, 0]
    assert bool((seeing["attention_mask"][:, -1] == 1).all())
    options = {name: seeing[name] for name in ("max_new_tokens", "do_sample", "num_beams")}
    assert options == {"max_new_tokens": 3, "do_sample": False, "num_beams": 1}
    assert bool((blind["pixel_values"] == 0).all())
    assert not bool((seeing["pixel_values"] == 0).all())
    assert torch.equal(blind["input_ids"], seeing["input_ids"])


def test_without_a_chat_template_the_image_token_comes_first(samples: list[VqaSample]) -> None:
    processor = tiny_processor(chat_template=None)
    model = Scripted(processor)
    evaluate_vqa(model, processor, samples[:1], blind=False)
    text = processor.tokenizer.decode(model.calls[0]["input_ids"][0])
    assert text == " ".join(["<image>"] * IMAGE_TOKENS + [QUESTIONS[0]])
    assert len(model.calls) == 1


def test_inputs_take_the_models_dtype_and_its_mode_is_kept(samples: list[VqaSample]) -> None:
    model = tiny_llava(dtype=torch.bfloat16)
    torch.nn.Module.train(model)
    report = evaluate_vqa(model, tiny_processor(), samples[:2])
    assert model.training
    assert report.overall.n == 2


def test_figures_and_controls(tmp_path: Path) -> None:
    # Right, right (in spite of case and full stop), wrong, right; blind says red: 3 of 4.
    asked = coloured(tmp_path, ["red", "red", "blue", "blue"], ["red", "Red.", "red", "blue"])
    processor = tiny_processor()
    report = evaluate_vqa(Scripted(processor), processor, asked, batch_size=3)
    score = report.types["color"]
    assert [one.correct for one in report.predictions] == [True, True, False, True]
    assert (score.n, score.accuracy, score.blind_accuracy) == (4, 0.75, 0.75)
    assert score.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert (score.chance, score.majority) == (0.5, 0.75)
    assert report.overall == score
    assert json.loads(json.dumps(report.to_dict()))["types"]["color"]["accuracy"] == 0.75
    assert report.to_dict()["predictions"][2] == {
        "index": 2,
        "type": "color",
        "predicted": "blue",
        "answer": "red",
        "correct": False,
        "blind": "red",
    }


def test_overall_is_the_micro_average_and_its_controls_know_the_type() -> None:
    report = summarise(
        [
            prediction(0, "yes", "yes", "is"),
            prediction(1, "no", "yes", "is"),
            prediction(2, "no", "no", "is"),
            prediction(3, "red", "blue", "color"),
        ]
    )
    assert list(report.types) == ["is", "color"]
    assert report.overall.accuracy == 0.5
    assert report.overall.chance == pytest.approx((3 * 1 / 2 + 1 * 1) / 4)
    assert report.overall.majority == pytest.approx((3 * 2 / 3 + 1 * 1) / 4)
    assert report.overall.blind_accuracy is None
    assert report.types["color"].standard_error == 0


def test_paired_difference_leaves_out_what_both_share() -> None:
    a = summarise([prediction(i, "yes" if i != 0 else "no", "yes") for i in range(4)])
    b = summarise([prediction(i, "yes" if i > 1 else "no", "yes") for i in range(4)])
    difference, error = paired_difference(a, b)
    assert difference == 0.25
    assert error == pytest.approx(math.sqrt((0.25 - 0.0625) / 4))
    assert paired_difference(a, a) == (0.0, 0.0)
    with pytest.raises(GracecError, match="not over the same samples"):
        paired_difference(a, summarise(a.predictions[:3]))


def rendered(reports: dict[str, VqaReport]) -> list[list[str]]:
    console = Console(width=200, force_terminal=False, color_system=None)
    with console.capture() as captured:
        console.print(format_table(reports))
    lines = [line.strip() for line in captured.get().splitlines()]
    return [re.split(r"  +", line) for line in lines if any(one.isalpha() for one in line)]


def test_table_shows_each_model_beside_its_controls(tmp_path: Path) -> None:
    asked = coloured(tmp_path, ["red", "red", "blue", "blue"], ["red", "red", "red", "blue"])
    processor = tiny_processor()
    report = evaluate_vqa(Scripted(processor), processor, asked)
    row = ["4", "75.0 ±21.7", "75.0 ±21.7", "75.0", "50.0"]
    assert rendered({"bf16": report}) == [
        ["type", "n", "bf16", "blind", "majority", "chance"],
        ["color", *row],
        ["overall", *row],
    ]
    unblinded = evaluate_vqa(Scripted(processor), processor, asked, blind=False)
    head, first, _, caption = rendered({"w4a16": unblinded, "bf16": report})
    assert head[2:5] == ["w4a16", "bf16", "blind"]
    assert first[2:5] == ["75.0 ±21.7"] * 3
    assert caption == ["blind: the best of the models"]
    assert rendered({"w4a16": unblinded})[1][3] == "-"
    with pytest.raises(GracecError, match="w4a16: the report is not over the same samples"):
        format_table({"bf16": report, "w4a16": summarise(report.predictions[:2])})


def test_answer_is_that_of_the_evaluation(samples: list[VqaSample]) -> None:
    model, processor = tiny_llava(), tiny_processor()
    report = evaluate_vqa(model, processor, samples[:1], max_new_tokens=5)
    image = load_image(samples[0].image)
    text = answer(model, processor, image, samples[0].question, max_new_tokens=5)
    assert text == report.predictions[0].predicted
    with pytest.raises(GracecError, match="^the question: the processor refuses it"):
        answer(model, processor, image, "what is <image> ?")


def test_a_prompt_whose_image_tokens_were_cut_names_the_sample(
    samples: list[VqaSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Prompts.encode

    def cutting(prompts: Prompts, conversations: Any, *more: Any, **options: Any) -> dict[str, Any]:
        encoded = encode(prompts, conversations, *more, **options)
        cut = [messages[0]["content"][-1]["text"] == QUESTIONS[1] for messages in conversations]
        ids = encoded["input_ids"]
        for row in torch.tensor(cut).nonzero().flatten().tolist():
            ids[row, (ids[row] == 4).nonzero()[0]] = 3
        return encoded

    monkeypatch.setattr(Prompts, "encode", cutting)
    asked = [samples[0]] * 5 + [samples[1], samples[0]]
    with pytest.raises(GracecError, match="sample 5: the prompt has 15 image tokens where 16 are"):
        evaluate_vqa(Scripted(tiny_processor()), tiny_processor(), asked, batch_size=4)


def test_a_sample_the_processor_refuses_is_named(samples: list[VqaSample]) -> None:
    # A question that itself holds the image token asks for a second image.
    bad = VqaSample(samples[0].image, "what is <image> ?", "red")
    processor = tiny_processor()
    with pytest.raises(GracecError, match="^sample 3: the processor refuses it"):
        evaluate_vqa(Scripted(processor), processor, [*samples[:3], bad, *samples[3:]])


def test_a_model_that_returns_only_new_tokens_is_refused(samples: list[VqaSample]) -> None:
    class OnlyNew(Scripted):
        def generate(self, **inputs: Any) -> Tensor:
            return super().generate(**inputs)[:, -1:]

    with pytest.raises(GracecError, match="OnlyNew: generate.. does not return the prompt"):
        evaluate_vqa(OnlyNew(tiny_processor()), tiny_processor(), samples)


def test_bad_arguments(samples: list[VqaSample]) -> None:
    processor = tiny_processor()
    with pytest.raises(GracecError, match="no samples"):
        evaluate_vqa(Scripted(processor), processor, [])
    with pytest.raises(GracecError, match="at least 1"):
        evaluate_vqa(Scripted(processor), processor, samples, batch_size=0)
    with pytest.raises(GracecError, match="no reports"):
        format_table({})
