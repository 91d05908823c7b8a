import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gracec.errors import GracecError
from gracec.models.weight_files import (
    checkpoint_files,
    checkpoint_tensors,
    first_not_finite,
    stored_dtype,
)
from tests.tiny import tiny_llava


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_llava().save_pretrained(tmp_path, max_shard_size="200KB")
    return tmp_path


def test_every_shard_and_every_tensor_is_found(sharded: Path) -> None:
    files = checkpoint_files(sharded)
    assert len(files) == 3
    found = dict(checkpoint_tensors(files))
    assert len(found) == len(tiny_llava().state_dict())
    assert stored_dtype(files) == torch.float32


def test_one_file_of_either_format(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3), "b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert [file.name for file in checkpoint_files(tmp_path)] == ["pytorch_model.bin"]
    assert stored_dtype(checkpoint_files(tmp_path)) == torch.bfloat16
    save_file(tensors, tmp_path / "model.safetensors")
    assert [file.name for file in checkpoint_files(tmp_path)] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"\x10" + bytes(7) + b"{ not a header }", "truncated or no safetensors file"),
    ],
)
def test_a_file_that_is_no_checkpoint(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(GracecError, match=message) as error:
        checkpoint_files(tmp_path)
    assert error.value.where == str(tmp_path / "model.safetensors")


def test_a_shard_that_lacks_a_promised_tensor(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    shard = next(iter(fields["weight_map"].values()))
    fields["weight_map"]["more.weight"] = shard
    index.write_text(json.dumps(fields))
    with pytest.raises(GracecError, match=f"{shard}: more.weight is listed in {index.name}"):
        checkpoint_files(sharded)
    index.write_text("{")
    with pytest.raises(GracecError, match="not an index of shards"):
        checkpoint_files(sharded)


def test_a_broken_pickle_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(GracecError, match="truncated or no PyTorch checkpoint"):
        list(checkpoint_tensors(checkpoint_files(tmp_path)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_the_first_weight_that_is_not_finite(dtype: torch.dtype) -> None:
    good = torch.ones(3, 4).to(dtype)
    bad = torch.tensor([1.0, float("nan")]).to(dtype)
    tensors = {"ids": torch.arange(2), "none": torch.empty(0), "good": good}
    assert first_not_finite(tensors.items()) == ""
    assert first_not_finite({**tensors, "bad": bad, "last": bad}.items()) == "bad"


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinity_is_not_finite(value: float) -> None:
    assert first_not_finite([("w", torch.tensor([0.0, value]))]) == "w"
