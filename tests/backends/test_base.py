import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from gracec.backends import base
from gracec.backends.base import (
    Artifact,
    all_formats,
    largest_modules,
    module_patterns,
    parse_formats,
)
from gracec.backends.hf import HuggingFace
from gracec.errors import GateError, GracecError
from gracec.quant import QuantSpec
from tests.backends.artifacts import decoder_specs, random_artifact, random_weight
from tests.tiny import (
    CHAT_TEMPLATE,
    IMAGE_SIZE,
    IMAGE_TOKENS,
    PATCH_SIZE,
    tiny_batch,
    tiny_image,
    tiny_processor,
)

ROOT = Path(__file__).parents[2]
G32 = QuantSpec(4, 32)


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return random_artifact(decoder_specs(G32), tie=True)


def test_formats_are_found_by_name_and_folder() -> None:
    known = all_formats()
    assert {"hf", "torchao", "awq", "onnx"} <= set(known)
    assert len({form.folder for form in known.values()}) == len(known)
    assert [form.name for form in parse_formats("awq, hf,awq")] == ["awq", "hf"]
    assert [form.name for form in parse_formats(("hf",))] == ["hf"]
    for text in ("all", "hf,all"):
        assert {form.name for form in parse_formats(text)} == set(known)


def test_an_unknown_format_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(GracecError, match="unknown format 'torcha'; did you mean 'torchao'?"):
        parse_formats("hf,torcha")
    with pytest.raises(GracecError, match="unknown format ''; known: awq, hf, onnx, torchao"):
        parse_formats("")


LAYERS = [
    f"{tower}.layers.{i}.{x}" for tower in ("a.vision", "a.text") for i in (1, 10) for x in "qv"
]


@pytest.mark.parametrize(
    ("inside", "paths", "patterns"),
    [
        (LAYERS[:4], ["a.vision"], [r"re:(.*\.)?vision\..*"]),
        (LAYERS[4:6], ["a.text.layers.1"], [r"re:(.*\.)?text\.(.*\.)?1\..*"]),
        (LAYERS[5::2], ["a.text.layers.1.v", "a.text.layers.10.v"], [r"re:(.*\.)?text\.(.*\.)?v$"]),
        (LAYERS[7:], ["a.text.layers.10.v"], [r"re:(.*\.)?text\.(.*\.)?10\.v$"]),
    ],
)
def test_modules_are_named_by_as_little_as_tells_them_apart(
    inside: list[str], paths: list[str], patterns: list[str]
) -> None:
    outside = [name for name in LAYERS if name not in inside]
    assert largest_modules(inside, outside) == paths
    assert module_patterns(inside, outside) == patterns


def test_what_no_format_can_hold_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    form = HuggingFace()
    assert form.refusal(artifact) == ""
    assert form.refusal(replace(artifact, weights={})) == "no weight is quantized"
    fqn, weight = next(iter(artifact.weights.items()))
    odd = {fqn: replace(weight, scales=weight.scales * 1.001)}
    assert "scales are not exact in bfloat16" in form.refusal(replace(artifact, weights=odd))
    for name in ("lm_head.weight", "model.language_model.norm.weight"):
        other = {name: random_weight((128, 64), G32, 0)}
        assert form.refusal(replace(artifact, weights=other)) == (
            f"{name}: is tied to another, or not the weight of a linear layer"
        )
    with pytest.raises(GracecError, match="format hf: no weight is quantized"):
        form.write(replace(artifact, weights={}), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_artifact_must_be_whole(artifact: Artifact, tmp_path: Path) -> None:
    name, tensor = next(iter(artifact.others.items()))
    lacking = {key: value for key, value in artifact.others.items() if key != name}
    with pytest.raises(GracecError, match=f"artifact: lacks {name}"):
        HuggingFace().write(replace(artifact, others=lacking), tmp_path)
    with pytest.raises(GracecError, match="artifact: the model has no x"):
        HuggingFace().write(replace(artifact, others={**artifact.others, "x": tensor}), tmp_path)
    embedding = "model.language_model.embed_tokens.weight"
    lacking = {key: value for key, value in artifact.others.items() if key != embedding}
    with pytest.raises(GracecError, match="artifact: lacks lm_head.weight"):
        HuggingFace().write(replace(artifact, others=lacking), tmp_path)


@pytest.mark.parametrize("change", ["code", "scale", "dropped"])
def test_what_reads_back_otherwise_is_an_error(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    pack = HuggingFace.tensors
    fqn = next(iter(artifact.weights))

    def wrong(form: HuggingFace, item: Artifact) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, metadata = pack(form, item)
        if change == "code":
            tensors[f"{fqn}_packed"][0, 0] += 1
        elif change == "scale":
            tensors[f"{fqn}_scale"][0, 0] *= 2
        else:
            del tensors[f"{fqn}_packed"]
        return tensors, metadata

    monkeypatch.setattr(HuggingFace, "tensors", wrong)
    reason = "was not written" if change == "dropped" else "reads back other than codes times"
    with pytest.raises(GateError, match=reason):
        HuggingFace().write(artifact, tmp_path)


def test_large_models_are_written_in_shards(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "MAX_SHARD_SIZE", "40KB")
    for form in parse_formats("hf,torchao"):
        target = tmp_path / form.name
        form.write(artifact, target)
        assert len(list(target.glob("model-*-of-*.safetensors"))) > 2
        _, info = AutoModelForImageTextToText.from_pretrained(target, output_loading_info=True)
        assert not any(info.values())


def test_other_safetensors_files_are_not_in_the_index(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "gracec.safetensors").write_bytes(b"other")
    HuggingFace().write(artifact, tmp_path)
    index = json.loads((tmp_path / base.INDEX).read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert (tmp_path / "gracec.safetensors").read_bytes() == b"other"


def test_the_processor_is_the_same_for_all_readers(artifact: Artifact, tmp_path: Path) -> None:
    HuggingFace().write(artifact, tmp_path)
    loaded, original = AutoProcessor.from_pretrained(tmp_path), tiny_processor()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
    text = loaded.apply_chat_template(chat, add_generation_prompt=True)
    assert text == original.apply_chat_template(chat, add_generation_prompt=True)
    made = [p(text=text, images=tiny_image(), return_tensors="pt") for p in (loaded, original)]
    for name in ("input_ids", "pixel_values"):
        assert torch.equal(made[0][name], made[1][name])
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == original.chat_template
    image = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert image["processor_class"] == "LlavaProcessor"
    assert image["image_mean"] == list(original.image_processor.image_mean)


def test_the_model_card_says_what_was_done(artifact: Artifact, tmp_path: Path) -> None:
    HuggingFace().write(artifact, tmp_path / "a")
    _, front, text = (tmp_path / "a" / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["base_model"] == "maker/model"
    assert fields["pipeline_tag"] == "image-text-to-text"
    assert fields["library_name"] == "transformers"
    assert "gracec compile maker/model --recipe test.yaml --format hf --out DIR" in text
    assert "No GPU runtime was run" in text
    assert "Its accuracy was not measured" in text
    HuggingFace().write(replace(artifact, source="model"), tmp_path / "local")
    assert "base_model" not in (tmp_path / "local" / "README.md").read_text()


@pytest.mark.slow
def test_the_example_answers(artifact: Artifact, tmp_path: Path) -> None:
    HuggingFace().write(artifact, tmp_path / "model")
    tiny_image().save(tmp_path / "image.png")
    script = ROOT / "examples" / "transformers" / "answer.py"
    options = ["--image", str(tmp_path / "image.png"), "--prompt", "what is this ?"]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "model"), *options, "--max-new-tokens", "3"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.split()) == 3


def test_the_processor_that_transformers_js_reads_makes_the_same_inputs(tmp_path: Path) -> None:
    processor = tiny_processor()
    base.write_processor(processor, tmp_path)
    fields = json.loads((tmp_path / "processor_config.json").read_text())
    rows = columns = IMAGE_SIZE // PATCH_SIZE  # transformers.js adds the extra tokens and no more
    assert rows * columns + fields["num_additional_image_tokens"] == IMAGE_TOKENS
    flat = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert flat["processor_class"] == "LlavaProcessor"
    assert flat["size"] == {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == CHAT_TEMPLATE
    again = AutoProcessor.from_pretrained(tmp_path)
    for name, expected in tiny_batch(processor).items():
        assert torch.equal(tiny_batch(again)[name], expected), name
    base.write_processor(again, tmp_path / "again")
    assert json.loads((tmp_path / "again/processor_config.json").read_text()) == fields
