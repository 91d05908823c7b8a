"""correct-codes: choose scales and codes by what they do to outputs, one fused set after the other.

    linear(x, fake_quantize(w, w_scale)) -> linear(x, dequantize(codes, scales))

Calibration samples go through the graph together, from the inputs of one fused set to those of the
next, so that every set is calibrated on what the quantized sets before it feed it, and no more is
in memory than what is live there. For each set:

    H       second moments of its inputs X, for each matrix of a weight
    scales  by grid search, an error weighed by H: by its diagonal at 4 bits and more, at 3 and
            fewer by the block of it that a group reads
    codes   each column makes up for the rounding of those before it (`gracec.quant.gptq`)

At 3 bits and fewer the weights also make up for the error of their inputs before that; how much, is
chosen by the divergence of the logits on held-out samples (by the error of the outputs, of a module
that has no logits), or given.

On the held-out samples the output error of each matrix is compared with that of plain rounding (to
nearest, scales of the largest weight), and what is worse than that is not taken. A matrix that no
held-out sample reaches is compared on those that it was calibrated on. What was found is annotated
as `output_error`: shares of the energy of the output, of plain rounding, of rounding on the
searched scales, and of what was taken.

A weight that no sample reaches keeps its fake_quantize, and is frozen with the scales that it has;
so does one whose floats lie on its grid already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx

from gracec import quant
from gracec._memory import trim
from gracec.ir.annotations import experts_of, planned_quant
from gracec.ir.matmul_rows import matmul_rows, matmul_shape, rows_operands
from gracec.ir.program import Program, annotate, annotation
from gracec.ir.queries import EXPERT_LINEAR
from gracec.ir.stream import Stream
from gracec.passes.base import Pass, PassResult
from gracec.passes.freeze import DEQUANTIZE, drop_dead_tensors, frozen_nodes, replace_fake
from gracec.passes.insert_fake_quant import FAKE_QUANTIZE, FakeQuantized, fake_quantized, reader
from gracec.passes.insert_observers import sees
from gracec.quant import FrozenWeight
from gracec.quant.gptq import Factor, compensated, corrected_codes, factor
from gracec.quant.observers import weight_scales
from gracec.quant.second_moments import SecondMoments, blocks_of, importance

FEW_BITS = 3
"""From here down blocks of H decide on scales, and weights make up for errors of their inputs."""
SHARES = (1.0, 0.25, 0.0)
"""Of that correction, tried where none is given."""
WIDEST_BLOCK = 256
"""Features of a group whose block of H is looked at; of wider ones the diagonal."""
MOMENTS_OF_PARTS = 1 << 28
"""Values of H of all matrices of a weight together; where there are more, they share one."""

LOGITS = "logits"

Samples = Sequence[Mapping[str, Tensor]]


class Progress(Protocol):
    """What is told of, and keeps, the weights that are done."""

    def kept(self, run: str, number: int) -> dict[str, Corrected] | None:
        """The weights of a set, if an earlier run of the same compilation has kept them."""

    def keep(self, run: str, number: int, of: int, weights: Mapping[str, Corrected]) -> None:
        """Take the weights of one of so many sets."""


@dataclass(frozen=True)
class Corrected:
    """The codes of a weight, and how far its outputs are off on held-out inputs.

    Attributes:
        errors: shares of the energy of the output: of plain rounding, of rounding on the searched
            scales, and of what was taken.
        how: "corrected", "rounded" where that was not better, or "partly" where it was for some of
            the matrices of the weight.
    """

    weight: FrozenWeight
    errors: tuple[float, float, float]
    how: str


@dataclass(frozen=True)
class FusedSet:
    """Matmuls that multiply the same rows.

    Attributes:
        x: the activation that they read.
        weights: name -> the fake-quantized weight of each that is not in an earlier set.
        parts, features: matrices of each weight, and columns of each.
    """

    x: fx.Node
    matmul: fx.Node
    weights: dict[str, FakeQuantized]
    parts: int
    features: int

    @property
    def watched(self) -> list[fx.Node]:
        """What the rows are computed from."""
        how = [operand for operand in rows_operands(self.matmul) if isinstance(operand, fx.Node)]
        return [self.x, *how]


@dataclass(frozen=True)
class CorrectCodes(Pass):
    """Options:
        samples: prepared inputs of the graph, without padding, to calibrate on.
        held_out: others, to compare on; without them, the same.
        damping: added to the diagonal of H, as a share of its mean.
        order: of the columns: by "activation", the largest first, or "natural".
        asymmetric: share of the correction for the error of inputs; None tries `SHARES` at 3 bits
            and fewer and takes none otherwise.
        candidates, lowest, highest: the grid of the scale search.
        progress: is told of every set that is done.

    A sample of text alone leaves out the inputs that are about images, whose weights it does not
    calibrate.
    """

    samples: Samples = field(default=())
    held_out: Samples = field(default=())
    damping: float = 0.01
    order: str = "activation"
    asymmetric: float | None = None
    candidates: int = 64
    lowest: float = 0.3
    highest: float = 1.2
    progress: Progress | None = None
    name: ClassVar[str] = "correct-codes"
    keeps_numerics: ClassVar[bool] = False

    def requires(self, program: Program) -> None:
        if not any(any(program.nodes(op)) for op in (FAKE_QUANTIZE, DEQUANTIZE)):
            raise self.refuse("nothing is fake-quantized", fix="run insert-fake-quant first")
        if self.order not in ("activation", "natural"):
            raise self.refuse(f"unknown order {self.order!r}", fix="use activation or natural")

    def apply(self, program: Program) -> PassResult:
        if not any(program.nodes(FAKE_QUANTIZE)):
            return PassResult(program, False)
        samples = list(self.samples) or [program.example_inputs]
        sets = [
            each
            for each in fused_sets(program)
            if any(sees(program, each.x, sample) for sample in samples)
        ]
        specs = [planned_quant(reader(fake.node)) for s in sets for fake in s.weights.values()]
        shares: tuple[float, ...] = (self.asymmetric or 0.0,)
        if self.asymmetric is None and any(spec.bits <= FEW_BITS for spec in specs):
            shares = SHARES
        notes: list[str] = [] if self.samples else ["calibrated on the EXAMPLE inputs only"]
        found: dict[str, Corrected] = {}
        least = float("inf")
        for share in shares:
            run = _Run(self, program, sets, samples, share)
            corrected, said = run.solve()
            divergence = run.divergence(corrected) if len(shares) > 1 else 0.0
            if len(shares) > 1:
                off = (
                    "KL {:.4g} nats" if LOGITS in program.outputs else "error {:.4g} of the outputs"
                )
                told_of = f"asymmetric {share:g}: {off.format(divergence)} on held-out samples"
                notes.append(told_of)
            if not found or divergence < least:
                found, least, told = corrected, divergence, said
        notes += told
        for fake in list(fake_quantized(program)):
            if fake.fqn in found:
                self._replace(program, fake, found[fake.fqn])
        drop_dead_tensors(program)
        readers = [annotation(reader(node)) for node in program.nodes(FAKE_QUANTIZE)]
        left = sum("lattice" not in one for one in readers)
        if found or left:
            notes.append(f"codes of {len(found)} weights corrected on {len(samples)} samples")
        for how, what in (("rounded", "rounded"), ("partly", "some of its matrices rounded")):
            if names := [name for name, one in found.items() if one.how == how]:
                why = "nothing better was found on held-out inputs"
                notes.append(f"{_some(names)}: {what}, {why}")
        if left:
            notes.append(f"{left} weights not calibrated: no sample reaches them")
        return PassResult(program, bool(found), tuple(notes))

    @staticmethod
    def _replace(program: Program, fake: FakeQuantized, corrected: Corrected) -> None:
        errors = [float(f"{error:.4g}") for error in corrected.errors]
        annotate(reader(fake.node), output_error=errors, codes=corrected.how)
        replace_fake(program, fake, corrected.weight)


class _Run:
    """Sets solved one after the other, with one share of the asymmetric correction."""

    def __init__(
        self,
        item: CorrectCodes,
        program: Program,
        sets: Sequence[FusedSet],
        samples: Samples,
        share: float,
    ) -> None:
        self.item, self.program, self.sets, self.share = item, program, sets, share
        self.samples = [*samples, *item.held_out]
        count = len(self.samples)
        self.calibrating = range(len(samples))
        self.held_out = range(len(samples), count) if item.held_out else self.calibrating
        self.notes: list[str] = []

    def solve(self) -> tuple[dict[str, Corrected], list[str]]:
        """The codes of every weight of the sets, and what is to be said."""
        found: dict[str, Corrected] = {}
        until = [node for one in self.sets for node in one.watched]
        quantized = Stream(self.program, self.samples, until, self._quantized(found))
        original = None
        if self.share:
            original = Stream(self.program, self.samples, until, self._originals())
        run, progress = f"{self.share:g}", self.item.progress
        streams = [quantized] if original is None else [quantized, original]
        for number, each in enumerate(self.sets):
            for stream in streams:
                for node in each.watched:
                    stream.advance(node)
            kept = None if progress is None else progress.kept(run, number)
            solved = self._solve(each, quantized, original) if kept is None else kept
            found |= solved
            if progress is not None:
                progress.keep(run, number, len(self.sets), solved)
            later = {node for one in self.sets[number + 1 :] for node in one.watched}
            for stream in streams:
                for node in set(each.watched) - later:
                    stream.release(node)
            trim()  # what is left between the values of many samples is as large as they are
        return found, self.notes

    def divergence(self, found: Mapping[str, Corrected]) -> float:
        """How far held-out samples come out from the original's: the mean KL divergence of the
        logits, or, where there are none, the error of the outputs as a share of their energy."""
        outputs = self.program.outputs
        nodes = [outputs[LOGITS]] if LOGITS in outputs else list(outputs.values())
        total = whole = 0.0
        for number in self.held_out:
            values = []
            for stand_ins in (self._originals(), self._quantized(found)):
                stream = Stream(self.program, [self.samples[number]], nodes, stand_ins)
                for node in nodes:
                    stream.advance(node)
                values.append([stream.value(node, 0).double() for node in nodes])
            for expected, other in zip(*values, strict=True):
                if LOGITS in outputs:
                    expected, other = expected.log_softmax(-1), other.log_softmax(-1)
                    total += float((expected.exp() * (expected - other)).sum())
                    whole += expected[..., 0].numel()
                else:
                    total += float((expected - other).square().sum())
                    whole += float(expected.square().sum())
        return total / (whole or 1.0)

    def _quantized(self, found: Mapping[str, Corrected]) -> dict[fx.Node, Any]:
        """What stands for each weight: its codes, once there are some."""

        def value(fake: FakeQuantized) -> Tensor:
            if fake.fqn in found:
                one = found[fake.fqn].weight
                return quant.dequantize(one.stored, one.scales, one.group_size, self.program.dtype)
            dtype = self.program.dtype
            return quant.fake_quantize(fake.weight, fake.scales, fake.bits, fake.group_size, dtype)

        return {fake.node: partial(value, fake) for fake in fake_quantized(self.program)}

    def _originals(self) -> dict[fx.Node, Any]:
        dtype = self.program.dtype
        return {fake.node: partial(fake.weight.to, dtype) for fake in fake_quantized(self.program)}

    def _solve(
        self, each: FusedSet, quantized: Stream, original: Stream | None
    ) -> dict[str, Corrected]:
        device, name = self.program.device, next(iter(each.weights))
        apart = each.parts * each.features**2 <= MOMENTS_OF_PARTS or each.parts == 1
        if not apart:
            self.notes.append(f"{name}: its {each.parts} matrices share their second moments")
        if each.matmul.target == EXPERT_LINEAR:
            original = None  # which rows an expert gets is not the same in both
        parts = each.parts if apart else 1
        moments = SecondMoments(each.features, parts, full=True, device=device)
        cross = torch.zeros_like(moments.sums) if original is not None else None
        for sample in self.calibrating:
            for part, rows, wanted in self._rows(each, sample, quantized, original):
                place = part if apart else 0
                moments.add(place, rows)
                if cross is not None:
                    cross[place].addmm_((wanted - rows).t(), rows)
        if moments.unseen_parts:
            self.notes.append(f"{name}: {moments.unseen_parts} of {parts} matrices saw no sample")
        if cross is not None:
            counts = torch.tensor(moments.counts, device=device).clamp_min(1)
            cross /= counts.view(-1, 1, 1)
        inputs = self._inputs(each, moments.means(inplace=True), cross, quantized, original)
        return {
            fqn: self._joined(fake, [self._matrix(fake, n, one) for n, one in enumerate(inputs)])
            for fqn, fake in each.weights.items()
        }

    def _rows(
        self, each: FusedSet, sample: int, quantized: Stream, original: Stream | None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """float32 rows of each matrix as the quantized model feeds them, and as the original."""
        if not sees(self.program, each.x, self.samples[sample]):
            return
        how = tuple(
            quantized.value(operand, sample) if isinstance(operand, fx.Node) else operand
            for operand in rows_operands(each.matmul)
        )
        streams = [quantized] if original is None else [quantized, original]
        found = [matmul_rows(each.matmul.target, one.value(each.x, sample), how) for one in streams]
        for (part, rows), *others in zip(*found, strict=True):
            rows = rows.float()
            yield part, rows, others[0][1].float() if others else rows

    def _inputs(
        self,
        each: FusedSet,
        means: Tensor,
        cross: Tensor | None,
        quantized: Stream,
        original: Stream | None,
    ) -> list[Inputs]:
        """What is known of the rows of each matrix."""
        name, found = next(iter(each.weights)), []
        for matrix in means:
            factored = factor(
                matrix, self.item.damping, by_activation=self.item.order == "activation"
            )
            if factored is None:
                self.notes.append(f"{name}: the second moments have no factor, codes are rounded")
            elif factored.damping > self.item.damping:
                self.notes.append(f"{name}: damping {factored.damping:g} was needed")
            found.append(factored)
        rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(each.parts)]
        for samples in (self.held_out, self.calibrating):
            missed = [not pairs for pairs in rows]
            for sample in samples if any(missed) else ():
                for part, given, wanted in self._rows(each, sample, quantized, original):
                    if missed[part]:
                        rows[part].append((given, wanted))
            if samples is self.held_out and not any(rows):
                self.notes.append(f"{name}: no held-out sample reaches it, compared on the others")
        empty = torch.zeros(0, each.features, device=self.program.device)
        inputs = []
        for part, pairs in enumerate(rows):
            place = min(part, len(means) - 1)
            pairs = pairs or [(empty, empty)]
            given = torch.cat([one for one, _ in pairs])
            wanted = given if original is None else torch.cat([one for _, one in pairs])
            own = None if cross is None else cross[place]
            inputs.append(Inputs(means[place], own, found[place], given, wanted))
        return inputs

    def _matrix(self, fake: FakeQuantized, number: int, inputs: Inputs) -> Candidates:
        """The codes of one matrix [N, K] of a weight."""
        item, linear = self.item, reader(fake.node)
        spec, parts = planned_quant(linear), matmul_shape(linear)[0]
        matrix = fake.weight.chunk(parts)[number].to(torch.float32)
        group = spec.group_of(matrix.shape[1])
        moved, scales = matrix, None
        if inputs.cross is not None:
            moved = compensated(matrix, inputs.moments, inputs.cross, self.share)
        if _keeps_scales(linear):
            scales = fake.scales.expand(len(fake.weight), -1).chunk(parts)[number]
        else:
            by_block = spec.bits <= FEW_BITS and group <= WIDEST_BLOCK
            scales = quant.search_scales(
                moved,
                spec.bits,
                group,
                scale_grid=spec.scale_grid,
                candidates=item.candidates,
                lowest=item.lowest,
                highest=item.highest,
                signed=spec.signed,
                importance=None if by_block else importance(inputs.moments.diagonal()),
                blocks=blocks_of(inputs.moments, group) if by_block else None,
            )
        plain = scales if _keeps_scales(linear) else weight_scales(matrix, spec, "min_max")
        tried = [
            (quant.quantize(matrix, plain, spec.bits, group), plain),
            (quant.quantize(matrix, scales, spec.bits, group), scales),
        ]
        if inputs.factored is not None:
            codes = corrected_codes(moved, scales, spec.bits, group, inputs.factored)
            tried.append((codes, scales))
        return Candidates.of(matrix, tried, group, inputs)

    def _joined(self, fake: FakeQuantized, matrices: Sequence[Candidates]) -> Corrected:
        """A weight from its matrices."""
        linear = reader(fake.node)
        spec = planned_quant(linear)
        scales = torch.cat([one.scales for one in matrices])
        if spec.granularity == "per_tensor":
            scales = fake.scales
        codes = torch.cat([one.codes for one in matrices])
        energy = sum(one.energy for one in matrices) or 1.0
        plain, searched, taken = (
            sum(one.errors[place] for one in matrices) / energy for place in range(3)
        )
        how = {one.corrected for one in matrices}
        return Corrected(
            FrozenWeight.from_codes(codes, scales, spec, experts_of(linear)),
            (plain, searched, taken),
            "partly" if len(how) > 1 else "corrected" if how == {True} else "rounded",
        )


@dataclass(frozen=True)
class Inputs:
    """What is known of the rows that a matrix multiplies.

    Attributes:
        moments, cross: H and C, [K, K].
        factored: of H, if it could be.
        rows, wanted: float32 [n, K], held out: as the quantized model feeds them, and the original.
    """

    moments: Tensor
    cross: Tensor | None
    factored: Factor | None
    rows: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class Candidates:
    """The best of some codes of a matrix.

    Attributes:
        errors: squares of the error of the output on held-out rows: of plain rounding, of rounding
            on the searched scales, and of what was taken.
        energy: squares of the output itself.
        corrected: whether the corrected codes were taken.
    """

    codes: Tensor
    scales: Tensor
    errors: tuple[float, float, float]
    energy: float
    corrected: bool

    @classmethod
    def of(
        cls, matrix: Tensor, tried: Sequence[tuple[Tensor, Tensor]], group: int, inputs: Inputs
    ) -> Candidates:
        """Plain rounding, rounding on the searched scales and, last, what is taken if it is no
        worse than the first: of what is left then, the better."""
        target = inputs.wanted @ matrix.t()
        errors = [
            float((target - inputs.rows @ quant.dequantize(*one, group).t()).square().sum())
            for one in tried
        ]
        chosen = len(tried) - 1
        if not errors[chosen] <= errors[0]:
            chosen = 1 if errors[1] <= errors[0] else 0
        return cls(
            *tried[chosen],
            (errors[0], errors[1], errors[chosen]),
            float(target.square().sum()),
            chosen == 2,
        )


def output_errors(program: Program) -> dict[str, tuple[float, float, float]]:
    """FQN -> `Corrected.errors` of every weight whose codes were corrected."""
    found = {}
    for frozen in frozen_nodes(program):
        errors = annotation(reader(frozen.node)).get("output_error")
        if errors is not None:
            found[frozen.fqn] = (errors[0], errors[1], errors[2])
    return found


def codes_taken(program: Program) -> dict[str, str]:
    """FQN -> `Corrected.how` of every weight that was calibrated."""
    found = {one.fqn: annotation(reader(one.node)).get("codes") for one in frozen_nodes(program)}
    return {fqn: how for fqn, how in found.items() if how is not None}


def fused_sets(program: Program) -> list[FusedSet]:
    """The fake-quantized weights that multiply the same rows, in the order of the graph."""
    found: dict[tuple[Any, ...], FusedSet] = {}
    seen: set[str] = set()
    for fake in fake_quantized(program):
        matmul = reader(fake.node)
        x = matmul.args[0]
        assert isinstance(x, fx.Node)
        parts, features = matmul_shape(matmul)
        key = (x, matmul.target, parts, str(rows_operands(matmul)))
        one = found.setdefault(key, FusedSet(x, matmul, {}, parts, features))
        if "lattice" in annotation(matmul):  # codes that are given have nothing to make up for
            continue
        if fake.fqn not in seen:  # a module that is called twice is calibrated on its first inputs
            one.weights[fake.fqn] = fake
            seen.add(fake.fqn)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    return sorted((one for one in found.values() if one.weights), key=lambda one: order[one.matmul])


def _keeps_scales(linear: fx.Node) -> bool:
    """Whether the scales that a weight has are another observer's, or one for all of it."""
    observer = annotation(linear).get("weight_observer", "mse")
    return observer != "mse" or planned_quant(linear).granularity == "per_tensor"


def _some(names: Sequence[str]) -> str:
    more = len(names) - 1
    return f"{names[0]} and {more} more" if more else names[0]
