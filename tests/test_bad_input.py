"""Whatever is wrong with the input: one clear line, exit code 2, and nothing half done."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import gracec
from gracec.compiled import CompiledModel
from gracec.errors import GracecError, GracecWarning
from gracec.models.loading import load_model
from tests.test_cli import gracec as command
from tests.tiny import IMAGE, tiny_image, tiny_llava, tiny_processor

NORM = "model.vision_tower.post_layernorm.weight"
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj.weight"
STORED = {
    NORM: "vision_tower.post_layernorm.weight",
    Q_PROJ: "language_model.model.layers.0.self_attn.q_proj.weight",
}
"""Name in memory -> name in the files."""


def refused(model: Path, message: str, *arguments: object) -> None:
    """`gracec compile` says so in one line and writes nothing; `gracec.compile` raises the same."""
    output = model.parent / "out"
    done = command("compile", model, "--out", output, *arguments)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("gracec: ") and message in lines[0], lines
    assert done.stdout == ""
    assert not output.exists()
    if not arguments:
        with pytest.raises(GracecError) as error:
            gracec.compile(model)
        assert message in str(error.value)


def edit_weights(model: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_not_a_vision_language_model(model: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 32}
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **shape)
    LlamaForCausalLM(config).save_pretrained(model)
    refused(model, "model type 'llama' is not a vision-language model")


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("lava", "model type 'lava' is unknown to transformers"),
        (None, "model type None is unknown to transformers"),
    ],
)
def test_an_unknown_model_type(model: Path, model_type: str | None, message: str) -> None:
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**fields, "model_type": model_type}))
    refused(model, message)


def test_an_unsupported_family(model: Path) -> None:
    fields = json.loads((model / "config.json").read_text())
    name = "LlavaNextVideoForConditionalGeneration"
    fields |= {"model_type": "llava_next_video", "architectures": [name]}
    fields["image_grid_pinpoints"] = [[32, 32]]
    (model / "config.json").write_text(json.dumps(fields))
    refused(model, "the family 'llava_next_video' has no adapter, and without one the model can")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "not a JSON object but a list"),
        ('"text"', "not a JSON object but text"),
    ],
)
def test_a_broken_configuration(model: Path, text: str, message: str) -> None:
    (model / "config.json").write_text(text)
    refused(model, f"config.json: {message}")


def test_no_checkpoint(model: Path) -> None:
    (model / "model.safetensors").unlink()
    refused(model, "no weights")


def test_a_truncated_checkpoint(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(model, f"{file}: truncated or no safetensors file")


def test_a_missing_shard(tmp_path: Path) -> None:
    model = tmp_path / "sharded"
    tiny_llava().save_pretrained(model, max_shard_size="200KB")
    tiny_processor().save_pretrained(model)
    (model / "model-00002-of-00003.safetensors").unlink()
    refused(model, "model-00002-of-00003.safetensors: this shard is missing")


def test_a_missing_tensor(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.__delitem__(STORED[Q_PROJ]))
    refused(model, f"the checkpoint lacks {Q_PROJ}")


def test_a_tensor_of_another_shape(model: Path) -> None:
    wrong = {STORED[Q_PROJ]: torch.zeros(5, 64)}
    edit_weights(model, lambda tensors: tensors.update(wrong))
    refused(model, f"{Q_PROJ} is (5, 64) in the checkpoint, (64, 64) by the configuration")


def test_tensors_that_are_not_in_the_model_are_a_warning(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.update({"rest.weight": torch.zeros(2)}))
    with pytest.warns(GracecWarning, match="1 tensors of the checkpoint.*rest.weight"):
        load_model(model)
    done = command("opt", model, "--passes", "analyze-modality")
    assert done.returncode == 0
    (warning,) = [line for line in done.stderr.splitlines() if "warning" in line]
    assert warning.startswith("gracec: warning: ") and "rest.weight" in warning


@pytest.mark.parametrize("name", [Q_PROJ, NORM])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_planned_or_not(model: Path, name: str, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[STORED[name]].view(-1)[-1] = value

    edit_weights(model, spoil)
    refused(model, f"{name} holds NaN or infinity")


@pytest.mark.parametrize("inplace", [True, False])
def test_a_model_object_is_checked_too(inplace: bool) -> None:
    model = tiny_llava()
    with torch.no_grad():
        model.get_parameter(NORM)[0] = float("nan")
    with pytest.raises(GracecError, match=f"{NORM} holds NaN or infinity"):
        gracec.compile(model, inplace=inplace)


def test_an_unknown_key_of_a_recipe(saved: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("weights: {decoder: {bits: 4, groupsize: 32}}\n")
    done = command("compile", saved, "--out", tmp_path / "out", "--recipe", recipe)
    assert done.returncode == 2
    assert "unknown key 'weights.decoder.groupsize'; did you mean 'group_size'?" in done.stderr


@pytest.mark.slow
def test_a_width_that_no_group_divides(tmp_path: Path) -> None:
    model = tmp_path / "odd"
    tiny_llava(hidden_size=72, intermediate_size=128).save_pretrained(model)
    tiny_processor().save_pretrained(model)
    refused(model, "group 128 does not divide the width 72", "--strict", "--recipe", "w4a16-ptq")
    report = gracec.compile(model).report
    kept = [row for row in report.plan if "no group divides the width" in row.reason]
    assert kept and any("does not divide 72, kept in its precision" in n.text for n in report.notes)


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_an_image_that_cannot_be_read(saved: Path, tmp_path: Path, content: bytes | None) -> None:
    image = tmp_path / "image.png"
    tiny_image(0, (256, 256)).save(image)
    image.write_bytes(image.read_bytes()[:200] if content is None else content)
    done = command("run", saved, "--image", image, "--prompt", "?")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("gracec: ") and "image.png cannot be decoded" in line


def test_a_prompt_cut_inside_its_image_tokens(
    compiled: CompiledModel, batch: dict[str, Tensor]
) -> None:
    row = batch["input_ids"][1]
    start = int(torch.nonzero(row == IMAGE)[0])
    cut = {**batch, **{n: batch[n][:, start + 1 :] for n in ("input_ids", "attention_mask")}}
    message = "sample 1 of the batch: the prompt holds 15 image tokens, which is no whole number of"
    for run in (compiled.generate, compiled):
        with pytest.raises(GracecError, match=message):
            run(**cut)


def test_an_output_directory_that_exists_is_refused_before_loading(model: Path) -> None:
    (model / "model.safetensors").unlink()  # would be refused as well, and later
    done = command("compile", model, "--out", model)
    assert done.returncode == 2
    assert "the output directory exists" in done.stderr
