import errno
import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gracec import quant, store
from gracec.errors import GracecError
from gracec.quant.frozen import FrozenActivation, FrozenWeight
from gracec.quant.observers import ActivationSpec
from gracec.store import (
    MANIFEST,
    TENSORS,
    Store,
    read_store,
    write_directory,
    write_store,
)
from tests.children import in_a_child


def example(seed: int = 0) -> Store:
    weights = {}
    for bits in (4, 3, 8):
        weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(10 * seed + bits))
        scales = quant.search_scales(weight, bits, 32)
        codes = quant.quantize(weight, scales, bits, 32)
        weights[f"layer{bits}.weight"] = FrozenWeight.from_codes(
            codes, scales, quant.QuantSpec(bits, 32)
        )
    return Store(weights, {"norm.weight": torch.arange(5.0)}, {"recipe": {"name": "test"}})


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


def test_grids_of_inputs_read_back_and_ask_for_a_newer_reader(tmp_path: Path) -> None:
    scales, zeros = torch.tensor([0.25]), torch.tensor([-3], dtype=torch.int32)
    grid = FrozenActivation(scales, zeros, ActivationSpec(observer="min_max"))
    plain = example()
    weights = {fqn: replace(weight, activation=grid) for fqn, weight in plain.weights.items()}
    for name in ("a", "b"):
        store = Store(weights, plain.others, plain.manifest)
        write_directory(tmp_path / name, lambda target, store=store: write_store(store, target))
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()
    found = read_store(tmp_path / "a")
    assert found.others.keys() == plain.others.keys()
    for weight in found.weights.values():
        assert weight.activation is not None and weight.activation.equals(grid)
    assert found.manifest["format_version"] == 3
    assert found.manifest["activations"]["layer4.weight"]["observer"] == "min_max"
    write_directory(tmp_path / "plain", lambda target: write_store(plain, target))
    assert read_store(tmp_path / "plain").manifest["format_version"] == 2


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
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(GracecError, match="a: cannot be written: No space left on device"):
        write_directory(tmp_path / "a", fail)
    assert list(tmp_path.iterdir()) == []


def save_with_small_files(directory: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(GracecError, match="a: cannot be written: .*File too large"):
        write_directory(directory, lambda target: write_store(example(), target), overwrite=True)


def test_a_full_disk_is_one_line_and_the_old_artifact_stays(tmp_path: Path) -> None:
    """A real limit of the system, on the size of files, reached inside of safetensors."""
    write_directory(tmp_path / "a", lambda target: write_store(example(), target))
    before = snapshot(tmp_path / "a")
    assert in_a_child(save_with_small_files, tmp_path / "a") == 0
    assert snapshot(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


POINTS = ["created", "filled", "flushed", "in place", "cleaned"]


def save_until(point: str, kill: bool, directory: Path) -> None:
    def reached(name: str) -> None:
        with (directory / "points").open("a") as file:
            file.write(f"{name}\n")
        if name == point and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == point:
            raise KeyboardInterrupt

    store.reached = reached
    with pytest.raises(KeyboardInterrupt):
        write_directory(
            directory / "a", lambda target: write_store(example(1), target), overwrite=True
        )


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("kill", [True, False])
def test_an_interrupted_save_leaves_a_whole_artifact(
    point: str, kill: bool, tmp_path: Path
) -> None:
    write_directory(tmp_path / "a", lambda target: write_store(example(), target))
    write_directory(tmp_path / "new", lambda target: write_store(example(1), target))
    old, new = snapshot(tmp_path / "a"), snapshot(tmp_path / "new")
    assert in_a_child(save_until, point, kill, tmp_path) == (signal.SIGKILL if kill else 0)
    passed = tmp_path / "points"
    assert passed.read_text().splitlines() == POINTS[: POINTS.index(point) + 1]
    in_place = POINTS.index(point) >= POINTS.index("in place")
    assert snapshot(tmp_path / "a") == (new if in_place else old)
    assert len(read_store(tmp_path / "a").weights) == 3
    if not kill:
        assert {path.name for path in tmp_path.iterdir()} == {"a", "new", "points"}


def test_saving_again_replaces_the_artifact_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "a"
    write_directory(target, lambda directory: write_store(example(), directory))
    write_directory(target, lambda directory: write_store(example(1), directory), overwrite=True)
    found = read_store(target).weights["layer4.weight"]
    assert torch.equal(found.codes, example(1).weights["layer4.weight"].codes)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_directory_that_is_no_artifact_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years")
    with pytest.raises(GracecError, match="the output directory exists"):
        write_directory(tmp_path / "a", lambda target: None)
    with pytest.raises(GracecError, match="only a gracec artifact is overwritten"):
        write_directory(tmp_path / "a", lambda target: None, overwrite=True)
    assert (tmp_path / "a" / "thesis.tex").read_text() == "years"


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GracecError, match="cannot be written: "):
        write_directory(tmp_path / "file" / "a", lambda target: None)


def test_weights_that_are_read_later_need_their_file(tmp_path: Path) -> None:
    write_directory(tmp_path / "a", lambda target: write_store(example(), target))
    weights = read_store(tmp_path / "a").weights
    (tmp_path / "a" / TENSORS).unlink()
    with pytest.raises(GracecError, match=r"layer4\.weight cannot be read"):
        weights["layer4.weight"]


def test_odd_widths_keep_a_byte_a_code(tmp_path: Path) -> None:
    weight = torch.randn(4, 7)
    scales = quant.search_scales(weight, 4, 7)
    codes = quant.quantize(weight, scales, 4, 7)
    frozen = FrozenWeight.from_codes(codes, scales, quant.QuantSpec(4, granularity="per_channel"))
    write_directory(
        tmp_path / "a", lambda target: write_store(Store({"w": frozen}, {}, {}), target)
    )
    found = read_store(tmp_path / "a").weights["w"]
    assert found.stored.dtype == torch.int8
    assert found.shape == (4, 7)
    assert torch.equal(found.codes, codes)


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file of a directory and its bytes."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
