import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.quantizers.quantizers_utils import should_convert_module

from gracec.backends.awq import Awq, pack
from gracec.backends.huggingface import modules_of, modules_of_type
from gracec.frozen import Frozen
from gracec.models.skeleton import skeleton
from gracec.quant import QuantSpec
from tests.backends.artifacts import (
    DECODER,
    decoder_specs,
    dense_model,
    random_artifact,
    random_weight,
    tokens_of,
)
from tests.backends.test_compressed_tensors import G32, PROJECTOR, SIGNED

MODULE = "language_model.model.layers.1.mlp.down_proj"
PARTIAL = {k: v for k, v in decoder_specs(G32).items() if "1.mlp" not in k}


@pytest.fixture(scope="module", params=[G32, SIGNED], ids=str)
def artifact(request: pytest.FixtureRequest) -> Frozen:
    return random_artifact(decoder_specs(request.param), tie=True)


@pytest.fixture(scope="module")
def written(artifact: Frozen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("awq")
    Awq().write(artifact, directory)
    return directory


def float64_weight(stored: dict[str, Tensor], module: str, group_size: int) -> Tensor:
    """The weight [N, K] of a stored module, read with nothing but arithmetic on single words."""
    place = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}  # of each feature in its word
    qweight, qzeros = (stored[f"{module}.{name}"].tolist() for name in ("qweight", "qzeros"))
    scales = stored[f"{module}.scales"].double()
    columns, rows = len(qweight), scales.shape[1]

    def nibble(words: list[int], row: int) -> int:
        return ((words[row // 8] % 2**32) // 16 ** place[row % 8]) % 16

    return torch.tensor(
        [
            [
                (nibble(qweight[k], n) - nibble(qzeros[k // group_size], n))
                * float(scales[k // group_size, n])
                for k in range(columns)
            ]
            for n in range(rows)
        ],
        dtype=torch.float64,
    )


def test_the_order_within_a_word() -> None:
    codes = torch.arange(8, dtype=torch.int8)[None] - 8
    assert pack(codes).tolist() == [[0x75316420]]


def test_an_independent_reading_gives_codes_times_scales(artifact: Frozen, written: Path) -> None:
    found = float64_weight(load_file(written / "model.safetensors"), MODULE, 32)
    weight = artifact.weights[f"{DECODER}.1.mlp.down_proj.weight"]
    assert torch.equal(found, weight.dequantize(torch.float32).double())


def test_everything_is_stored_in_float16(artifact: Frozen, written: Path) -> None:
    stored = load_file(written / "model.safetensors")
    assert {str(t.dtype) for t in stored.values()} == {"torch.float16", "torch.int32"}
    assert len(stored) == len(artifact.others) + 3 * len(artifact.weights)
    config = json.loads((written / "config.json").read_text())
    assert config["dtype"] == "float16"
    quantization = config["quantization_config"]
    assert (quantization["bits"], quantization["group_size"], quantization["version"]) == (
        4,
        32,
        "gemm",
    )


@pytest.mark.parametrize("specs", [decoder_specs(G32), PARTIAL])
def test_both_kinds_of_readers_convert_what_is_quantized(
    specs: dict[str, QuantSpec], tmp_path: Path
) -> None:
    artifact = random_artifact(specs)
    Awq().write(artifact, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    keys = config["quantization_config"]["modules_to_not_convert"]
    linear = modules_of_type(skeleton(artifact.config), torch.nn.Linear)
    quantized = modules_of(artifact.weights)
    assert [name for name in linear if should_convert_module(name, keys)] == quantized
    assert [name for name in linear if not any(key in name for key in keys)] == quantized


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        (decoder_specs(QuantSpec(8, 32)), "AWQ holds 4-bit codes, these have 8 bits"),
        (decoder_specs(QuantSpec(4, 16)), "AWQ has groups of (32, 64, 128), this has int4/g16"),
        (decoder_specs(QuantSpec(4, granularity="per_channel")), "this has int4/channel"),
        ({**decoder_specs(G32), PROJECTOR: QuantSpec(4, 32)}, ""),
        ({**PARTIAL, f"{DECODER}.1.mlp.up_proj.weight": QuantSpec(4, 64)}, "one group size"),
        ({"lm_head.weight": G32}, "readers of AWQ never look for a quantized head"),
    ],
)
def test_refusals(specs: dict[str, QuantSpec], reason: str) -> None:
    found = Awq().refusal(random_artifact(specs))
    assert reason in found
    assert bool(found) == bool(reason)


def test_what_float16_cannot_hold_is_refused(artifact: Frozen) -> None:
    assert "packs 8 output features" in Awq().weight_refusal(random_weight((12, 32), G32, 0))
    name, tensor = next(iter(artifact.others.items()))
    large = replace(artifact, others={**artifact.others, name: tensor * 1e30})
    assert Awq().refusal(large) == f"{name}: overflows float16"
    small = replace(artifact, others={**artifact.others, name: tensor * 1e-9})
    assert "1 of " in Awq().notes(small)[-1]


def test_autoawq_unpacks_the_same_weights(artifact: Frozen, written: Path) -> None:
    """AutoAWQ's unpacking is one file of plain torch; the rest of the package needs a GPU."""
    spec = importlib.util.find_spec("awq")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("autoawq is not installed")
    source = Path(spec.submodule_search_locations[0]) / "utils" / "packing_utils.py"
    file = importlib.util.spec_from_file_location("awq_packing_utils", source)
    assert file is not None and file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    stored = load_file(written / "model.safetensors")
    parts = (stored[f"{MODULE}.{name}"] for name in ("qweight", "qzeros", "scales"))
    found = module.dequantize_gemm(*parts, 4, 32)
    expected = artifact.weights[f"{DECODER}.1.mlp.down_proj.weight"].dequantize(torch.float16)
    assert torch.equal(found.t(), expected)


GENERATE = """
import sys, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
assert sum("Awq" in type(module).__name__ for module in model.modules()) == int(sys.argv[3])
batch = torch.load(sys.argv[2], weights_only=True)
tokens = model.generate(**batch, max_new_tokens=6, do_sample=False)
torch.save(tokens, sys.argv[2])
"""


@pytest.mark.slow
def test_gptqmodel_generates_the_same_tokens(
    artifact: Frozen, written: Path, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """In a process of its own, since gptqmodel changes transformers when it is imported."""
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("gptqmodel is not installed")
    file = tmp_path / "batch.pt"
    torch.save({**batch, "pixel_values": batch["pixel_values"].half()}, file)
    arguments = [str(written), str(file), str(len(artifact.weights))]
    subprocess.run([sys.executable, "-c", GENERATE, *arguments], check=True)
    expected = tokens_of(dense_model(artifact, torch.float16), batch)
    assert torch.equal(torch.load(file, weights_only=True), expected)
