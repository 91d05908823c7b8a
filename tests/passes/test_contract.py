"""Every pass that is registered keeps what passes promise, and a pass that does not is caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx

from gracec.capture.serving import ServingProgram
from gracec.errors import PassError
from gracec.ir.program import Program, annotate, annotation
from gracec.module import capture_module
from gracec.passes import Pass, PassResult, all_passes, parse_pipeline, run_passes
from gracec.passes.apply_codes import ApplyCodes
from gracec.passes.contract import check_contract, digest
from gracec.passes.freeze import frozen_weights
from gracec.passes.observe_second_moments import moment_observers
from gracec.passes.options import options_of
from gracec.passes.strip import drop_dead
from tests.nets import conv_net

After = Callable[[str], Program]
PLAN = "analyze-modality,plan-quantization"
OBSERVED = f"{PLAN}{{recipe=w4a8}},insert-observers"
FAKE = f"{PLAN},insert-fake-quant"
FROZEN = f"{FAKE},freeze"
PREPARED: dict[str, tuple[str, ...]] = {
    "analyze-modality": ("",),
    "plan-quantization": ("analyze-modality",),
    "insert-taps": ("analyze-modality",),
    "select-supervised": ("analyze-modality",),
    "insert-observers": (f"{PLAN}{{recipe=w4a8}}", f"{PLAN}{{recipe=w8a8}}"),
    "observe-second-moments": (PLAN, OBSERVED),
    "insert-fake-quant": (PLAN, OBSERVED, f"{PLAN},observe-second-moments"),
    "correct-codes": (FAKE, f"{OBSERVED},insert-fake-quant"),
    "freeze": (FAKE, f"{OBSERVED},insert-fake-quant", f"{FAKE},free-scales"),
    "free-scales": (FAKE, FROZEN),
    "hoist-fake-quant": (FAKE, f"{FAKE},free-scales"),
    "lower-torchao": (FROZEN,),
    "lower-qdq": (FROZEN, f"{OBSERVED},insert-fake-quant,freeze"),
    "return-head": ("analyze-modality,insert-taps,select-supervised",),
    "strip": ("analyze-modality,insert-taps",),
}
"""Pass -> the pipelines that may run before it. Others run on the programs of `SPECIAL`, or after
the first of `DEFAULTS` that they accept."""
DEFAULTS = ("", "analyze-modality", PLAN, FAKE, FROZEN)


def net() -> Program:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return capture_module(conv_net(), {"x": images})


def flat_net() -> Program:
    return run_passes(net(), parse_pipeline("flatten-convolutions")).program


def decoder(serving: dict[str, ServingProgram]) -> Program:
    program = serving["decoder"].program.copy()
    drop_dead(program)
    return program


SPECIAL: dict[str, Callable[[pytest.FixtureRequest], Program]] = {
    "analyze-module": lambda request: flat_net(),
    "apply-codes": lambda request: request.getfixturevalue("captured"),
    "flatten-convolutions": lambda request: net(),
    "fuse-decoder": lambda request: decoder(request.getfixturevalue("serving")),
}


@pytest.fixture
def programs(request: pytest.FixtureRequest, after: After, captured: Program) -> Any:
    """programs(item): those that the pass is checked on."""

    def run(pipeline: str) -> Program:
        return after(pipeline) if pipeline else captured

    def made(item: Pass) -> list[Program]:
        if item.name in SPECIAL:
            return [SPECIAL[item.name](request)]
        if item.name in PREPARED:
            return [run(pipeline) for pipeline in PREPARED[item.name]]
        refusals = []
        for program in map(run, DEFAULTS):
            try:
                item.run(program)
            except PassError as error:
                refusals.append(str(error))
            else:
                return [program]
        pytest.fail(f"{item.name} runs after none of {DEFAULTS}: {refusals}; see PREPARED")

    return made


def made_with_defaults(cls: type[Pass]) -> Pass:
    missing = [o.name for o in options_of(cls).values() if o.is_required]
    if missing:
        pytest.skip(f"{cls.name} has options without a default: {missing}")
    return cls()


@pytest.mark.parametrize("name", sorted(all_passes()))
def test_every_pass_keeps_the_contract(
    name: str, programs: Callable[[Pass], list[Program]], after: After
) -> None:
    if name == "apply-codes":
        item: Pass = ApplyCodes(frozen_weights(after(f"{OBSERVED},insert-fake-quant,freeze")))
    else:
        item = made_with_defaults(all_passes()[name])
    for program in programs(item):
        result = check_contract(item, program)
        if type(item).__module__.startswith("gracec."):
            assert result.modified  # on a program that it leaves alone, nothing would be checked


@pytest.mark.parametrize(
    ("before", "text"),
    [
        ("analyze-modality", "insert-taps{block=-1}"),
        (FROZEN, "lower-qdq{ops=matmulnbits mode=fast}"),
        (PLAN, "insert-fake-quant{candidates=2}"),
        (PLAN, "plan-quantization{recipe=w8a8}"),
        (FAKE, "correct-codes{order=natural asymmetric=0.5 candidates=2}"),
    ],
)
def test_and_with_other_options(after: After, batch: Any, before: str, text: str) -> None:
    check_contract(parse_pipeline(text)[0], after(before), batch)


def first_input(program: Program) -> fx.Node:
    return program.graph.find_nodes(op="placeholder")[0]


class Liar(Pass):
    """Its subclasses have no name of their own, so that no registry finds them."""

    name: ClassVar[str] = "liar"
    keeps_numerics: ClassVar[bool] = True


class WritesIntoATensor(Liar):
    def apply(self, program: Program) -> PassResult:
        with torch.no_grad():
            program.tensor(next(iter(program.fqns))).mul_(2)
        return PassResult(program, True)


class WritesIntoAnExample(Liar):
    def apply(self, program: Program) -> PassResult:
        program.example_inputs["x"].mul_(2)
        return PassResult(program, True)


class WritesIntoAnAnnotation(Liar):
    def apply(self, program: Program) -> PassResult:
        node = next(iter(program.nodes(part="module")))
        node.meta["custom"]["gracec"]["part"] = "other"
        return PassResult(program, True)


class ChangesTheTextInSilence(Liar):
    def apply(self, program: Program) -> PassResult:
        annotate(first_input(program), mark=1)
        return PassResult(program, False)


class AnnotatesAWeightInSilence(Liar):
    def apply(self, program: Program) -> PassResult:
        annotate(program.graph.find_nodes(op="get_attr")[0], mark=1)
        return PassResult(program, False)


class ChangesATensorInSilence(Liar):
    keeps_numerics = False

    def apply(self, program: Program) -> PassResult:
        for target in program.fqns:
            program.set_tensor(target, program.tensor(target).detach() * 2)
        return PassResult(program, False)


class RenamesInSilence(Liar):
    def apply(self, program: Program) -> PassResult:
        program.family = "another"
        program.dynamic_shapes["x"] = {0: 1}
        return PassResult(program, False)


class BoastsOfNothing(Liar):
    def apply(self, program: Program) -> PassResult:
        return PassResult(program, True)


class ChangesTheNumerics(Liar):
    def apply(self, program: Program) -> PassResult:
        (name, output), *_ = program.outputs.items()
        with program.graph.inserting_after(output):
            twice = program.graph.call_function(torch.ops.aten.mul.Scalar, (output, 2.0))
        twice.meta = dict(output.meta)
        program.set_outputs({name: twice})
        return PassResult(program, True)


class DropsTheOutputs(Liar):
    def apply(self, program: Program) -> PassResult:
        program.set_outputs({"others": next(iter(program.outputs.values()))})
        return PassResult(program, True)


class CountsItsRuns(Liar):
    def apply(self, program: Program) -> PassResult:
        node = first_input(program)
        return PassResult(program, annotate(node, mark=annotation(node).get("mark", 0) + 1))


class BoastsTheSecondTime(Liar):
    def apply(self, program: Program) -> PassResult:
        annotate(first_input(program), mark=1)
        return PassResult(program, True)


class GoesOnObserving(Liar):
    def apply(self, program: Program) -> PassResult:
        for _, observer in moment_observers(program):
            observer.moments.add(0, torch.ones(1, observer.moments.sums.shape[1]))
        return PassResult(program, False)


class RefusesItself(Liar):
    def requires(self, program: Program) -> None:
        if any(program.nodes(mark=1)):
            raise self.refuse("marked already")

    def apply(self, program: Program) -> PassResult:
        return PassResult(program, annotate(first_input(program), mark=1))


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (WritesIntoATensor(), r"changes its input: tensor \S+ is another; tensors, .*replace"),
        (WritesIntoAnExample(), "changes its input: example input x is another"),
        (WritesIntoAnAnnotation(), "changes its input: '.*part=module}' became '.*part=other}'"),
        (ChangesTheTextInSilence(), "says that nothing is modified: '.*' became '.*mark=1}'"),
        (
            AnnotatesAWeightInSilence(),
            "says that nothing is modified: what is known of first.weight",
        ),
        (ChangesATensorInSilence(), "says that nothing is modified: tensor .* is another"),
        (RenamesInSilence(), "says that nothing is modified: 'program .*' became 'program another"),
        (BoastsOfNothing(), "says that something is modified, and nothing is"),
        (ChangesTheNumerics(), r"output \w+: liar: says that it keeps the numerics: other bits"),
        (DropsTheOutputs(), "keeps no output, so it cannot keep the numerics"),
        (CountsItsRuns(), "a second run is not without effect: .*mark=1.* became .*mark=2"),
        (BoastsTheSecondTime(), "a second run is not without effect: it says that it modified"),
        (RefusesItself(), r"does not run on its own result \(liar: marked already\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Pass) else "",
)
def test_a_pass_that_lies_is_caught(item: Pass, reason: str) -> None:
    program = run_passes(flat_net(), parse_pipeline("analyze-module")).program
    with pytest.raises(PassError, match=reason):
        check_contract(item, program)


def test_what_observers_have_seen_is_looked_at(after: After) -> None:
    program = run_passes(after(PLAN), parse_pipeline("observe-second-moments")).program
    with pytest.raises(PassError, match=r"changes its input: tensor second_moments.* is another"):
        check_contract(GoesOnObserving(), program)


def test_a_digest_tells_bits_dtypes_and_shapes() -> None:
    tensors = [
        torch.zeros(4),
        -torch.zeros(4),
        torch.zeros(4, dtype=torch.bfloat16),
        torch.zeros(2, 2),
        torch.zeros(()),
        torch.zeros(4, device="meta"),
        torch.nn.Parameter(torch.zeros(4)),
    ]
    assert len({digest(tensor) for tensor in tensors}) == len(tensors)
    nan: Tensor = torch.tensor([float("nan")])
    assert digest(nan) == digest(nan.clone())
