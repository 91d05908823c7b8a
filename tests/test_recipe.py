import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from gracec.errors import GracecError
from gracec.recipe import Calibration, Recipe, built_in_recipes


def test_every_built_in_recipe_loads_and_says_what_it_does() -> None:
    assert "w4a16-ptq" in built_in_recipes()
    for name in built_in_recipes():
        recipe = Recipe.load(name)
        assert recipe.name == name
        assert recipe.description


def test_a_resolved_recipe_reads_back_equal() -> None:
    recipe = Recipe.load("w4a16-ptq")
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_the_order_of_layers_is_part_of_what_decides() -> None:
    layers = {"decoder.down": None, "decoder.blocks[0]": {"bits": 8}}
    one, other = (
        Recipe.from_dict({"name": "a", "weights": {}, "layers": dict(pairs)})
        for pairs in (layers.items(), reversed(layers.items()))
    )
    assert one.deciding() != other.deciding()
    assert Recipe.from_dict(one.to_dict()) == one


def test_calibration_is_a_section_with_defaults_that_older_recipes_lack() -> None:
    fields = Recipe.load("w4a16-ptq").to_dict()
    found = fields.pop("calibration")
    assert found == {
        "method": "auto",
        "samples": 128,
        "tokens": 16384,
        "damping": 0.01,
        "order": "activation",
        "asymmetric": "auto",
        "seed": 0,
    }
    assert Recipe.from_dict(fields).calibration == Calibration()
    own = {"method": "gptq", "asymmetric": 0.25, "tokens": 512, "seed": 3, "order": "natural"}
    recipe = Recipe.from_dict({**fields, "calibration": own})
    assert recipe.to_dict()["calibration"] == {**found, **own}
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "weights: {decoder: {bitts: 4}}",
            "unknown key 'weights.decoder.bitts'; did you mean 'bits'",
        ),
        ("wieghts: {}", "unknown key 'wieghts'; did you mean 'weights'"),
        ("weights: {decodr: {bits: 4}}", "did you mean 'decoder'"),
        ("weights: {decoder: {bits: 5}}", "weights.decoder.bits"),
        ("description: nothing", "weights: Field required"),
        (
            "weights: {}\ncalibration: {metod: gptq}",
            "unknown key 'calibration.metod'; did you mean 'method'",
        ),
        (
            "weights: {}\ncalibration: {method: awq}",
            "calibration.method: Input should be 'auto', 'weights', 'moments' or 'gptq'",
        ),
        ("weights: {}\ncalibration: {damping: 0}", "calibration.damping: Input should be greater"),
        ("- 1", "not a mapping of fields"),
        ("weights: {", "not readable as YAML"),
    ],
)
def test_a_bad_file_gives_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(GracecError) as error:
        Recipe.load(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def numbers(model: type[BaseModel]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Where every number of a recipe stands, and its field."""
    for name, field in model.model_fields.items():
        parts = [field.annotation, *get_args(field.annotation)]
        if model is Recipe and name in ("weights", "activations"):
            parts = [get_args(get_args(field.annotation)[1])[0]]
            name = f"{name}.decoder"
        for part in parts:
            part = part.__origin__ if get_origin(part) is Annotated else part
            if isinstance(part, type) and issubclass(part, BaseModel):
                for place, inner in numbers(part):
                    yield (*name.split("."), *place), inner
            elif part in (int, float) or isinstance(next(iter(get_args(part)), None), int):
                yield (name,), field


WHOLE: dict[str, Any] = {
    "name": "whole",
    "weights": {"decoder": {}},
    "training": {"distillation": {}},
    "expect": {"at_least": 0},
}
PLACES = sorted({place for place, _ in numbers(Recipe)})


def changed(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    fields = copy.deepcopy(WHOLE)
    if place[0] == "activations":
        fields["activations"] = {"decoder": {}}
    inside = fields
    for part in place[:-1]:
        inside = inside.setdefault(part, {})
    inside[place[-1]] = value
    return fields


@pytest.mark.parametrize("place", PLACES, ids=".".join)
@pytest.mark.parametrize(
    "value",
    [float("inf"), float("-inf"), float("nan"), 10**40, -(10**40), 1e300, -1e300, True, [], {}],
    ids=str,
)
def test_every_number_is_finite_and_in_its_range(place: tuple[str, ...], value: Any) -> None:
    if value is True and place[-1] in ("gate", "compile", "symmetric"):
        return
    with pytest.raises(GracecError) as error:
        Recipe.from_dict(changed(place, value), where="mine.yaml")
    assert str(error.value).startswith(f"mine.yaml: {'.'.join(place)}"), error.value


def test_the_places_of_numbers_are_found() -> None:
    assert {("training", "lr"), ("training", "distillation", "tau")} <= set(PLACES)
    assert {("weights", "decoder", "bits"), ("expect", "at_least")} <= set(PLACES)
    assert {("calibration", "damping"), ("calibration", "asymmetric")} <= set(PLACES)
    assert len(PLACES) == 45


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale_search": {"lowest": 1.3}}, "lowest 1.3 is above highest 1.2"),
        ({"training": {"distillation": {"beta": 2}}}, "beta 2.0 is not between beta_min 0.1"),
        ({"training": {"distillation": {"controller": "epoch-lagrangian"}}}, "eta 0.003 is below"),
        (
            {"training": {"cross_entropy": 0, "distillation": {"kind": "none", "omega": 0}}},
            "training: every term of the objective is switched off",
        ),
        ({"name": "a\n---\nb"}, "name: not one line of up to 64 letters"),
        ({"name": "<script>"}, "name: not one line"),
        ({"name": "`a`"}, "name: not one line"),
        ({"name": "a\n"}, "name: not one line"),
        ({"name": ""}, "name: not one line"),
        ({"name": "a" * 65}, "name: not one line"),
        ({"name": "\ud800"}, "name: "),
        ({"description": "a" * 5000}, "description: "),
        (
            {"layers": {"decodr": None}},
            "layers: 'decodr' is no place, and no name of a weight: say",
        ),
        ({"a\nb": 1}, "unknown key 'a\\nb'"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(GracecError) as error:
        Recipe.from_dict({**WHOLE, **fields})
    assert message in str(error.value)
    assert str(error.value).isprintable()


def test_a_file_may_be_called_as_recipes_are(tmp_path: Path) -> None:
    path = tmp_path / "größe 2 (b=8).yaml"
    path.write_text("weights: {}")
    assert Recipe.load(path).name == "größe 2 (b=8)"


def test_an_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(GracecError, match="unknown recipe 'w4a16ptq'; did you mean 'w4a16-ptq'?"):
        Recipe.load("w4a16ptq")
    with pytest.raises(GracecError, match="missing.yaml: no such file"):
        Recipe.load("missing.yaml")


def test_how_graphs_are_written_is_said_where_it_is_not_the_default() -> None:
    plain = Recipe.load("w4a16-ptq")
    assert plain.to_dict()["deploy"] == {"dtype": "bfloat16"}, "as recipes of before have it"
    assert plain.with_onnx(ops=None, mode=None) is plain
    fast = plain.with_onnx(ops=None, mode="fast")
    found = fast.to_dict()
    assert found["deploy"]["onnx"] == {
        "ops": "matmulnbits",
        "mode": "fast",
        "head": "auto",
        "embedding": "keep",
        "cache": "float32",
    }
    assert Recipe.from_dict(found) == fast != plain


@pytest.mark.parametrize(
    ("onnx", "message"),
    [
        ({"mod": "fast"}, "unknown key 'deploy.onnx.mod'; did you mean 'mode'"),
        ({"mode": "quick"}, "deploy.onnx.mode: Input should be 'auto', 'fast' or 'faithful'"),
        ({"head": 2}, "deploy.onnx.head: Input should be 'auto', 'keep', 8 or 4"),
        ({"head": 8}, "deploy.onnx.head: the head has codes already, by weights.head"),
    ],
)
def test_graphs_that_cannot_be_written_so(onnx: dict[str, Any], message: str) -> None:
    fields = {"name": "mine", "weights": {"head": {"bits": 8}}, "deploy": {"onnx": onnx}}
    with pytest.raises(GracecError, match=re.escape(message)):
        Recipe.from_dict(fields)
