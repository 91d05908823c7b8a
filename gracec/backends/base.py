"""What a format is: one way to write a frozen model for other programs.

A format packs canonical codes and scales and quantizes nothing. What it wrote is read back by code
of the library that will load it, and compared with codes times scales bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gracec.errors import GateError, GracecError
from gracec.frozen import Frozen
from gracec.models.lora import MERGE
from gracec.registry import Registry, lookup

NO_ADAPTERS = "adapters are kept in float, which the format does not hold"
UNSIGNED = "compile with `signed: false` in the rules for weights"
MERGE_INSTEAD = f"compile with {MERGE}"
NO_EXPERTS = (
    "the weights of routed experts are no linears, which is all that the format holds; "
    "--format none (formats=()) writes the gracec artifact alone"
)


def signed_refusal(frozen: Frozen, holds_signed: bool) -> str:
    """Why a format or a target cannot hold the scales of a model (one line), or ""."""
    signed = [fqn for fqn, weight in frozen.weights.items() if weight.spec.signed]
    if holds_signed or not signed:
        return ""
    return f"{signed[0]} has signed scales, and it takes no negative ones"


class CardFacts(NamedTuple):
    """What a model card says about a format.

    Attributes:
        needs: what has to be installed beside transformers to load it.
        tested: a sentence on what was done with such directories.
        weights: what is quantized and how, in half a sentence.
    """

    needs: str
    tested: str
    weights: str


class Format(ABC):
    """One way to write a frozen model.

    Attributes:
        name: what a user asks for.
        folder: "" for the top level of the output directory, else a sub-directory of its own.
        holds_activations: whether it can say how the input of a linear is quantized.
        holds_adapters: whether it takes adapters in float beside the weights.
        holds_experts: whether it takes the weights of routed experts, which are no linears.
        holds_signed: whether its readers take negative scales; where they do not, `compile` plans
            positive ones and says so.
        by_name_alone: whether "all" leaves it out, because few models fit it or it needs a package
            that is not installed with gracec.
        passes: names of those that it lowers with, next to which further ones can be placed.
    """

    name: ClassVar[str]
    folder: ClassVar[str]
    holds_activations: ClassVar[bool] = False
    holds_adapters: ClassVar[bool] = False
    holds_experts: ClassVar[bool] = False
    holds_signed: ClassVar[bool] = True
    by_name_alone: ClassVar[bool] = False
    passes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def write(self, frozen: Frozen, directory: Path) -> tuple[str, ...]:
        """Write the model and read it back.

        Args:
            directory: of this format; it is made, and other files in it are left alone.

        Returns:
            What a user should know about it.

        Raises:
            GracecError: if the format cannot hold the model.
            GateError: if what is read back is not codes times scales, bit for bit.
        """

    @abstractmethod
    def stored_weights(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """FQN and dense weight of every quantized weight, one at a time, unpacked by code of the
        library that loads them; others may be among them."""

    def refusal(self, frozen: Frozen) -> str:
        """Why this format cannot hold a model (one line), or an empty string.

        It is asked before anything is trained as well, of a model whose codes and scales are
        stand-ins without memory: see `FrozenWeight.planned`. By default it is what
        `holds_activations`, `holds_adapters` and `holds_experts` say.
        """
        if frozen.adapters and not self.holds_adapters:
            return f"{NO_ADAPTERS}; {MERGE_INSTEAD}"
        for fqn, weight in frozen.weights.items():
            if weight.activation is not None and not self.holds_activations:
                return f"the input of {fqn} is quantized, which the format cannot say"
            if weight.experts is not None and not self.holds_experts:
                return f"{fqn}: {NO_EXPERTS}"
        return ""

    def dtype(self, frozen: Frozen) -> torch.dtype:
        """The dtype of scales and of everything that is not quantized."""
        return frozen.dtype

    def examined(self, accept: Callable[[Any], str]) -> Format:
        """The same, which asks a model that computes otherwise than its codes for more.

        Args:
            accept: a model that generates -> why it is not good enough, or "".
        """
        return self

    def finish(self, frozen: Frozen, directory: Path) -> None:
        """Complete the top level of the output directory, after everything else is written."""

    def seal(self, directory: Path) -> None:
        """Write down the hashes of the top level, once every format has completed it."""

    def card(self, frozen: Frozen) -> CardFacts | None:
        """What the model card of a directory says about the format; None if it needs no card."""
        return None

    def read_weights(self, directory: Path) -> dict[str, Tensor]:
        """FQN -> dense weight of all `stored_weights` of a directory."""
        return dict(self.stored_weights(directory))

    def check(self, frozen: Frozen) -> None:
        """Refuse a model that the format cannot hold.

        Raises:
            GracecError: with the reason.
        """
        reason = self.refusal(frozen)
        if reason:
            raise GracecError(reason, where=f"format {self.name}", fix="choose other formats")
        if reason := signed_refusal(frozen, self.holds_signed):
            raise GracecError(reason, where=f"format {self.name}", fix=UNSIGNED)

    def check_stored_weights(self, frozen: Frozen, directory: Path) -> None:
        """The gate at the end of `write`: each quantized weight is read back, and is codes times
        scales bit for bit. What is read back of others is what they are.

        Raises:
            GateError: naming the first that is not.
        """
        dtype, missing, where = self.dtype(frozen), set(frozen.weights), f"format {self.name}"
        for fqn, found in self.stored_weights(directory):
            if fqn in frozen.weights:
                expected, meant = frozen.weights[fqn].dequantize(dtype), "codes times scales"
            elif fqn in frozen.others:
                expected, meant = frozen.others[fqn].to(dtype), "it is"
            else:
                raise GateError(f"{fqn} reads back, and the model has none", where=where)
            if found.dtype != expected.dtype or not torch.equal(found, expected):
                raise GateError(f"{fqn} reads back other than {meant}", where=where)
            missing.discard(fqn)
        if missing:
            raise GateError(f"{min(missing)} does not read back", where=where)


def check_formats(formats: Iterable[Format], frozen: Frozen) -> None:
    """Refuse formats that cannot hold a model.

    Where nothing is quantized, "hf" is an ordinary model, which needs no format.

    Raises:
        GracecError: with the first reason.
    """
    for form in formats:
        if frozen.weights or form.folder:
            form.check(frozen)


FORMATS: Registry[Format] = Registry("format", Format, "gracec.backends")  # type: ignore[type-abstract]


def all_formats() -> dict[str, Format]:
    """Name -> every format that is known, with its default options."""
    return {name: kind() for name, kind in FORMATS.all().items()}


def parse_formats(names: str | Iterable[str]) -> list[Format]:
    """Formats by name: "hf,torchao", a sequence of names, "all" or "none".

    "all" leaves those out that are asked for by name alone.

    Raises:
        GracecError: for an unknown format, with the nearest known name; for two that would write
            over each other.
    """
    known = all_formats()
    parts = names.split(",") if isinstance(names, str) else names
    wanted = dict.fromkeys(part.strip() for part in parts)
    if "none" in wanted:
        if len(wanted) > 1:
            raise GracecError("format none stands alone", fix="leave it out, or the others")
        return []
    if "all" in wanted:
        everything = [name for name, form in known.items() if not form.by_name_alone]
        wanted = dict.fromkeys([name for name in wanted if name != "all"] + everything)
    found: list[Format] = [lookup(name, known, "format") for name in wanted]
    owners: dict[str, Format] = {}
    for form in found:
        other = owners.setdefault(form.folder, form)
        if other is not form:
            place = f"the folder {form.folder!r}" if form.folder else "the top level"
            raise GracecError(
                f"formats {other.name} and {form.name} both write to {place}",
                fix="ask for one of them",
            )
    return found
