import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig

from gracec.backends.compressed_tensors import HuggingFace
from gracec.compiled import CompiledModel
from gracec.frozen import Frozen
from gracec.quant import QuantSpec
from tests.backends.artifacts import (
    DECODER,
    artifact_of,
    decoder_specs,
    dense_model,
    logits_of,
    random_artifact,
    tokens_of,
)
from tests.tiny_families import tiny_model

G32, CHANNEL = QuantSpec(4, 32), QuantSpec(8, granularity="per_channel")
SIGNED = replace(G32, signed=True)
"""Half of the scales of a random weight are negative then."""
TOWER = "model.vision_tower.encoder.layers"
PROJECTOR = "model.multi_modal_projector.linear_1.weight"
CASES = {
    "one scheme": decoder_specs(G32),
    "narrow": decoder_specs(QuantSpec(3, 16)),
    "eight bits": decoder_specs(QuantSpec(8, 64)),
    "per tensor": decoder_specs(QuantSpec(4, granularity="per_tensor")),
    "not all layers": {k: v for k, v in decoder_specs(G32).items() if "1.mlp" not in k},
    "by role": {
        **decoder_specs(G32),
        PROJECTOR: CHANNEL,
        f"{TOWER}.0.self_attn.q_proj.weight": QuantSpec(2, 16),
        "lm_head.weight": QuantSpec(8, 64),
    },
    "signed": decoder_specs(SIGNED),
    "signed by role": {
        **decoder_specs(SIGNED),
        PROJECTOR: replace(CHANNEL, signed=True),
        f"{TOWER}.0.self_attn.q_proj.weight": QuantSpec(2, 16, signed=True),
        "lm_head.weight": QuantSpec(8, 64),
    },
    "by layer": {
        **decoder_specs(G32),
        f"{DECODER}.1.self_attn.v_proj.weight": CHANNEL,
        f"{DECODER}.0.mlp.up_proj.weight": QuantSpec(4, 64),
    },
}


def check_loaded(artifact: Frozen, directory: Path, batch: dict[str, Tensor]) -> None:
    """Plain transformers loads every key and computes what the dense weights do, bit for bit."""
    model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == artifact.dtype
    dense = dense_model(artifact)
    assert torch.equal(logits_of(model, batch), logits_of(dense, batch))
    assert torch.equal(tokens_of(model, batch), tokens_of(dense, batch))


def test_transformers_computes_the_same_bits(
    compiled: CompiledModel, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    artifact = artifact_of(compiled)
    (note,) = HuggingFace().write(artifact, tmp_path)  # widths of 64 are no multiple of 128
    assert "2 schemes: load without `dequantize=True`" in note
    check_loaded(artifact, tmp_path, batch)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored  # tied: the key is there once
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    fqn = f"{DECODER}.0.mlp.up_proj.weight"
    assert stored[f"{name}_packed"].dtype == torch.int32
    assert stored[f"{name}_shape"].tolist() == list(artifact.weights[fqn].shape)
    assert torch.equal(stored[f"{name}_scale"].float(), artifact.weights[fqn].scales)


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.bfloat16) for case in CASES), ("by role", torch.float32)]
)
def test_every_mixture_of_schemes_loads(
    case: str, dtype: torch.dtype, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    artifact = random_artifact(CASES[case], dtype=dtype)
    HuggingFace().write(artifact, tmp_path)
    check_loaded(artifact, tmp_path, batch)


def test_the_configuration_follows_what_is_quantized(tmp_path: Path) -> None:
    found = {}
    for case in ("one scheme", "not all layers", "by role"):
        HuggingFace().write(random_artifact(CASES[case]), tmp_path / case)
        fields = json.loads((tmp_path / case / "config.json").read_text())["quantization_config"]
        found[case] = QuantizationConfig.model_validate(fields)
    one = found["one scheme"]
    assert one.ignore == [
        r"re:(.*\.)?lm_head$",
        r"re:(.*\.)?multi_modal_projector\..*",
        r"re:(.*\.)?vision_tower\..*",
    ]
    (group,) = one.config_groups.values()
    assert group.targets == ["Linear"]
    weights = group.weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, 32, True)
    assert r"re:(.*\.)?1\.mlp\..*" in found["not all layers"].ignore
    by_role = found["by role"]
    assert len(by_role.config_groups) == 4
    assert r"re:(.*\.)?lm_head$" not in by_role.ignore
    assert any("linear_2" in pattern for pattern in by_role.ignore)


def test_narrow_codes_are_named_in_the_notes(tmp_path: Path) -> None:
    notes = HuggingFace().write(random_artifact(CASES["narrow"]), tmp_path)
    assert notes == ("codes narrower than 4 bits are stored in 4 (14 weights)",)


@pytest.mark.parametrize(
    ("case", "exact"), [("eight bits", True), ("signed", True), ("by layer", False)]
)
def test_dequantizing_at_load_is_exact_for_one_scheme_only(
    case: str, exact: bool, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """Why there is a note: transformers loads a mixture by its first scheme, without an error. Not
    all of its versions do; none is promised to load a mixture right."""
    artifact = random_artifact(CASES[case])
    notes = HuggingFace().write(artifact, tmp_path)
    assert any("dequantize=True" in note for note in notes) != exact
    dequantize = CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="loading attributes .* will be overwritten"):
        model = AutoModelForImageTextToText.from_pretrained(
            tmp_path, quantization_config=dequantize
        )
    if exact:
        assert torch.equal(logits_of(model, batch), logits_of(dense_model(artifact), batch))


def test_two_writes_are_equal_byte_for_byte(tmp_path: Path) -> None:
    artifact = random_artifact(CASES["by role"])
    for name in "ab":
        HuggingFace().write(artifact, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_weights_of_a_siglip_tower_are_refused() -> None:
    name = "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    model: Any = tiny_model("gemma3")
    refusal = HuggingFace().refusal(random_artifact({name: G32}, model=model))
    assert refusal.startswith("model.vision_tower") and "SigLIP" in refusal
