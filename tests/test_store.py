import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gracec import quant, store
from gracec.directories import files_in
from gracec.errors import GracecError
from gracec.file_hashes import hashes_of, json_sha256
from gracec.quant.frozen import FrozenActivation, FrozenWeight, code_hash
from gracec.quant.observers import ActivationSpec
from gracec.store import (
    MANIFEST,
    SEAL,
    TENSORS,
    ActivationFields,
    Store,
    WeightFields,
    read_store,
    write_directory,
    write_store,
)


def example(seed: int = 0) -> Store:
    weights = {}
    for bits in (4, 3, 8):
        weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(10 * seed + bits))
        scales = quant.search_scales(weight, bits, 32)
        codes = quant.quantize(weight, scales, bits, 32)
        weights[f"layer{bits}.weight"] = FrozenWeight.from_codes(
            codes, scales, quant.QuantSpec(bits, 32)
        )
    return Store(weights, {"norm.weight": torch.arange(5.0)}, {"source": "test"})


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
    assert found.manifest["source"] == "test"


def test_grids_of_inputs_read_back(tmp_path: Path) -> None:
    scales, zeros = torch.tensor([0.25]), torch.tensor([-3], dtype=torch.int32)
    grid = FrozenActivation(scales, zeros, ActivationSpec(observer="min_max"))
    plain = example()
    weights = {fqn: replace(weight, activation=grid) for fqn, weight in plain.weights.items()}
    for name in ("a", "b"):
        whole = Store(weights, plain.others, plain.manifest)
        write_directory(tmp_path / name, lambda target, whole=whole: write_store(whole, target))
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()
    found = read_store(tmp_path / "a")
    assert found.others.keys() == plain.others.keys()
    for weight in found.weights.values():
        assert weight.activation is not None and weight.activation.equals(grid)
    assert found.manifest["format_version"] == 5
    assert found.manifest["activations"]["layer4.weight"]["observer"] == "min_max"
    write_directory(tmp_path / "plain", lambda target: write_store(plain, target))
    assert read_store(tmp_path / "plain").manifest["format_version"] == 5


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


def reseal(directory: Path, **fields: object) -> None:
    """Change fields of the manifest, and have it vouch for itself and for every file."""
    path = directory / MANIFEST
    changed = {**json.loads(path.read_text()), **fields}
    if "files" not in fields:
        names = [name for name in files_in(directory) if name != MANIFEST]
        changed["files"] = hashes_of(directory, names)
    changed = {name: value for name, value in changed.items() if value is not ... and name != SEAL}
    path.write_text(json.dumps({**changed, SEAL: json_sha256(changed)}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    scales, zeros = torch.tensor([0.25]), torch.tensor([-3], dtype=torch.int32)
    grid = FrozenActivation(scales, zeros, ActivationSpec(observer="min_max"))
    plain = example()
    weights = {
        fqn: replace(weight, activation=grid if fqn == "layer8.weight" else None)
        for fqn, weight in plain.weights.items()
    }
    whole = Store(weights, plain.others, plain.manifest, {"layer4": 2.0})
    write_directory(tmp_path / "a", lambda target: write_store(whole, target))
    return tmp_path / "a"


SPEC = {"bits": 4, "group_size": 32, "parametrization": "log", "scale_grid": "bf16"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"weights": ...}, "weights: Field required"),
        ({"weights": []}, "weights: Input should be a valid dictionary"),
        ({"weights": {"w": {**SPEC, "bits": "4"}}}, "weights.w.bits: Input should be a valid int"),
        ({"weights": {"w": {**SPEC, "bits": 5}}}, "weights.w: 5 bits are not supported"),
        ({"weights": {"w": {**SPEC, "sparse": 1}}}, "weights.w.sparse: Extra inputs"),
        ({"weights": {"w": {"bits": 4}}}, "weights.w.group_size: Field required"),
        ({"activations": {"layer4.weight": {}}}, "activations.layer4.weight.bits: Field required"),
        ({"adapters": {"layer4": None}}, "adapters.layer4: Input should be a valid number"),
        ({"adapters": {"layer4": "inf"}}, "adapters.layer4: Input should be a valid number"),
        ({"passes": "x"}, "passes: Input should be a valid list"),
        ({"files": {}}, "files: Field required"),
        ({"files": {"config.json": "0"}}, "files.gracec/gracec.safetensors: missing"),
        ({"format_version": "5"}, "format version 5, this gracec reads 2 to 5"),
        ({"format_version": ...}, "format version None"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
    ],
)
def test_a_field_that_is_missing_or_wrong_is_named(
    saved: Path, fields: dict[str, object], expected: str
) -> None:
    reseal(saved)
    assert len(read_store(saved).weights) == 3
    reseal(saved, **fields)
    with pytest.raises(GracecError) as error:
        read_store(saved)
    message = str(error.value)
    assert message.startswith(f"{saved / MANIFEST}: ") and expected in message
    assert "\n" not in message


def test_a_manifest_that_is_edited_or_nested_says_so(saved: Path) -> None:
    path = saved / MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"layer4": 2.0', '"layer4": 3.0'))
    with pytest.raises(GracecError, match="it is not what was written"):
        read_store(saved)
    path.write_text(text.replace('"layer4": 2.0', '"layer4": NaN'))
    with pytest.raises(GracecError, match="adapters.layer4: Input should be a finite number"):
        read_store(saved)
    path.write_text("[" * 100_000)
    with pytest.raises(GracecError, match="more than 100 deep"):
        read_store(saved)


def test_the_fields_of_the_manifest_are_those_of_the_specs() -> None:
    for model, kind in ((WeightFields, quant.QuantSpec), (ActivationFields, ActivationSpec)):
        assert list(model.model_fields) == [item.name for item in fields(kind)]


def edited(saved: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change a tensor of an artifact, with all hashes made anew."""
    tensors = load_file(saved / TENSORS)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, saved / TENSORS)
    reseal(saved)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("layer4.weight.scales", lambda t: t.repeat(1, 2), r"are float32 \[16, 4\], not \[16, 2\]"),
        ("layer4.weight.scales", lambda t: t[:8], r"are float32 \[8, 2\], not \[16, 2\]"),
        ("layer4.weight.scales", lambda t: -t, "which no scale does"),
        ("layer4.weight.scales", lambda t: t * 0, "lie between 0 and 0, which no scale does"),
        ("layer4.weight.scales", lambda t: t * torch.nan, "between nan and nan"),
        ("layer4.weight.scales", lambda t: t.index_fill(0, torch.tensor(3), torch.inf), "and inf"),
        ("layer4.weight.scales", lambda t: t.int(), "are int32, not bfloat16"),
        ("layer4.weight.codes", lambda t: t.to(torch.int8), "is not how int4/g32 lies"),
        ("layer4.weight.codes", lambda t: t.float(), "are float32"),
        ("layer4.weight.codes", lambda t: t[:, :5], "have 10 columns, which int4/g32 does not div"),
        ("layer8.weight.codes", lambda t: t.view(torch.uint8), "is not how int8/g32 lies"),
        ("layer3.weight.codes", lambda t: t | 0x07, "out of 3 bits"),
        ("layer8.weight.input_scales", lambda t: -t, "which no scale does"),
        ("layer8.weight.input_scales", lambda t: t.repeat(2), r"not \[1\]"),
        ("layer8.weight.input_zero_points", lambda t: t + 200, "lie between 197 and 197, out of 8"),
        ("layer8.weight.input_zero_points", lambda t: t.float(), r"are float32 \[1\]"),
        ("layer8.weight.input_zero_points", lambda t: t.repeat(2), r"are int32 \[2\], not \[1\]"),
    ],
)
def test_a_tensor_that_its_spec_cannot_mean_is_named(
    saved: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], expected: str
) -> None:
    edited(saved, name, change)
    fqn = ".".join(name.split(".")[:2])
    with pytest.raises(GracecError, match=f"{TENSORS}: {name} .*{expected}"):
        read_store(saved).weights[fqn]


def test_negative_scales_read_back_where_the_spec_is_signed(tmp_path: Path) -> None:
    weights = {}
    for fqn, weight in example().weights.items():
        signs = torch.where(torch.arange(weight.scales.numel()) % 2 == 0, 1, -1)
        scales = weight.scales * signs.view(weight.scales.shape)
        weights[fqn] = replace(weight, scales=scales, spec=replace(weight.spec, signed=True))
    whole = replace(example(), weights=weights)
    write_directory(tmp_path / "a", lambda target: write_store(whole, target))
    found = read_store(tmp_path / "a")
    for fqn, weight in weights.items():
        assert (weight.scales < 0).sum() == weight.scales.numel() // 2
        assert torch.equal(found.weights[fqn].scales, weight.scales)
        assert found.weights[fqn].spec == weight.spec
        assert code_hash(found.weights[fqn]) == code_hash(weight)
    assert found.manifest["weights"]["layer4.weight"]["signed"] is True
    edited(tmp_path / "a", "layer4.weight.scales", lambda t: t * 0)
    with pytest.raises(GracecError, match="have magnitudes between 0 and 0, which no scale does"):
        read_store(tmp_path / "a").weights["layer4.weight"]


def test_an_unsigned_spec_is_written_as_before(tmp_path: Path) -> None:
    write_directory(tmp_path / "a", lambda target: write_store(example(), target))
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert set(manifest["weights"]["layer4.weight"]) == {
        *("bits", "group_size", "parametrization", "scale_grid", "granularity")
    }


def test_a_zero_point_of_a_symmetric_grid_is_zero(saved: Path) -> None:
    activations = json.loads((saved / MANIFEST).read_text())["activations"]
    activations["layer8.weight"]["symmetric"] = True
    reseal(saved, activations=activations)
    with pytest.raises(GracecError, match="input_zero_points are not 0, and the grid is symm"):
        read_store(saved).weights["layer8.weight"]


def test_tensors_that_link_elsewhere_are_refused(saved: Path, tmp_path: Path) -> None:
    (saved / TENSORS).rename(tmp_path / "elsewhere")
    (saved / TENSORS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GracecError, match="it leads out of its directory"):
        read_store(saved)


def test_unreadable_tensors_are_one_line(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    weights = read_store(saved).weights
    monkeypatch.setattr(store, "safe_open", refuse)
    with pytest.raises(GracecError, match="not readable: .*Permission denied"):
        read_store(saved)
    with pytest.raises(GracecError, match=r"layer4\.weight cannot be read: .*Permission denied"):
        weights["layer4.weight"]
