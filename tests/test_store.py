import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracec import quant
from gracec.errors import GracecError
from gracec.passes.freeze import FrozenWeight
from gracec.store import (
    MANIFEST,
    TENSORS,
    Store,
    pack_nibbles,
    read_store,
    unpack_nibbles,
    write_directory,
    write_store,
)


def example() -> Store:
    weights = {}
    for bits in (4, 3, 8):
        weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(bits))
        scales = quant.search_scales(weight, bits, 32)
        codes = quant.quantize(weight, scales, bits, 32)
        weights[f"layer{bits}.weight"] = FrozenWeight(codes, scales, quant.QuantSpec(bits, 32))
    return Store(weights, {"norm.weight": torch.arange(5.0)}, {"recipe": {"name": "test"}})


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_nibbles_round_trip(rows: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, 2 * pairs), generator=generator).to(torch.int8)
    packed = pack_nibbles(codes)
    assert packed.shape == (rows, pairs)
    assert torch.equal(unpack_nibbles(packed), codes)


def test_the_low_nibble_comes_first() -> None:
    codes = torch.tensor([[1, -2]], dtype=torch.int8)
    assert pack_nibbles(codes).tolist() == [[0x01 | 0xE0]]


def test_what_is_written_reads_back_and_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_directory(tmp_path / name, lambda target: write_store(example(), target))
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()
    found = read_store(tmp_path / "a")
    for fqn, weight in example().weights.items():
        assert torch.equal(found.weights[fqn].codes, weight.codes)
        assert torch.equal(found.weights[fqn].scales, weight.scales)
        assert found.weights[fqn].spec == weight.spec
    assert torch.equal(found.others["norm.weight"], torch.arange(5.0))
    assert found.manifest["recipe"] == {"name": "test"}


def test_a_changed_or_truncated_file_is_named(tmp_path: Path) -> None:
    target = tmp_path / "a"
    write_directory(target, lambda directory: write_store(example(), directory))
    whole = (target / TENSORS).read_bytes()
    (target / TENSORS).write_bytes(whole[:-1])
    with pytest.raises(GracecError, match=f"{TENSORS}: the file is not the one that was written"):
        read_store(target)
    (target / TENSORS).unlink()
    with pytest.raises(GracecError, match=f"{TENSORS}: missing"):
        read_store(target)
    manifest = json.loads((target / MANIFEST).read_text())
    (target / MANIFEST).write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(GracecError, match="format version 99"):
        read_store(target)
    (target / MANIFEST).write_text("{")
    with pytest.raises(GracecError, match="not readable as JSON"):
        read_store(target)
    with pytest.raises(GracecError, match="not a gracec artifact"):
        read_store(tmp_path)


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        (target / "part").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_directory(tmp_path / "a", fail)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(GracecError, match="the output directory exists"):
        write_directory(tmp_path / "a", lambda target: None)
