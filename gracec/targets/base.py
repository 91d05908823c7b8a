"""What a target is: a runtime that frozen models are lowered to.

A runtime is added with one file that defines one `Target`; `compile`, `load`, `gracec doctor` and
the command line know it then.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from gracec.backends.base import UNSIGNED, signed_refusal
from gracec.errors import GracecError
from gracec.frozen import Frozen
from gracec.gates import LogitAgreement, lowered_is_as_good_as_dense
from gracec.journal import Figure, Note
from gracec.registry import Registry, nearest


class Runtime(Protocol):
    """A model as a target runs it; it is called and generates like a Hugging Face model."""

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""

    def __call__(self, **inputs: Tensor) -> Any:
        """An output of transformers: its `logits` [B, T, V] are those of a batch from the
        processor."""

    def generate(self, **inputs: Any) -> Tensor:
        """Token ids int64 [B, T + new]."""


class Target(ABC):
    """One way to run a frozen model.

    Attributes:
        name: what a user asks for.
        aliases: other words for it.
        holds_signed: whether its kernels take negative scales; where they do not, `compile` plans
            positive ones and says so.
        passes: names of those that it lowers with, next to which further ones can be placed.
        reads: whether it runs files of its own, of the folder `onnx`, and needs no codes.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    holds_signed: ClassVar[bool] = True
    passes: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[bool] = False

    @abstractmethod
    def lower(self, frozen: Frozen, *, strict: bool = False) -> tuple[Runtime, Sequence[Note]]:
        """What runs a model, from its codes; nothing is quantized again.

        Args:
            strict: refuse weights that would run dense.

        Returns:
            The runtime, and what a user should know.
        """

    def refusal(self, frozen: Frozen) -> str:
        """Why the target cannot run a model at all (one line), or an empty string.

        It and `dense` are asked before anything is trained as well, of a model whose codes and
        scales are stand-ins without memory.
        """
        return ""

    def dense(self, frozen: Frozen) -> dict[str, str]:
        """FQN -> why no kernel of the target takes a weight, which then runs dense."""
        return {}

    def agrees(
        self, runtime: Runtime, found: LogitAgreement, dense: LogitAgreement, dtype: torch.dtype
    ) -> float:
        """Gate: logits are as close to those that were compiled as they have to be.

        Args:
            found, dense: how close those of the runtime are, and of dense weights.
            dtype: of what was compiled.

        Returns:
            The largest KL divergence that passes.

        Raises:
            GateError: if it is larger.
        """
        return lowered_is_as_good_as_dense(found, dense, dtype)

    def exact(self, runtime: Runtime, frozen: Frozen) -> Frozen | None:
        """The model to lower instead where a runtime rounds more than its codes do, and nobody
        asked for it; None where it does not.

        It is taken where rounding costs accuracy on the questions of a compilation.
        """
        return None

    def gates(self, runtime: Runtime, frozen: Frozen) -> Mapping[str, Figure]:
        """Name -> figure of every gate of the target's own.

        Raises:
            GateError: if one fails.
        """
        return {}

    def read(self, directory: Path) -> Runtime | None:
        """A runtime from files that the target needs no codes for, or None where it lowers them."""
        return None

    def check(self, frozen: Frozen, *, strict: bool = False) -> None:
        """Refuse a model that the target cannot run.

        Raises:
            GracecError: with the reason.
        """
        reason = self.refusal(frozen)
        if reason:
            raise GracecError(reason, where=f"target {self.name}", fix="choose another target")
        if reason := signed_refusal(frozen, self.holds_signed):
            raise GracecError(reason, where=f"target {self.name}", fix=UNSIGNED)
        for fqn, reason in self.dense(frozen).items() if strict else ():
            raise GracecError(
                f"no kernel of {self.name} takes it: {reason}",
                where=fqn,
                fix="change the recipe or drop strict",
            )

    def summary(self, frozen: Frozen) -> str:
        """How much of a model runs on kernels, in one line.

        Raises:
            GracecError: if none of it does.
        """
        dense, total = self.dense(frozen), len(frozen.weights)
        if not dense:
            return f"kernels for all {total} weights"
        counts = Counter(dense.values())
        reasons = "; ".join(f"{count}: {reason}" for reason, count in counts.items())
        if len(dense) == total:
            raise GracecError(f"no kernel takes any of the weights: {reasons}")
        return f"{len(dense)} of {total} weights would run dense, first {min(dense)} ({reasons})"


TARGETS: Registry[Target] = Registry("target", Target, "gracec.targets")  # type: ignore[type-abstract]
DEFAULT, AUTO = "torchao", "auto"
"""What compiles; and the word for what runs a directory fastest, for `gracec.load`."""


def target_named(name: str | Target | None) -> Target:
    """A target by its name or another word for it; torchao by default.

    Raises:
        GracecError: if there is none, with the nearest known name.
    """
    if isinstance(name, Target):
        return name
    targets = TARGETS.all()
    known = dict(targets)
    for kind in targets.values():
        for alias in kind.aliases:
            other = known.setdefault(alias, kind)
            if other is not kind:
                raise GracecError(
                    f"{alias!r} is another word for target {kind.name!r}, and for {other.name!r}",
                    fix="rename one, or uninstall its package",
                )
    if (name or DEFAULT) not in known:
        raise GracecError(f"unknown target {name!r}", fix=nearest(str(name), known))
    return known[name or DEFAULT]()
