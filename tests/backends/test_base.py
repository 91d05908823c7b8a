import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from gracec.backends import huggingface
from gracec.backends.base import Format, all_formats, check_formats, parse_formats
from gracec.backends.compressed_tensors import HuggingFace
from gracec.backends.huggingface import largest_modules, module_patterns
from gracec.backends.onnx.format import Onnx
from gracec.errors import GateError, GracecError
from gracec.frozen import Frozen
from gracec.journal import Equal, Note
from gracec.quant import QuantSpec
from gracec.quant.frozen import FrozenWeight
from gracec.quant.observers import ActivationSpec
from gracec.report import Report
from gracec.request import Request
from gracec.stages.publish import write_artifact
from tests.backends.artifacts import decoder_specs, random_artifact, random_weight
from tests.signed import signed_recipe
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
def artifact() -> Frozen:
    return random_artifact(decoder_specs(G32), tie=True)


def test_formats_are_found_by_name_and_folder() -> None:
    known = all_formats()
    assert {"hf", "torchao", "awq", "onnx", "gguf"} <= set(known)
    assert len({form.folder for form in known.values()}) == len(known)
    assert [form.name for form in parse_formats("awq, hf,awq")] == ["awq", "hf"]
    assert [form.name for form in parse_formats(("hf",))] == ["hf"]
    for text in ("all", "hf,all"):
        assert {form.name for form in parse_formats(text)} == set(known) - {"gguf"}


def test_a_format_without_negative_scales_gets_positive_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(HuggingFace, "holds_signed", False)
    signed, out = signed_recipe(), tmp_path / "out"
    request = Request.checked(None, signed, formats="hf,torchao", output_dir=out)
    assert request.notes == (Note("", "format hf takes no negative scales: unsigned"),)
    assert request.recipe.weights == signed_recipe(signed=False).weights
    with pytest.raises(GracecError, match="recipe signed: format hf takes no negative scales"):
        Request.checked(None, signed, formats="hf", output_dir=out, strict=True)
    for formats, place in (("torchao", out), ("hf", None)):  # which nothing is written in
        assert Request.checked(None, signed, formats=formats, output_dir=place).recipe == signed


def test_a_format_refuses_signed_scales_that_it_does_not_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    signed = random_artifact(decoder_specs(replace(G32, signed=True)))
    built_in = [one for one in all_formats().values() if type(one).__module__[:7] == "gracec."]
    assert len(built_in) == 5
    check_formats([one for one in built_in if not one.by_name_alone], signed)
    for kind in (HuggingFace, Onnx):
        monkeypatch.setattr(kind, "holds_signed", False)
        message = (
            f"format {kind.name}: .* has signed scales, and it takes no negative ones; compile"
        )
        with pytest.raises(GracecError, match=message):
            check_formats([kind()], signed)
        with pytest.raises(GracecError, match=message):
            kind().write(signed, tmp_path / kind.name)
        check_formats([kind()], random_artifact(decoder_specs(G32)))


def test_no_format_is_asked_for_by_name_too() -> None:
    assert parse_formats("none") == parse_formats(()) == []
    with pytest.raises(GracecError, match="format none stands alone"):
        parse_formats("none,hf")


def test_an_unknown_format_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(GracecError, match="unknown format 'torcha'; did you mean 'torchao'?"):
        parse_formats("hf,torcha")
    with pytest.raises(GracecError, match="unknown format ''; known: awq, gguf, hf, onnx, torchao"):
        parse_formats("")


def test_formats_that_would_write_over_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Onnx, "folder", "awq")
    with pytest.raises(GracecError) as error:
        parse_formats("hf,awq,onnx")
    assert str(error.value) == (
        "formats awq and onnx both write to the folder 'awq'; ask for one of them"
    )
    assert len(parse_formats("hf,onnx")) == 2


class Plain(Format):
    """Refuses nothing of its own, and stores what it is told."""

    folder = "plain"

    def __init__(self, stored: dict[str, Tensor] | None = None) -> None:
        self.name = "plain"  # not of the class, which would be registered
        self.stored = stored or {}

    def write(self, frozen: Frozen, directory: Path) -> tuple[str, ...]:
        raise NotImplementedError

    def stored_weights(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        yield from self.stored.items()


def test_a_format_refuses_what_it_says_that_it_does_not_hold(
    artifact: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Plain().refusal(artifact) == ""
    fqn, weight = next(iter(artifact.weights.items()))
    spec = ActivationSpec(8, "per_tensor", 128)
    rounded = FrozenWeight.planned((weight.shape[0], weight.shape[1]), weight.spec, spec)
    quantized = replace(artifact, weights={fqn: rounded})
    assert Plain().refusal(quantized) == (
        f"the input of {fqn} is quantized, which the format cannot say"
    )
    monkeypatch.setattr(Plain, "holds_activations", True)
    assert Plain().refusal(quantized) == ""


def test_what_is_read_back_is_compared_with_all_that_the_model_has(
    artifact: Frozen, tmp_path: Path
) -> None:
    stored = {fqn: w.dequantize(artifact.dtype) for fqn, w in artifact.weights.items()}
    other, tensor = next(iter(artifact.others.items()))
    Plain(stored).check_stored_weights(artifact, tmp_path)
    Plain({**stored, other: tensor}).check_stored_weights(artifact, tmp_path)
    fqn = min(stored)
    cases = {
        "reads back other than codes times scales": {**stored, fqn: stored[fqn] * 2},
        f"{other} reads back other than it is": {**stored, other: tensor + 1},
        "x reads back, and the model has none": {**stored, "x": tensor},
        f"{fqn} does not read back": {name: w for name, w in stored.items() if name != fqn},
    }
    for reason, wrong in cases.items():
        with pytest.raises(GateError, match=reason):
            Plain(wrong).check_stored_weights(artifact, tmp_path)


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


def test_what_no_format_can_hold_is_refused(artifact: Frozen, tmp_path: Path) -> None:
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


def test_an_artifact_must_be_whole(artifact: Frozen, tmp_path: Path) -> None:
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
    artifact: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    pack = HuggingFace.tensors
    fqn = next(iter(artifact.weights))

    def wrong(form: HuggingFace, item: Frozen) -> tuple[dict[str, Tensor], dict[str, str]]:
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


def test_a_weight_that_does_not_read_back_is_an_error(
    artifact: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = HuggingFace.stored_weights
    monkeypatch.setattr(
        HuggingFace, "stored_weights", lambda form, directory: list(read(form, directory))[:-1]
    )
    with pytest.raises(GateError, match="format hf: .* does not read back"):
        HuggingFace().write(artifact, tmp_path)


def test_large_models_are_written_in_shards(
    artifact: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "MAX_SHARD_SIZE", "40KB")
    for form in parse_formats("hf,torchao"):
        target = tmp_path / form.name
        form.write(artifact, target)
        assert len(list(target.glob("model-*-of-*.safetensors"))) > 2
        _, info = AutoModelForImageTextToText.from_pretrained(target, output_loading_info=True)
        assert not any(info.values())


def test_other_safetensors_files_are_not_in_the_index(artifact: Frozen, tmp_path: Path) -> None:
    (tmp_path / "gracec.safetensors").write_bytes(b"other")
    HuggingFace().write(artifact, tmp_path)
    index = json.loads((tmp_path / huggingface.INDEX).read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert (tmp_path / "gracec.safetensors").read_bytes() == b"other"


def test_the_processor_is_the_same_for_all_readers(artifact: Frozen, tmp_path: Path) -> None:
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


def test_the_model_card_says_what_was_done(artifact: Frozen, tmp_path: Path) -> None:
    report = Report({"name": "test", "weights": {}}, [], (), {"gate": Equal(3, "batches")}, {})
    write_artifact(tmp_path / "a", artifact, [HuggingFace()], report)
    _, front, text = (tmp_path / "a" / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["base_model"] == "maker/model"
    assert fields["pipeline_tag"] == "image-text-to-text"
    assert fields["library_name"] == "transformers"
    assert "gracec compile maker/model --recipe test.yaml --format hf --out DIR" in text
    assert "No GPU runtime was run" in text
    assert "Its accuracy was not measured" in text
    write_artifact(tmp_path / "local", replace(artifact, name="model"), [HuggingFace()], report)
    assert "base_model" not in (tmp_path / "local" / "README.md").read_text()


@pytest.mark.slow
def test_the_example_answers(artifact: Frozen, tmp_path: Path) -> None:
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
    huggingface.write_processor(processor, tmp_path)
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
    huggingface.write_processor(again, tmp_path / "again")
    assert json.loads((tmp_path / "again/processor_config.json").read_text()) == fields
