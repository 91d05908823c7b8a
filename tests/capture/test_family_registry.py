"""Which families there are: those of gracec, of imported modules, and of other packages."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest

from gracec import registry
from gracec.capture import capture, captured_equals_eager
from gracec.capture.families import FAMILIES, GENERIC, families, family_of
from gracec.capture.families.llava import Llava
from gracec.errors import GracecError
from tests.tiny import tiny_llava

OWN = {
    "gemma3",
    "gemma4",
    "glm4v",
    "idefics2",
    "idefics3",
    "internvl",
    "lfm2_vl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """A family of a test is gone after it, as every class that nothing refers to."""
    yield
    gc.collect()
    assert set(families()) == OWN


def test_the_families_of_gracec() -> None:
    assert set(families()) == OWN == set(FAMILIES.all())
    assert all(name == family.model_type for name, family in families().items())


def test_adapters_stay_the_same() -> None:
    """Some keep what they asked a model once."""
    first, again = families(), families()
    assert all(first[name] is again[name] for name in OWN)
    assert type(first["llava_onevision"]) is not type(first["llava"])


def test_a_family_of_a_module_that_was_imported() -> None:
    class Tale(Llava):
        model_type: ClassVar[str] = "tale"

    class Derived(Tale):
        """Sets no model type: no entry of its own."""

    model = tiny_llava()
    model.config.model_type = "tale"
    family = family_of(model)
    assert type(family) is Tale and families()["tale"] is family
    assert captured_equals_eager(capture(model), model) == 3


def test_a_family_that_another_package_declares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "declared_family.py").write_text(
        "from gracec.capture.families.llava import Llava\n\n\n"
        "class Fable(Llava):\n    model_type = 'fable'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    group = FAMILIES.package
    entry = EntryPoint("fable", "declared_family:Fable", group)
    monkeypatch.setattr(registry, "declared", {group: (entry,)}.__getitem__)
    model = tiny_llava()
    model.config.model_type = "fable"
    assert type(family_of(model)).__name__ == "Fable"
    wrong = EntryPoint("fable", "declared_family:Fable.model_type", group)
    monkeypatch.setattr(registry, "declared", {group: (wrong,)}.__getitem__)
    with pytest.raises(GracecError, match="is no family: 'fable'; name a subclass of Family"):
        families()
    del sys.modules["declared_family"]
    monkeypatch.undo()
    assert group == "gracec.capture.families"


def test_two_families_of_one_model_type_are_an_error() -> None:
    class Impostor(Llava):
        model_type: ClassVar[str] = "llava"

    with pytest.raises(GracecError, match="two family classes are called 'llava': .*Impostor"):
        families()
    del Impostor


def test_a_model_of_no_family_gets_the_generic_one() -> None:
    model = tiny_llava()
    model.config.model_type = "nobody_knows"
    assert family_of(model) is GENERIC
