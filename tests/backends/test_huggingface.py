"""Tensors have the names of released checkpoints, which loaders of other programs look for."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from gracec.backends.awq import Awq
from gracec.backends.compressed_tensors import HuggingFace
from gracec.backends.huggingface import INDEX, modules_of_type
from gracec.frozen import Frozen
from gracec.quant import QuantSpec
from tests.backends.artifacts import dense_model, random_artifact
from tests.tiny_families import tiny_model

OLDER = {
    "model.language_model": "language_model.model",
    "lm_head": "language_model.lm_head",
    "model.vision_tower": "vision_tower.vision_model",
    "model.multi_modal_projector": "multi_modal_projector",
    "model.image_newline": "image_newline",
}
"""Checkpoints from before transformers 4.52."""
QWEN2 = {"model.language_model": "model", "model.visual": "visual"}
RELEASED: dict[str, dict[str, str]] = {
    "llava": OLDER,  # llava-hf/llava-1.5-7b-hf
    "llava_onevision": OLDER,  # llava-hf/llava-onevision-qwen2-0.5b-ov-hf
    "gemma3": OLDER,  # google/gemma-3-4b-it
    "paligemma": OLDER,  # google/paligemma2-3b-pt-224
    "qwen2_vl": QWEN2,  # Qwen/Qwen2-VL-2B-Instruct
    "qwen2_5_vl": QWEN2,  # Qwen/Qwen2.5-VL-3B-Instruct
    "qwen3_vl": {},  # Qwen/Qwen3-VL-2B-Instruct
    "idefics3": {},  # HuggingFaceM4/Idefics3-8B-Llama3
    "smolvlm": {},  # HuggingFaceTB/SmolVLM-256M-Instruct
}
"""Family -> module of the model -> what it is called in checkpoints that were released; of the
others nobody looked."""


def decoder_artifact(model: PreTrainedModel) -> Frozen:
    """Every linear of the decoder's layers in random 4-bit codes."""
    names = modules_of_type(model, nn.Linear)
    found = [name for name in names if re.search(r"(language|text)_model\.layers", name)]
    assert found
    specs = {f"{name}.weight": QuantSpec(4, 32) for name in found}
    return random_artifact(specs, model=model)


def released_name(fqn: str, family: str) -> str:
    modules = (old for old in RELEASED[family] if fqn.startswith(f"{old}.") or fqn == old)
    old = next(modules, "")
    return RELEASED[family][old] + fqn.removeprefix(old) if old else fqn


@pytest.mark.parametrize("family", RELEASED)
def test_names_are_those_of_released_checkpoints(family: str, tmp_path: Path) -> None:
    artifact = decoder_artifact(tiny_model(family, dtype=torch.bfloat16))
    expected = {released_name(fqn, family): fqn for fqn in artifact.others}
    weights = {released_name(fqn, family) for fqn in artifact.weights}
    for form, suffixes in (
        (HuggingFace(), ("weight_packed", "weight_scale", "weight_shape")),
        (Awq(), ("qweight", "qzeros", "scales")),
    ):
        form.write(artifact, tmp_path / form.name)
        index = json.loads((tmp_path / form.name / INDEX).read_text())["weight_map"]
        packed = {name.removesuffix("weight") + end for name in weights for end in suffixes}
        assert set(index) == {*expected, *packed}, form.name
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values())
    stored = model.state_dict()
    for fqn in artifact.others:
        assert torch.equal(stored[fqn], artifact.others[fqn]), fqn
    tokens = torch.arange(8, 20)[None]
    with torch.no_grad():
        found, dense = (one(input_ids=tokens).logits for one in (model, dense_model(artifact)))
    assert torch.equal(found, dense)
