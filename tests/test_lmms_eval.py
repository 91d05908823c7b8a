"""The model for lmms-eval: its answers are those of `gracec eval`, and what it refuses.

All but the last tests run without lmms-eval, which calls nothing but what they call.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import gracec
from gracec import lmms_eval as plugin
from gracec.compiled import CompiledModel
from gracec.data import pictures
from gracec.errors import GracecError
from gracec.evaluate import VqaSample, evaluate_vqa, load_image
from gracec.lmms_eval import Gracec, Settings
from tests.tiny import tiny_image, tiny_llava, tiny_processor

ROOT = Path(__file__).parents[1]
TASK = ROOT / "examples/lmms_eval"
STUDENT = ROOT / "examples/emojivqa/student"
QUESTIONS = ("what is this ?", "where is the small red circle ?", "how many ?")
GREEDY = {"max_new_tokens": 4, "do_sample": False, "temperature": 0, "top_p": None, "num_beams": 1}
EXTRA = "needs lmms-eval: pip install 'gracec[lmms-eval]'"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face model with its processor."""
    path = tmp_path_factory.mktemp("lmms") / "model"
    tiny_llava(tie=True).save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> Gracec:
    """Of that directory, two documents a batch."""
    return Gracec(pretrained=directory, batch_size=2)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, compiled: CompiledModel) -> Path:
    path = tmp_path_factory.mktemp("lmms") / "int4"
    compiled.save_pretrained(path, ())
    return path


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[VqaSample]:
    folder = tmp_path_factory.mktemp("images")
    found = []
    for number in range(5):
        tiny_image(number).save(folder / f"{number}.png")
        question = QUESTIONS[number % len(QUESTIONS)]
        found.append(VqaSample(folder / f"{number}.png", question, "red"))
    return found


def ask(
    model: Any,
    questions: list[str],
    visuals: list[Any],
    options: Mapping[str, Any] | Callable[[int], Mapping[str, Any]] = GREEDY,
) -> list[Any]:
    """Requests as lmms-eval makes them, about documents that hold nothing but their visuals."""
    model.task_dict = {"shapes": {"test": visuals}}
    return [
        SimpleNamespace(
            args=(
                question,
                dict(options(number) if callable(options) else options),
                lambda document: document,
                number,
                "shapes",
                "test",
            )
        )
        for number, question in enumerate(questions)
    ]


@pytest.mark.parametrize("kind", ["directory", "artifact"])
def test_answers_are_those_of_the_evaluation(
    kind: str, samples: list[VqaSample], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    model = Gracec(pretrained=str(path), batch_size="2")
    assert isinstance(model.model, CompiledModel) == (kind == "artifact")
    report = evaluate_vqa(
        model.model, model.processor, samples, batch_size=2, max_new_tokens=4, blind=False
    )
    requests = ask(
        model, [one.question for one in samples], [[load_image(one.image)] for one in samples]
    )
    found = model.generate_until(requests)
    assert found == [one.predicted for one in report.predictions]
    assert len(set(found)) > 1
    assert model.device == model.model.device


def test_documents_without_a_picture_are_asked_as_texts(
    model: Gracec, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[bool]] = []
    real = plugin.answers

    def answers(*args: Any, **options: Any) -> list[str]:
        seen.append([image is None for image in args[3]])
        return real(*args, **options)

    monkeypatch.setattr(plugin, "answers", answers)
    mixed = model.generate_until(ask(model, list(QUESTIONS[:2]), [[tiny_image()], []]))
    alone = model.generate_until(ask(model, [QUESTIONS[1]], [None]))
    assert seen == [[False, True], [True]]
    assert mixed[1:] == alone


def test_pictures_are_converted_as_those_of_a_folder(model: Gracec) -> None:
    grey = tiny_image(3).convert("L")
    both = [[grey], [grey.convert("RGB")]]
    first, second = model.generate_until(ask(model, [QUESTIONS[0]] * 2, both))
    assert first == second


def test_batches_are_neighbours_with_the_same_settings(
    model: Gracec, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def answers(_: Any, __: Any, questions: list[str], *___: Any, **options: Any) -> list[str]:
        seen.append((len(questions), options["max_new_tokens"]))
        return [f"{question}. rest" for question in questions]

    monkeypatch.setattr(plugin, "answers", answers)
    requests = ask(
        model,
        list("abcdef"),
        [[tiny_image()]] * 6,
        lambda number: {"max_new_tokens": 4 if number < 3 else 9, "until": [".", " r"]},
    )
    assert model.generate_until(requests) == list("abcdef")
    assert seen == [(2, 4), (1, 4), (2, 9), (1, 9)]


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, Settings(1024, ())),
        ({"until": "\n\n", "do_sample": None}, Settings(1024, ("\n\n",))),
        ({"until": ["", "a", "b"], "max_new_tokens": 3}, Settings(3, ("a", "b"))),
        ({"temperature": 0.7, "do_sample": False, "top_p": 0.9, "top_k": 5}, Settings()),
        ({"image_aspect_ratio": "original", "visual_cot": False}, Settings()),
    ],
)
def test_settings(options: dict[str, Any], settings: Settings) -> None:
    assert Settings.read(options, "task x") == settings


@pytest.mark.parametrize(
    ("text", "until", "cut"),
    [
        ("red\n\nbecause", ("\n\n",), "red"),
        ("red, blue. green", (".", ","), "red"),
        ("red", ("\n\n",), "red"),
        ("red.", (), "red."),
    ],
)
def test_an_answer_ends_before_the_first_stop(text: str, until: tuple[str, ...], cut: str) -> None:
    assert Settings(until=until).cut(text) == cut


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True}, "^task shapes: the task asks for sampled .* --gen_kwargs do_sample"),
        ({"temperature": 0.2}, "sampled answers"),
        ({"num_beams": 4}, "beam search"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"max_new_tokens": "many"}, "not 'many'"),
        ({"until": [3]}, "until must be a text or a list of texts"),
        ({"until": 3}, "until must be a text or a list of texts"),
        ({"repetition_penalty": 1.2}, "'repetition_penalty' is not supported"),
    ],
)
def test_settings_that_are_refused(
    model: Gracec, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever comes first, nothing is generated.
    monkeypatch.setattr(plugin, "answers", None)
    requests = ask(
        model, ["a", "b"], [[tiny_image()]] * 2, lambda number: options if number else GREEDY
    )
    with pytest.raises(GracecError, match=message):
        model.generate_until(requests)


@pytest.mark.parametrize(
    ("visuals", "message"),
    [
        ([tiny_image(), tiny_image()], "about one picture, and the document has 2"),
        (["film.mp4"], "the document has a str, perhaps a video or a sound"),
        ([{"array": [], "sampling_rate": 16000}], "the document has a dict"),
    ],
)
def test_documents_that_are_refused(model: Gracec, visuals: Any, message: str) -> None:
    requests = ask(model, [QUESTIONS[0]] * 2, [[tiny_image()], visuals])
    with pytest.raises(GracecError, match=f"^task shapes, document 1: .*{message}"):
        model.generate_until(requests)


def test_a_picture_of_too_many_pixels_is_refused(
    model: Gracec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 32 * 32)
    requests = ask(model, [QUESTIONS[0]] * 2, [[tiny_image()], [Image.new("L", (33, 32))]])
    with pytest.raises(GracecError, match="^task shapes, document 1: the picture has 33 x 32 pi"):
        model.generate_until(requests)


def test_a_document_that_the_processor_refuses_is_named(model: Gracec) -> None:
    requests = ask(model, [QUESTIONS[0], "what is <image> ?"], [[tiny_image()]] * 2)
    with pytest.raises(GracecError, match="^task shapes, document 1: the processor refuses"):
        model.generate_until(requests)


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("loglikelihood", "likelihood"),
        ("generate_until_multi_round", "several rounds"),
        ("generate_visual_cot", "generated pictures"),
    ],
)
def test_tasks_that_are_refused(model: Gracec, method: str, wanted: str) -> None:
    with pytest.raises(GracecError, match=f"^task shapes: the task asks for .*{wanted}"):
        getattr(model, method)(ask(model, ["a"], [[tiny_image()]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": None}, "--model_args: no model is named; add pretrained=DIRECTORY"),
        ({"pretrained": 12}, "12: no such model directory"),
        ({"dtypes": "x"}, "--model_args: unknown option 'dtypes'; known are pretrained, backend"),
        ({"dtype": "int3"}, "dtype: unknown dtype 'int3'; use float32, bfloat16, float16"),
        ({"device": "meta"}, "device: nothing can be computed on meta"),
        ({"batch_size": "auto"}, "--batch_size: must be a number from 1, not 'auto'"),
        ({"batch_size": 0}, "--batch_size: must be a number from 1, not 0"),
    ],
)
def test_models_that_are_refused(directory: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GracecError, match=message):
        Gracec(**{"pretrained": directory, **options})


def test_one_process_one_device_one_template(
    directory: Path, model: Gracec, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.device.type == "cpu"
    assert Gracec(pretrained=directory, device="cpu").device.type == "cpu"
    narrow = Gracec(pretrained=directory, dtype="bfloat16")
    assert narrow.model.dtype == torch.bfloat16
    with pytest.raises(GracecError, match="^--apply_chat_template: every prompt"):
        _ = model.chat_template
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GracecError, match="^WORLD_SIZE: gracec answers in one process"):
        Gracec(pretrained=directory)


def test_a_backend_is_handed_on_to_load(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, compiled: CompiledModel
) -> None:
    asked: list[Any] = []

    with pytest.raises(GracecError, match="^unknown target 'onyx'; did you mean 'onnx'"):
        Gracec(pretrained=artifact, backend="onyx")

    def load(name: str, target: str | None, **options: Any) -> CompiledModel:
        asked.append((name, target, options))
        return compiled

    monkeypatch.setattr("gracec.compiled.load", load)
    assert Gracec(pretrained=artifact, backend="auto").model is compiled
    placed = {"revision": 12, "device": "cpu", "dtype": "float32"}
    assert Gracec(pretrained=artifact, backend="onnx", **placed).model is compiled
    nowhere = {"revision": None, "device": None, "dtype": None}
    there = {"revision": "12", "device": torch.device("cpu"), "dtype": torch.float32}
    assert asked == [(str(artifact), None, nowhere), (str(artifact), "onnx", there)]


def test_the_entry_point_leads_to_the_class() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    target = project["entry-points"]["lmms_eval.models"]["gracec"]
    module, _, function = target.partition(":")
    assert getattr(importlib.import_module(module), function) is plugin.manifest


# --- The task ------------------------------------------------------------------------------------


def task_functions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("questions", TASK / "questions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_functions_of_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRACEC_QUESTIONS", raising=False)
    with pytest.raises(GracecError, match="^GRACEC_QUESTIONS: names no folder of questions"):
        task_functions()
    monkeypatch.setenv("GRACEC_QUESTIONS", str(tmp_path))
    with pytest.raises(GracecError, match="^GRACEC_QUESTIONS: names no folder of questions"):
        task_functions()
    tiny_image(1).save(tmp_path / "1.png")
    question = {"image": "1.png", "question": "what ?", "answer": "Top left", "type": "where"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(question))
    task = task_functions()
    assert {"data_files": {"test": str(tmp_path / "samples.jsonl")}} == task.DATASET
    (picture,) = task.picture(question)
    assert isinstance(picture, Image.Image)
    assert task.score(question, ["top  LEFT."]) == {"exact_match": 1, "exact_match_where": 1}
    assert task.score(question, ["left"]) == {"exact_match": 0, "exact_match_where": 0}
    del question["type"]
    assert task.score(question, ["left"]) == {"exact_match": 0, "exact_match_all": 0}


def test_the_task_counts_every_type() -> None:
    from emojivqa.questions import TYPES

    text = (TASK / "emojivqa.yaml").read_text(encoding="utf-8")
    for name in TYPES:
        assert f"metric: exact_match_{name}\n" in text


# --- With lmms-eval ------------------------------------------------------------------------------


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **quiet, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_lmms_eval_finds_the_model() -> None:
    pytest.importorskip("lmms_eval", reason=EXTRA)
    models = importlib.import_module("lmms_eval.models")
    assert models.get_model("gracec") is Gracec


@pytest.mark.slow
@pytest.mark.parametrize("compiles", [False, True], ids=["student", "int4"])
def test_lmms_eval_prints_the_figures_of_gracec_eval(compiles: bool, tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval", reason=EXTRA)
    from make_dataset import write

    data, results = tmp_path / "data", tmp_path / "results"
    assert write("test", data, 40) == 40
    model = STUDENT
    if compiles:
        model = tmp_path / "int4"
        gracec.compile(STUDENT, "w4a16-ptq", output_dir=model, formats=())
    done = run("gracec.cli", "eval", model, "--data", data, "--batch-size", 16, "--json")
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout)
    done = run(
        *("lmms_eval", "--model", "gracec", "--model_args", f"pretrained={model}"),
        *("--include_path", TASK, "--tasks", "emojivqa", "--batch_size", 16),
        *("--log_samples", "--output_path", results),
        GRACEC_QUESTIONS=str(data),
        HF_HOME=str(tmp_path / "cache"),
    )
    written = list(results.rglob("*_results.json"))
    assert len(written) == 1, done.stdout + done.stderr  # lmms-eval ends with 0 in any case
    scores = json.loads(written[0].read_text())["results"]["emojivqa"]
    assert scores["exact_match,none"] == pytest.approx(expected["overall"]["accuracy"])
    for name, score in expected["types"].items():
        assert scores[f"exact_match_{name},none"] == pytest.approx(score["accuracy"])
    (logged,) = results.rglob("*_samples_emojivqa.jsonl")
    answers = [json.loads(line) for line in logged.read_text().splitlines()]
    answers.sort(key=lambda one: int(one["doc_id"]))
    assert [one["filtered_resps"] for one in answers] == [
        one["predicted"] for one in expected["predictions"]
    ]
