"""A stream computes what the program does, sample by sample, and keeps no more than it has to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from gracec.capture import capture
from gracec.capture.module import capture_module
from gracec.ir.program import Program, annotation
from gracec.ir.queries import weight_of
from gracec.ir.stream import Stream
from gracec.passes.analyze_modality import AnalyzeModality
from tests.tiny_families import tiny_model


def text_sample(program: Program, seed: int, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 100, (1, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def through(stream: Stream, nodes: list[fx.Node]) -> list[list[Tensor]]:
    """The values of nodes for every sample, one node after the other."""
    found = []
    for node in nodes:
        stream.advance(node)
        found.append([stream.value(node, n).clone() for n in range(len(stream.samples))])
        stream.release(node)
    return found


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_it_computes_what_the_program_does(name: str) -> None:
    program = capture(tiny_model(name))
    logits = program.outputs["logits"]
    linears = [n for n in program.graph.nodes if weight_of(n) is not None][3::7]
    samples = [program.example_inputs, {"input_ids": program.example_inputs["input_ids"].clone()}]
    stream = Stream(program, samples, [*linears, logits])
    for sample, found in zip(samples, through(stream, [*linears, logits])[-1], strict=True):
        expected = program(**{**program.example_inputs, **sample})[0]
        assert torch.equal(found, expected)


def test_nothing_is_left_of_what_nobody_reads(captured: Program) -> None:
    logits = captured.outputs["logits"]
    stream = Stream(captured, [text_sample(captured, n) for n in range(3)], [logits])
    through(stream, [logits])
    assert not stream._values


def test_what_is_the_same_for_several_samples_is_computed_once(
    captured: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture that texts alone do not see, and every weight."""
    calls: Counter[fx.Node] = Counter()
    compute = Stream._compute

    def counted(stream: Stream, node: fx.Node, sample: int) -> Any:
        calls[node] += 1
        return compute(stream, node, sample)

    monkeypatch.setattr(Stream, "_compute", counted)
    logits = captured.outputs["logits"]
    stream = Stream(captured, [text_sample(captured, n) for n in range(3)], [logits])
    stream.advance(logits)
    by_modality: dict[str, set[int]] = {"weights": set(), "vision": set(), "text": set()}
    program = AnalyzeModality().run(captured).program
    names = {node.name: annotation(node).get("modality") for node in program.graph.nodes}
    for node, count in calls.items():
        if node.op == "get_attr":
            by_modality["weights"].add(count)
        elif weight_of(node) is not None:
            by_modality["vision" if names[node.name] == "vision" else "text"].add(count)
    assert by_modality == {"weights": {1}, "vision": {1}, "text": {3}}


class WritesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        nn.init.eye_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        room = torch.zeros(2, 4)
        room.copy_(x)
        return self.linear(room) - self.linear.bias + 1


def test_what_is_written_into_belongs_to_one_sample() -> None:
    program = capture_module(WritesInPlace(), {"x": torch.zeros(2, 4)})
    assert any("copy_" in str(node.target) for node in program.graph.nodes)
    out = next(iter(program.outputs.values()))
    samples = [{"x": torch.full((2, 4), float(n))} for n in range(3)]
    stream = Stream(program, samples, [out])
    stream.advance(out)
    assert [stream.value(out, n)[0, 0].item() for n in range(3)] == [1.0, 2.0, 3.0]
