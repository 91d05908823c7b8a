from pathlib import Path

import pytest

from gracec.errors import GracecError
from gracec.recipe import Recipe, built_in_recipes


def test_every_built_in_recipe_loads_and_says_what_it_does() -> None:
    assert "w4a16-ptq" in built_in_recipes()
    for name in built_in_recipes():
        recipe = Recipe.load(name)
        assert recipe.name == name
        assert recipe.description


def test_a_resolved_recipe_reads_back_equal() -> None:
    recipe = Recipe.load("w4a16-ptq")
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
        ("- 1", "a recipe is a mapping"),
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


def test_an_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(GracecError, match="unknown recipe 'w4a16ptq'; did you mean 'w4a16-ptq'?"):
        Recipe.load("w4a16ptq")
    with pytest.raises(GracecError, match="no such recipe file"):
        Recipe.load("missing.yaml")
