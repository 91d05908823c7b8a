"""A selector means some weights, by place or by name."""

import pytest

from gracec.selectors import Place, fits, is_selector, part_named

DOWN = Place("decoder", 3, "down")


@pytest.mark.parametrize(
    ("selector", "place", "meant"),
    [
        ("decoder", DOWN, True),
        ("decoder", Place("head"), False),
        ("decoder.down", DOWN, True),
        ("decoder.mlp", DOWN, True),
        ("decoder.attention", DOWN, False),
        ("decoder.blocks[*]", DOWN, True),
        ("decoder.blocks[*].up", DOWN, False),
        ("decoder.blocks[3].down", DOWN, True),
        ("decoder.blocks[0..2]", DOWN, False),
        ("decoder.blocks[0..3]", DOWN, True),
        ("decoder.blocks[-1]", DOWN, False),
        ("decoder.blocks[-2..-1]", DOWN, True),
        ("decoder.blocks[1..-2]", DOWN, True),
        ("decoder.blocks[*]", Place("decoder"), False),
        ("*.down_proj.weight", DOWN, True),
        ("lm.layers.[0-2].*", DOWN, False),
        ("lm.layers.3.mlp.down_proj.weight", DOWN, True),
    ],
)
def test_it_means_a_weight_or_not(selector: str, place: Place, meant: bool) -> None:
    assert is_selector(selector)
    names = ("lm.layers.3.mlp.down_proj.weight",)
    assert fits(selector, place, names, blocks=5) == meant


def test_a_word_is_no_selector_unless_it_is_a_part() -> None:
    assert not is_selector("decodr") and not is_selector("mlp")
    assert part_named("vision.down") == "vision" and part_named("vision_tower.*") == ""
