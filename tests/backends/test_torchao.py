import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig
from torchao.quantization.quant_api import fqn_matches_fqn_config
from transformers import AutoModelForImageTextToText, TorchAoConfig

from gracec.backends.huggingface import modules_of
from gracec.backends.torchao import TorchAo
from gracec.compiled import CompiledModel
from tests.backends.artifacts import artifact_of, decoder_specs, random_artifact
from tests.backends.test_compressed_tensors import CASES, G32, check_loaded


def test_transformers_computes_the_same_bits(
    compiled: CompiledModel, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    artifact = artifact_of(compiled)
    notes = TorchAo().write(artifact, tmp_path)
    assert notes == ("a code takes 8 bits on disk; torchao's 4-bit files run on GPUs only",)
    check_loaded(artifact, tmp_path, batch)


@pytest.mark.parametrize("case", ["narrow", "per tensor", "by role", "by layer", "signed by role"])
def test_every_mixture_of_schemes_loads(
    case: str, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    artifact = random_artifact(
        CASES[case], dtype=torch.float16 if case == "narrow" else torch.bfloat16
    )
    TorchAo().write(artifact, tmp_path)
    check_loaded(artifact, tmp_path, batch)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for fqn, parameter in model.named_parameters():
        assert isinstance(parameter.data, IntxUnpackedToInt8Tensor) == (fqn in artifact.weights)


def test_the_configuration_follows_what_is_quantized(tmp_path: Path) -> None:
    artifact = random_artifact(CASES["by role"])
    TorchAo().write(artifact, tmp_path / "mixed")
    TorchAo().write(random_artifact(decoder_specs(G32)), tmp_path / "one")
    configs = [
        TorchAoConfig.from_dict(
            json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        )
        for name in ("one", "mixed")
    ]
    one, mixed = (config.quant_type for config in configs)
    assert isinstance(one, IntxWeightOnlyConfig)
    assert one.weight_dtype == torch.int4 and one.granularity.group_size == 32
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "mixed")
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    matched = {name for name in linear if fqn_matches_fqn_config(name, mixed)}
    assert matched == set(modules_of(artifact.weights))
