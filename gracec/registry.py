"""What passes, families, formats and targets there are.

A registry knows the classes of one kind by name:

    those of its folder in this package          gracec/passes/*.py
    those that other packages declare            [project.entry-points."gracec.passes"]
    those of any module that was imported        enough in a notebook or a script

Two classes of one name are an error, whoever brings them.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Generic, TypeVar

from gracec.errors import GracecError, first_line

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes of one kind by name.

    Args:
        kind: in the singular, for messages: "pass".
        base: what they are subclasses of.
        package: whose modules define those of gracec; also the name of the entry points' group.
        attribute: of a class, that holds its name. A subclass that sets none of its own is no
            entry, so that one may be derived from another.
    """

    def __init__(self, kind: str, base: type[T], package: str, attribute: str = "name") -> None:
        self.kind, self.base, self.package, self.attribute = kind, base, package, attribute

    def all(self) -> dict[str, type[T]]:
        """Name -> class of every one that is known, sorted by name.

        Raises:
            GracecError: if two have one name, or a declared one cannot be imported.
        """
        _import_folder(self.package)
        for entry in declared(self.package):
            loaded = load_declared(entry)
            if not (isinstance(loaded, ModuleType) or self._is_one(loaded)):
                raise GracecError(
                    f"{entry.value} is no {self.kind}: {loaded!r}",
                    where=_declaration(entry),
                    fix=f"name a subclass of {self.base.__name__}, or a module that defines one",
                )
        found: dict[str, type[T]] = {}
        for cls in _subclasses(self.base):
            name = vars(cls).get(self.attribute, "")
            if not name or inspect.isabstract(cls):
                continue
            other = found.setdefault(name, cls)
            if _origin(other) != _origin(cls):
                raise GracecError(
                    f"two {self.kind} classes are called {name!r}: {_origin(other)} and "
                    f"{_origin(cls)}",
                    fix="rename one, or uninstall its package",
                )
            found[name] = cls  # a cell of a notebook that was run again replaces the first
        return dict(sorted(found.items()))

    def get(self, name: str) -> type[T]:
        """The class of this name.

        Raises:
            GracecError: if there is none, with the nearest known name.
        """
        found: type[T] = lookup(name, self.all(), self.kind)
        return found

    def _is_one(self, loaded: Any) -> bool:
        return isinstance(loaded, type) and issubclass(loaded, self.base)


def lookup(name: str, known: dict[str, Any], kind: str) -> Any:
    """What is known under a name.

    Raises:
        GracecError: if nothing is, with the nearest name that is known.
    """
    if name in known:
        return known[name]
    raise GracecError(f"unknown {kind} {name!r}", fix=nearest(name, known))


def nearest(name: str, known: Iterable[str]) -> str:
    """ "did you mean ...?" or the list of what is known."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}"


@cache
def declared(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group, of every installed package."""
    return tuple(sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.value)))


def load_declared(entry: EntryPoint) -> Any:
    """What an entry point names.

    Raises:
        GracecError: if its package cannot be imported.
    """
    try:
        return entry.load()
    except Exception as error:
        raise GracecError(
            f"{entry.value} cannot be imported: {first_line(error)}",
            where=_declaration(entry),
            fix="mend the package, or uninstall it",
        ) from error


def _declaration(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else "a package"
    return f"entry point {entry.name!r} of {package} ({entry.group})"


@cache
def _import_folder(package: str) -> None:
    folder = importlib.import_module(package)
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{package}.{module.name}")


def _subclasses(base: type[T]) -> Iterator[type[T]]:
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _origin(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
