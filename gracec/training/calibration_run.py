"""Codes that were corrected so far: what a long calibration tells of, and can go on from.

OUT.training/calibrated/<share>-<number>.safetensors   codes and scales of a fused set

Sets are corrected one after the other, and each depends on all before it, so that those that are
kept are the first ones. Each file says what decided it: the model, the samples, the recipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gracec.directories import cannot_write, replace_file, room_beside
from gracec.errors import GracecError, first_line
from gracec.json_files import JsonModel, check_fields, parse_json
from gracec.passes.correct_codes import Corrected
from gracec.quant import FrozenWeight, QuantSpec
from gracec.quant.frozen import Experts, check_frozen
from gracec.training.checkpoints.fingerprint import Fingerprint, FingerprintFields
from gracec.training.progress import Shown, shown

CALIBRATED = "calibrated"
"""Name of the folder in that of a run."""
_REMOVE = "remove it: everything from it on is corrected again"


class _Weight(JsonModel):
    """What a file says of a weight, beside its tensors."""

    spec: dict[str, int | str | bool]
    experts: int | None
    transposed: bool
    errors: Annotated[list[float], Field(min_length=3, max_length=3)]
    how: str


class _Set(JsonModel):
    """What a file says."""

    fingerprint: FingerprintFields
    weights: dict[str, _Weight]


@dataclass
class CalibrationRun:
    """Progress of `correct-codes`.

    Attributes:
        show: how far it is.
        directory: where sets are kept; nowhere without one.
        fingerprint: of everything that decides them.
    """

    show: Shown
    directory: Path | None = None
    fingerprint: Fingerprint | None = None

    def kept(self, run: str, number: int) -> dict[str, Corrected] | None:
        """The weights of a set, if it was kept.

        Raises:
            GracecError: if the file is damaged, or was decided by something else.
        """
        path = self._path(run, number)
        if path is None or not path.is_file():
            return None
        assert self.fingerprint is not None
        return _read(path, self.fingerprint)

    def keep(self, run: str, number: int, of: int, weights: Mapping[str, Corrected]) -> None:
        """Keep the weights of a set, and say how far the calibration is."""
        path = self._path(run, number)
        if path is not None and not path.is_file():
            assert self.fingerprint is not None
            _write(path, weights, self.fingerprint)
        text = f"calibrating {number + 1}/{of}" + ("" if run == "0" else f" (asymmetric {run})")
        self.show(text, number + 1, of, due=number + 1 == of)

    def _path(self, run: str, number: int) -> Path | None:
        if self.directory is None:
            return None
        return self.directory / CALIBRATED / f"{run}-{number:05}.safetensors"


@contextmanager
def calibration_run(
    progress: bool, directory: Path | None = None, fingerprint: Fingerprint | None = None
) -> Iterator[CalibrationRun]:
    """What follows a calibration, on a terminal as a bar and elsewhere as lines."""
    with shown(progress) as show:
        yield CalibrationRun(show, directory, fingerprint)


def calibrated_sets(directory: Path) -> list[Path]:
    """The files of an interrupted calibration in the directory of a run."""
    return sorted((directory / CALIBRATED).glob("[0-9]*-[0-9]*.safetensors"))


def _write(path: Path, weights: Mapping[str, Corrected], fingerprint: Fingerprint) -> None:
    tensors, described = {}, {}
    for fqn, one in weights.items():
        weight, experts = one.weight, one.weight.experts
        tensors[f"{fqn}.codes"] = weight.stored.cpu().contiguous()
        tensors[f"{fqn}.scales"] = weight.scales.cpu().contiguous()
        described[fqn] = {
            "spec": weight.spec.to_dict(),
            "experts": None if experts is None else experts.count,
            "transposed": experts is not None and experts.transposed,
            "errors": list(one.errors),
            "how": one.how,
        }
    says = {"fingerprint": asdict(fingerprint), "weights": described}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with room_beside(path) as new:
            save_file(tensors, new / path.name, metadata={"gracec": json.dumps(says)})
            replace_file(new / path.name, path)
    except OSError as error:
        raise cannot_write(path, error) from error


def _read(path: Path, expected: Fingerprint) -> dict[str, Corrected]:
    where = str(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise GracecError(f"is damaged ({first_line(error)})", where=where, fix=_REMOVE) from error
    says = parse_json(metadata.get("gracec", "{}"), where=where, fix=_REMOVE)
    found = check_fields(_Set, says, where=where, fix=_REMOVE)
    written = Fingerprint(**found.fingerprint.model_dump())
    difference = written.difference(expected)
    if difference:
        raise GracecError(difference, where=where, fix=written.remedy(expected))
    weights = {}
    for fqn, one in found.weights.items():
        experts = None if one.experts is None else Experts(one.experts, one.transposed)
        codes, scales = (tensors.get(f"{fqn}.{name}") for name in ("codes", "scales"))
        if codes is None or scales is None:
            raise GracecError(f"has no codes of {fqn}", where=where, fix=_REMOVE)
        spec: QuantSpec = QuantSpec(**one.spec)  # type: ignore[arg-type]
        weight = FrozenWeight(codes, scales, spec, experts=experts)
        check_frozen(weight, fqn, where=where)
        plain, searched, taken = one.errors
        weights[fqn] = Corrected(weight, (plain, searched, taken), one.how)
    return weights
