"""Recipes: what to quantize and how, as data. Built-in ones are YAML files in `gracec/recipes`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gracec.errors import GracecError
from gracec.quant import QuantSpec

BUILT_IN = Path(__file__).parent / "recipes"

Granularity = Literal["per_group", "per_channel", "per_tensor"]
Part = Literal["decoder", "head", "projector", "vision"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightRule(_Strict):
    """How the weights of one part of the model are quantized."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[16, 32, 64, 128, 256] = 128
    granularity: Granularity = "per_group"
    observer: Literal["mse", "min_max", "percentile"] = "mse"

    def spec(self) -> QuantSpec:
        return QuantSpec(bits=self.bits, group_size=self.group_size, granularity=self.granularity)


class ActivationRule(_Strict):
    """How the inputs of the quantized linears of one part are quantized, with static scales.

    Attributes:
        percentile: share of the values, in per cent, that the percentile observer keeps in range.
        symmetric: zero point 0; otherwise it is found by calibration.
    """

    bits: Literal[4, 8] = 8
    group_size: Literal[16, 32, 64, 128, 256] = 128
    granularity: Granularity = "per_tensor"
    observer: Literal["mse", "min_max", "moving_average", "percentile"] = "mse"
    percentile: float = Field(99.99, gt=50, le=100)
    symmetric: bool = False


class ScaleSearch(_Strict):
    """The grid of the mean-squared-error search for initial scales."""

    candidates: int = Field(64, ge=1, le=4096)
    lowest: float = Field(0.3, gt=0)
    highest: float = Field(1.2, gt=0)


class Deploy(_Strict):
    """What the compiled model runs in."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class Recipe(_Strict):
    """A recipe: fields not given keep their default, unknown fields are refused.

    Attributes:
        weights: part of the model -> rule; parts that are missing or null keep their precision.
        activations: part -> rule for the inputs of its quantized linears; missing or null means
            that they stay floating point.
    """

    name: str
    description: str = ""
    weights: dict[Part, WeightRule | None]
    activations: dict[Part, ActivationRule | None] = {}
    scale_search: ScaleSearch = ScaleSearch()
    deploy: Deploy = Deploy()

    @classmethod
    def load(cls, source: str | Path | Recipe) -> Recipe:
        """A recipe from a built-in name ("w4a16-ptq") or the path of a YAML file.

        Raises:
            GracecError: for an unknown name, an unreadable file or a field that does not fit; the
                nearest known name is given.
        """
        if isinstance(source, Recipe):
            return source
        path = Path(source)
        if path.suffix in (".yaml", ".yml"):
            if not path.is_file():
                raise GracecError("no such recipe file", where=str(path))
        else:
            known = built_in_recipes()
            if str(source) not in known:
                raise GracecError(
                    f"unknown recipe {str(source)!r}", fix=nearest(str(source), known)
                )
            path = BUILT_IN / f"{source}.yaml"
        try:
            fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            detail = " ".join(str(error).split())
            raise GracecError(f"not readable as YAML: {detail}", where=str(path)) from error
        if not isinstance(fields, dict):
            raise GracecError("a recipe is a mapping of fields", where=str(path))
        return cls.from_dict({"name": path.stem, **fields}, where=str(path))

    @classmethod
    def from_dict(cls, fields: dict[str, Any], *, where: str = "recipe") -> Recipe:
        """A recipe from plain data.

        Raises:
            GracecError: naming the first field that does not fit.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            # An unknown key first: a misspelt one is why another seems to be missing.
            first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
            path = [str(part) for part in first["loc"]]
            field = ".".join(path)
            if first["type"] in ("extra_forbidden", "literal_error") and _is_key(first["loc"]):
                path = [part for part in path if part != "[key]"]
                raise GracecError(
                    f"unknown key {'.'.join(path)!r}",
                    where=where,
                    fix=nearest(path[-1], _all_keys()),
                ) from None
            raise GracecError(f"{field}: {first['msg']}", where=where) from None

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data."""
        return self.model_dump(mode="json")


def built_in_recipes() -> list[str]:
    """Names of the recipes that come with gracec."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def nearest(name: str, known: list[str]) -> str:
    """ "did you mean ...?" or the list of what is known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _is_key(location: tuple[int | str, ...]) -> bool:
    """Whether pydantic complains about a key, of a model or of a mapping, rather than a value."""
    return location[-1] == "[key]" or location[-1] not in _all_keys()


def _all_keys() -> list[str]:
    models: tuple[type[BaseModel], ...] = (Recipe, WeightRule, ActivationRule, ScaleSearch, Deploy)
    keys = [name for model in models for name in model.model_fields]
    return [*keys, *Part.__args__]  # type: ignore[attr-defined]
