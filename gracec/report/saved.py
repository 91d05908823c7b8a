"""A report as it lies in a manifest: every field held to its type before a report is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, create_model

from gracec.errors import GracecError
from gracec.journal import KINDS
from gracec.json_files import JsonModel, check_fields
from gracec.recipe import OnnxDeploy
from gracec.report.report import Report


class _SavedSpec(JsonModel):
    bits: int
    group_size: int
    parametrization: str
    scale_grid: str
    granularity: str = "per_group"
    signed: bool = False


class _SavedRow(JsonModel):
    fqns: list[str]
    part: str
    shape: list[int]
    spec: _SavedSpec | None
    reason: str
    source_bytes: int
    planned_bytes: int
    sqnr_db: float | None = None
    ptq_sqnr_db: float | None = None
    output_error: list[Annotated[float, Field(ge=0)]] | None = Field(
        None, min_length=3, max_length=3
    )
    codes: Literal["", "corrected", "partly", "rounded"] = ""


class _SavedNote(JsonModel):
    source: str
    text: str


class _SavedOnnx(OnnxDeploy):
    model_config = ConfigDict(extra="ignore")


class _SavedDeploy(JsonModel):
    model_config = ConfigDict(extra="ignore")

    dtype: Literal["bfloat16", "float16", "float32"]
    onnx: _SavedOnnx = _SavedOnnx()


class _SavedRecipe(JsonModel):
    """Only what is needed of it: recipes of other versions have other fields."""

    model_config = ConfigDict(extra="ignore")

    name: str
    deploy: _SavedDeploy


class _SavedReport(JsonModel):
    recipe: _SavedRecipe
    plan: list[_SavedRow]
    notes: list[_SavedNote | str]
    gates: dict[str, Any]
    sizes: dict[str, int] = Field(default_factory=dict)
    accuracy: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)


def read_report(saved: Mapping[str, Any], *, where: str) -> Report:
    """What `Report.to_dict` gave, now or before notes and figures had types.

    Raises:
        GracecError: naming the first field that is missing, unknown or of another type.
    """
    fix = "copy it again or compile the model again"
    if not saved:
        raise GracecError("the manifest holds no report", where=where, fix=fix)
    place = f"{where}: report"
    found = check_fields(_SavedReport, saved, where=place, fix=fix)
    for name, figure in found.gates.items():
        kind = figure.get("kind") if isinstance(figure, dict) else None
        if isinstance(kind, str) and kind in _FIGURES:
            rest = {key: value for key, value in figure.items() if key != "kind"}
            check_fields(_FIGURES[kind], rest, where=f"{place}.gates.{name}", fix=fix)
    try:
        return Report.from_dict(saved)
    except GracecError as error:  # a spec that no weight can have
        raise GracecError(f"plan: {error}", where=place, fix=fix) from None


def _model_of(kind: type[Any]) -> type[JsonModel]:
    """Of the fields of a dataclass."""
    hints = get_type_hints(kind)
    found: Any = {
        item.name: (hints[item.name], ... if item.default is MISSING else item.default)
        for item in fields(kind)
    }
    return create_model(kind.__name__, __base__=JsonModel, **found)


_FIGURES = {name: _model_of(kind) for name, kind in KINDS.items()}
