"""gracec: a quantizing compiler for vision-language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gracec._quiet import drop_import_noise, keep_usage_data
from gracec._requirements import check_versions_of_command
from gracec._version import __version__

if TYPE_CHECKING:
    from gracec.compiled import CompiledModel, load
    from gracec.compiler import compile
    from gracec.planning import plan
    from gracec.recipe import Recipe

__all__ = ["CompiledModel", "Recipe", "__version__", "compile", "load", "plan"]

check_versions_of_command()
drop_import_noise()
keep_usage_data()


def __getattr__(name: str) -> Any:
    """Import on first use: `gracec --help` needs no torch."""
    if name in ("CompiledModel", "compile", "load"):
        from gracec import compiler

        return getattr(compiler, name)
    if name == "plan":
        from gracec.planning import plan

        return plan
    if name == "Recipe":
        from gracec.recipe import Recipe

        return Recipe
    raise AttributeError(f"module 'gracec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
