"""A registry finds the classes of its folder, of entry points and of imported modules."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from importlib.metadata import EntryPoint
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from gracec import registry
from gracec.errors import GracecError
from gracec.registry import Registry, nearest

CIRCLE = """
from tests.test_registry import Shape
class Circle(Shape):
    name = "circle"
    def area(self): return 3.0
"""
NUMBER = count()


class Shape(ABC):
    name: ClassVar[str]

    @abstractmethod
    def area(self) -> float: ...


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    """A registry of a package with one module, `circle`, that nothing has imported."""
    package = tmp_path / f"shapes{next(NUMBER)}"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "circle.py").write_text(CIRCLE)
    monkeypatch.syspath_prepend(tmp_path)
    base = type("Base", (Shape,), {})  # each test has its own, with subclasses of its own
    monkeypatch.setattr(sys.modules[__name__], "Shape", base)
    return Registry("shape", base, package.name)


def define(base: type[Any], title: str, **body: Any) -> type[Any]:
    return type(title, (base,), {"__module__": "elsewhere", "area": lambda self: 1.0, **body})


def declare(
    monkeypatch: pytest.MonkeyPatch, shapes: Registry[Any], value: str, loaded: Any
) -> None:
    """An entry point of the group of shapes that loads as this, or raises it."""
    found = EntryPoint(name="extra", value=value, group=shapes.package)

    def load(entry: EntryPoint) -> Any:
        if isinstance(loaded, Exception):
            raise loaded
        return loaded

    monkeypatch.setattr(EntryPoint, "load", load)
    monkeypatch.setattr(
        registry, "declared", lambda group: (found,) if group == shapes.package else ()
    )


def test_the_modules_of_its_folder_are_imported(shapes: Registry[Any]) -> None:
    assert list(shapes.all()) == ["circle"]
    assert shapes.get("circle").__module__ == f"{shapes.package}.circle"


def test_a_class_of_an_imported_module_is_found(shapes: Registry[Any]) -> None:
    square = define(shapes.base, "Square", name="square")
    assert shapes.all() == {"circle": shapes.get("circle"), "square": square}


def test_what_has_no_name_of_its_own_or_is_abstract_is_no_entry(shapes: Registry[Any]) -> None:
    square = define(shapes.base, "Square", name="square")
    derived = define(square, "Derived")
    abstract = type("Abstract", (shapes.base,), {"__module__": "elsewhere", "name": "abstract"})
    assert list(shapes.all()) == ["circle", "square"]
    assert shapes.get("square") is square is not derived and abstract is not None


def test_an_entry_point_names_a_class_or_a_module(
    shapes: Registry[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    square = define(shapes.base, "Square", name="square")
    for value, loaded in (("extra:Square", square), ("extra", ModuleType("extra"))):
        declare(monkeypatch, shapes, value, loaded)
        assert shapes.get("square") is square


def test_an_entry_point_is_found_in_what_is_installed(
    shapes: Registry[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "site" / "extra_shapes-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-shapes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[{shapes.package}]\nsquare = nowhere.to_be_found:Square\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    registry.declared.cache_clear()
    try:
        with pytest.raises(GracecError) as error:
            shapes.all()
    finally:
        registry.declared.cache_clear()
    assert str(error.value) == (
        f"entry point 'square' of extra-shapes ({shapes.package}): "
        "nowhere.to_be_found:Square cannot be imported: No module named 'nowhere'; "
        "mend the package, or uninstall it"
    )


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (ImportError("no module extra\nat all"), "extra cannot be imported: no module extra; mend"),
        (int, "extra is no shape: <class 'int'>; name a subclass of Base"),
        (3, "extra is no shape: 3; name a subclass of Base, or a module that defines one"),
    ],
)
def test_a_broken_entry_point_is_an_error_that_names_it(
    shapes: Registry[Any], monkeypatch: pytest.MonkeyPatch, loaded: Any, message: str
) -> None:
    declare(monkeypatch, shapes, "extra", loaded)
    with pytest.raises(GracecError) as error:
        shapes.all()
    assert str(error.value).startswith(f"entry point 'extra' of a package ({shapes.package}): ")
    assert message in str(error.value)


def test_two_classes_of_one_name_are_an_error(shapes: Registry[Any]) -> None:
    other = define(shapes.base, "Round", name="circle")
    with pytest.raises(GracecError) as error:
        shapes.all()
    assert "two shape classes are called 'circle'" in str(error.value)
    assert f"{shapes.package}.circle.Circle" in str(error.value)
    assert f"elsewhere.{other.__name__}" in str(error.value)
    assert str(error.value).endswith("; rename one, or uninstall its package")


def test_a_class_that_is_defined_again_replaces_the_first(shapes: Registry[Any]) -> None:
    first = define(shapes.base, "Square", name="square")
    second = define(shapes.base, "Square", name="square")
    assert shapes.get("square") is second is not first


def test_an_unknown_name_gives_the_nearest(shapes: Registry[Any]) -> None:
    with pytest.raises(GracecError, match="unknown shape 'cirkle'; did you mean 'circle'?"):
        shapes.get("cirkle")
    with pytest.raises(GracecError, match="unknown shape 'x'; known: circle"):
        shapes.get("x")
    assert nearest("x", ()) == "known: none"
