"""gracec.compile with data: the whole way from conversations to an artifact."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

import gracec
from gracec.capture import family_of
from gracec.errors import GateError, GracecError
from gracec.evaluate import VqaSample
from gracec.request import Request
from gracec.stages import train as stage
from gracec.training.teacher import check_teacher
from tests.children import in_a_child
from tests.tiny import tiny_image, tiny_llava, tiny_processor
from tests.tiny_families import tiny_model

TRAINING = {
    "steps": 4,
    "batch_size": 4,
    "micro_batch_size": 4,
    "lr": 3e-3,
    "scale_lr": 1e-2,
    "evaluate_every": 2,
    "checkpoint_every": 1,
    "held_out": 0.25,
}
WORDS = ["red", "green", "blue", "yellow"]


def records(count: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "image": tiny_image(number),
            "conversations": [
                {"from": "human", "value": "<image>\nwhat color is this ?"},
                {"from": "gpt", "value": WORDS[number % 4]},
            ],
        }
        for number in range(count)
    ]


def recipe(**fields: Any) -> gracec.Recipe:
    training = {**TRAINING, **fields.pop("training", {})}
    whole = {"name": "test", "weights": {"decoder": {"group_size": 32}}, **fields}
    return gracec.Recipe.from_dict({**whole, "training": training})


@pytest.fixture(scope="module")
def teacher() -> LlavaForConditionalGeneration:
    return tiny_llava(seed=7, hidden_size=96, num_attention_heads=6, tie=True)


def test_a_compilation_trains_lowers_saves_and_leaves_the_caller_alone(
    llava: LlavaForConditionalGeneration,
    teacher: LlavaForConditionalGeneration,
    batch: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    compiled = gracec.compile(
        llava,
        recipe(),
        teacher=teacher,
        train_data=records(),
        processor=tiny_processor(),
        output_dir=tmp_path / "out",
        progress=False,
    )
    report = compiled.report
    assert report.gates["int4_kernels"].count == 14
    assert report.training["steps"] == 4
    assert report.training["best_step"] == 4
    first, *_, last = report.training["held_out"]
    assert last["held_out_loss"] < first["held_out_loss"]
    assert any("trained 4 steps" in note.text for note in report.notes)
    fresh = tiny_llava(tie=True).state_dict()
    assert all(torch.equal(fresh[name], t) for name, t in llava.state_dict().items())
    untrained = gracec.compile(llava, "w4a16-ptq", processor=tiny_processor())
    fqn = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(compiled.weights[fqn].dequantize(), untrained.weights[fqn].dequantize())
    assert not (tmp_path / "out.training").exists()
    again = gracec.load(tmp_path / "out")
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(**batch, **options), compiled.generate(**batch, **options))
    assert again.report.training == report.training


def test_without_a_teacher_a_frozen_copy_of_the_original_teaches(
    llava: LlavaForConditionalGeneration,
) -> None:
    texts = [{"question": f"what is {word} ?", "answer": word} for word in WORDS]
    compiled = gracec.compile(
        llava,
        recipe(training={"micro_batch_size": 1}),
        train_data=[*records(), *texts],
        eval_data=[VqaSample(None, "what is red ?", "red")],
        processor=tiny_processor(),
        progress=False,
    )
    assert "no teacher was given: a frozen copy of the original teaches" in [
        *map(str, compiled.report.notes)
    ]
    rows = compiled.report.training["rows"]
    assert rows[0]["distillation"] < 0.5  # quantized against itself
    assert rows[0]["rcka"] < 0.1


def test_questions_in_memory_are_decoded_once(tmp_path: Path) -> None:
    tiny_image().save(tmp_path / "it.png")
    asked = [VqaSample(tmp_path / "it.png", "what ?", "red"), VqaSample(None, "why ?", "no")]
    request = Request.checked(
        tiny_llava(), recipe(), train_data=records(), eval_data=asked, processor=tiny_processor()
    )
    first, second = request.held_out
    (tmp_path / "it.png").unlink()
    assert request.held_out == [first, second]
    assert first["image"].tobytes() == tiny_image().tobytes()
    assert second == {"question": "why ?", "answer": "no"}


def test_without_data_it_is_post_training_quantization_and_says_so(
    llava: LlavaForConditionalGeneration, teacher: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    note = "no training data: post-training quantization instead"
    assert note in map(str, gracec.compile(llava).report.notes)
    resume = {"resume": True, "output_dir": tmp_path / "out"}
    for more in ({"strict": True}, {"teacher": teacher}, resume):
        with pytest.raises(GracecError, match=note):
            gracec.compile(llava, "w4a16", **more)
    with pytest.raises(GracecError, match="the recipe only trains, and there is no train_data"):
        gracec.compile(llava, "bf16-sft")


def test_eval_data_that_nothing_would_use_is_refused(
    llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(GracecError, match="eval_data holds no questions, and nothing is trained"):
        gracec.compile(llava, "w4a16-ptq", eval_data=tmp_path)


def questions(folder: Path) -> Path:
    """A folder of three questions of type "color", to which nobody knows the answer."""
    folder.mkdir()
    lines = []
    for number in range(3):
        tiny_image(number).save(folder / f"{number}.png")
        line = {"image": f"{number}.png", "question": "what is this ?", "answer": "mauve"}
        lines.append(json.dumps({**line, "type": "color"}))
    (folder / "samples.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        ({"at_least": 0.5}, r"accuracy is 0.00% on data, the recipe expects at least 50.00%"),
        (
            {"metric": "accuracy_change", "type": "color", "at_least": 0.01},
            r"accuracy change on color is \+0.00% on data, the recipe expects at least \+1.00%",
        ),
    ],
)
def test_a_model_below_the_expected_accuracy_is_kept_under_another_name(
    expect: dict[str, Any], message: str, llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    gated = gracec.Recipe.from_dict(
        {"name": "gated", "weights": {"decoder": {"group_size": 32}}, "expect": expect}
    )
    data = questions(tmp_path / "data")
    for kept in ("out.failed", "out.failed-2"):  # an earlier failure stays
        with pytest.raises(GateError, match=message) as failure:
            gracec.compile(
                llava,
                gated,
                eval_data=data,
                processor=tiny_processor(),
                output_dir=tmp_path / "out",
            )
        assert str(failure.value).endswith(f"kept as {tmp_path / kept}")
    assert not (tmp_path / "out").exists()
    assert gracec.load(tmp_path / "out.failed").report.accuracy["compiled"]["overall"]["n"] == 3


def test_a_model_that_is_as_accurate_as_expected_passes(
    llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    expect = {"metric": "accuracy_change", "at_least": -0.01}
    gated = gracec.Recipe.from_dict({"name": "gated", "weights": {"decoder": {}}, "expect": expect})
    data = questions(tmp_path / "data")
    compiled = gracec.compile(llava, gated, eval_data=data, processor=tiny_processor())
    assert compiled.report.accuracy["difference"]["difference"] == 0


@pytest.mark.parametrize(
    ("type_", "with_data", "message"),
    [
        (None, False, "recipe gated: expect: there are no questions to measure an accuracy on"),
        ("colour", True, "expect.type: no question is of type 'colour'; did you mean 'color'"),
    ],
)
def test_an_expectation_that_cannot_be_measured_is_refused_before_the_work(
    type_: str | None,
    with_data: bool,
    message: str,
    llava: LlavaForConditionalGeneration,
    tmp_path: Path,
) -> None:
    expect = {"at_least": 0.5, "type": type_}
    gated = gracec.Recipe.from_dict({"name": "gated", "weights": {"decoder": {}}, "expect": expect})
    data = questions(tmp_path / "data") if with_data else None
    with pytest.raises(GracecError, match=message):
        gracec.compile(llava, gated, eval_data=data, processor=tiny_processor())


@pytest.mark.parametrize("argument", ["train_data", "teacher", "resume"])
def test_nothing_that_is_given_is_ignored(
    argument: str, llava: LlavaForConditionalGeneration
) -> None:
    rounded = gracec.Recipe.from_dict(
        {"name": "rounded", "weights": {"decoder": {}}, "calibration": {"method": "weights"}}
    )
    with pytest.raises(GracecError, match=f"so {argument} would be ignored"):
        gracec.compile(llava, rounded, **{argument: True})


def test_a_control_is_trained_and_not_quantized(
    llava: LlavaForConditionalGeneration, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    compiled = gracec.compile(
        llava,
        recipe(weights={}, training={"distillation": {"kind": "none", "omega": 0}}),
        train_data=records(),
        processor=tiny_processor(),
        output_dir=tmp_path / "out",
        progress=False,
    )
    assert not compiled.weights
    assert "nothing is quantized: an ordinary Hugging Face model" in [
        *map(str, compiled.report.notes)
    ]
    with pytest.raises(GracecError, match="format awq: no weight is quantized"):
        compiled.save_pretrained(tmp_path / "awq", "awq")
    assert not (tmp_path / "awq").exists()
    assert compiled.report.training["best_step"] > 0
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    inputs = {n: t.bfloat16() if t.is_floating_point() else t for n, t in batch.items()}
    with torch.no_grad():
        expected = plain(**inputs).logits
    assert torch.equal(compiled(**batch).logits, expected)
    assert torch.equal(gracec.load(tmp_path / "out")(**batch).logits, expected)


def options() -> dict[str, Any]:
    return {
        "recipe": recipe(training={"distillation": {"kind": "none", "omega": 0}}),
        "train_data": records(),
        "processor": tiny_processor(),
        "progress": False,
        "formats": (),
    }


def compile_until_killed(directory: Path) -> None:
    learn = stage.train_learner

    def killed(*arguments: Any, **more: Any) -> Any:
        def die(row: dict[str, Any]) -> None:
            if row["step"] == 3 and "ce" in row:
                os.kill(os.getpid(), signal.SIGKILL)

        return learn(*arguments, **{**more, "log": die})

    stage.train_learner = killed  # type: ignore[assignment]
    gracec.compile(tiny_llava(tie=True), output_dir=directory, **options())


def test_a_killed_compilation_resumes_to_the_same_codes(
    llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    whole = gracec.compile(llava, output_dir=tmp_path / "whole", **options())
    assert in_a_child(compile_until_killed, tmp_path / "out") == signal.SIGKILL
    assert (tmp_path / "out.training").is_dir() and not (tmp_path / "out").exists()
    with pytest.raises(GracecError, match="an earlier run was interrupted here"):
        gracec.compile(llava, output_dir=tmp_path / "out", **options())
    again = gracec.compile(llava, output_dir=tmp_path / "out", resume=True, **options())
    assert any("resumed after optimizer step 2" in note.text for note in again.report.notes)
    assert again.report.training == whole.report.training
    for fqn, weight in whole.weights.items():
        assert torch.equal(weight.stored, again.weights[fqn].stored)
        assert torch.equal(weight.scales, again.weights[fqn].scales)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"vision_patch_size": 16}, "the number of visual tokens is 16 .* and 4"),
        ({"image_token_index": 7}, "the image token is 4 .* and 7"),
    ],
)
def test_a_teacher_that_speaks_otherwise_is_refused(
    other: dict[str, Any], reason: str, llava: LlavaForConditionalGeneration
) -> None:
    with pytest.raises(GracecError, match=reason):
        check_teacher(llava, tiny_llava(**other))


def test_a_teacher_that_counts_the_tokens_of_a_grid_otherwise_is_refused() -> None:
    """Patches of one size, merged into fewer tokens."""
    teacher = tiny_model("qwen2_vl")
    check_teacher(tiny_model("qwen2_vl"), teacher)
    teacher.config.vision_config.spatial_merge_size = 1
    with pytest.raises(GracecError, match="the number of visual tokens is 4 .* and 16"):
        check_teacher(tiny_model("qwen2_vl"), teacher)


def test_a_teacher_that_reads_a_batch_otherwise_is_refused(
    llava: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, teacher = type(family_of(llava)), tiny_llava(seed=7)
    usual = family.text_inputs

    def text_inputs(self: Any, model: Any, batch: Any) -> dict[str, Tensor]:
        found = usual(self, model, batch)
        return {**found, "attention_mask": found["attention_mask"] * (1 + (model is teacher))}

    monkeypatch.setattr(family, "text_inputs", text_inputs)
    with pytest.raises(GracecError, match="teacher: student and teacher do not get the same atten"):
        check_teacher(llava, teacher)
