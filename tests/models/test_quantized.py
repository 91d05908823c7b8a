"""Checkpoints whose weights are quantized already."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gracec
from gracec.doctor import BLOCKED, diagnose
from gracec.errors import GracecError
from gracec.models.loading import load_model
from gracec.models.quantized import check_full_precision
from gracec.stages.source import weights_source
from tests.tiny import tiny_config, tiny_llava, tiny_processor

BLOCK = 32


def configured(directory: Path, quantization: dict[str, Any]) -> Path:
    """A tiny LLaVA whose configuration says how its weights are quantized."""
    tiny_llava(dtype=torch.bfloat16).save_pretrained(directory)
    tiny_processor().save_pretrained(directory)
    file = directory / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "quantization_config": quantization}))
    return directory


def fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values and the scale of each block, as DeepSeek and Qwen store them."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scales[:, None, :, None]).view(rows, columns)
    return values.to(torch.float8_e4m3fn), scales


@pytest.fixture
def fp8_model(tmp_path: Path) -> Path:
    directory = configured(
        tmp_path / "fp8",
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head", "vision_tower", "multi_modal_projector"],
        },
    )
    file, tensors = directory / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        tensors[name] = tensor
        if "language_model" in name and name.endswith("proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = fp8(tensor)
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in tensors.values()) == 14
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def test_fp8_weights_are_what_they_stand_for_and_that_is_said(fp8_model: Path) -> None:
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(fp8_model / "model.safetensors")
    values, scales = tensors[name].float(), tensors[f"{name}_scale_inv"]
    expected = values * scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    weight = load_model(fp8_model).model.language_model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight, expected.to(weight.dtype))
    compiled = gracec.compile(fp8_model, "w4a16-ptq")
    assert len(compiled.weights) == 14
    assert "the checkpoint holds FP8 weights" in str(compiled.report.notes)


@pytest.mark.parametrize(
    "method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", "torchao", "mxfp4"]
)
def test_codes_are_no_weights(method: str, tmp_path: Path) -> None:
    directory = configured(tmp_path / "model", {"quant_method": method, "bits": 4})
    message = f"the weights are quantized already, by {method}; give the full-precision model"
    with pytest.raises(GracecError, match=message) as error:
        gracec.compile(directory, "w4a16-ptq")
    assert "\n" not in str(error.value)
    found = {check.name: check for check in diagnose(directory).checks}
    for name in ("vision-language model", "weights"):  # neither advises to install a package
        assert found[name].status == BLOCKED
        assert message in found[name].detail
    with pytest.raises(GracecError, match=message):
        weights_source(directory)


def test_a_model_in_memory_says_it_in_its_configuration() -> None:
    config = tiny_config()
    assert check_full_precision(config, "here") == ""
    config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(GracecError, match="here: the weights are quantized already, by awq"):
        check_full_precision(config, "here")
