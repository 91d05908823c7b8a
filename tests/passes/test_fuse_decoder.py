from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers import LlavaForConditionalGeneration

from gracec import ir
from gracec.capture import capture_serving
from gracec.capture.serving import ServingProgram
from gracec.ir.program import Program
from gracec.passes.fuse_decoder import FuseDecoder
from gracec.passes.fusions.attention import ATTENTION, SDPA
from gracec.passes.fusions.norm import RMS_NORM
from gracec.passes.fusions.rotary import ROTARY_EMBEDDING
from gracec.passes.strip import drop_dead
from tests.goldens import ONE_BLOCK
from tests.tiny import tiny_llava
from tests.tiny_families import tiny_model

Golden = Callable[..., None]
Serving = dict[str, ServingProgram]


@pytest.fixture(scope="module")
def decoder(serving: Serving) -> Program:
    program = serving["decoder"].program.copy()
    drop_dead(program)
    return program


def inputs(program: Program, length: int, past: int, heads: int) -> dict[str, Tensor]:
    """Two prompts, the second padded on the left by a position that the cache holds, if any."""
    torch.manual_seed(0)
    mask = torch.ones(2, past + length, dtype=torch.int64)
    mask[1, : min(past, 1)] = 0
    given = {
        "inputs_embeds": torch.randn(2, length, 64),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, past:],
        "num_logits_to_keep": torch.tensor(0),
    }
    caches = [name for name in program.example_inputs if name.startswith("past_key_values")]
    return given | {name: torch.randn(2, heads, past, 16) for name in caches}


def test_golden(block: LlavaForConditionalGeneration, golden: Golden) -> None:
    decoder = capture_serving(block)["decoder"].program
    drop_dead(decoder)
    text = ir.diff(decoder, FuseDecoder().run(decoder).program) + "\n"
    before = "capture_serving: decoder, drop_dead"
    golden("fuse-decoder/llava.txt", text, made_by=FuseDecoder(), after=before, model=ONE_BLOCK)


@pytest.mark.parametrize(("length", "past"), [(5, 0), (1, 7), (4, 3)])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_it_computes_the_same(kv_heads: int, length: int, past: int, decoder: Program) -> None:
    program = decoder
    if kv_heads == 4:  # nothing is repeated then
        model = tiny_llava(num_key_value_heads=4)
        program = capture_serving(model)["decoder"].program
    result = FuseDecoder().run(program)
    assert result.notes == ("5 norms, 4 rotary embeddings, 2 attentions",)
    given = inputs(program, length, past, kv_heads)
    for expected, found in zip(program(**given), result.program(**given), strict=True):
        torch.testing.assert_close(found, expected)


def test_idempotent(decoder: Program) -> None:
    once = FuseDecoder().run(decoder).program
    twice = FuseDecoder().run(once)
    assert not twice.modified
    assert ir.format(twice.program) == ir.format(once)


def edited(program: Program, target: Any, change: Callable[[fx.Node], None]) -> Program:
    """A copy whose first node of an operator is changed."""
    copied = program.copy()
    change(next(node for node in copied.graph.nodes if node.target == target))
    copied.recompile()
    return copied


def test_what_has_another_form_stays(decoder: Program) -> None:
    aten = torch.ops.aten

    def counts(program: Program) -> list[int]:
        fused = FuseDecoder().run(program).program
        return [len(list(fused.nodes(op))) for op in (RMS_NORM, ROTARY_EMBEDDING, ATTENTION, SDPA)]

    assert counts(decoder) == [5, 4, 2, 0]

    def over_another_axis(mean: fx.Node) -> None:
        mean.update_arg(1, [-2])

    assert counts(edited(decoder, aten.mean.dim, over_another_axis)) == [4, 4, 2, 0]

    def swap_halves(cat: fx.Node) -> None:
        if isinstance(cat.args[0], list) and len(cat.args[0]) == 2:
            cat.update_arg(0, list(reversed(cat.args[0])))

    copied = decoder.copy()
    rotated = [
        node
        for node in copied.graph.nodes
        if node.target == aten.cat.default and "neg" in str(node.args[0])
    ]
    swap_halves(rotated[0])
    copied.recompile()
    # A query whose embedding is not known is still a projection turned by something.
    assert counts(copied) == [5, 3, 1, 1]

    def dropping(attention: fx.Node) -> None:
        attention.kwargs = {**attention.kwargs, "dropout_p": 0.5}

    result = FuseDecoder().run(edited(decoder, SDPA, dropping))
    assert result.notes == (
        "1 attention stays as it is: a share of 0.5 is dropped (scaled_dot_product_attention)",
        "5 norms, 4 rotary embeddings, 1 attentions",
    )


@pytest.mark.parametrize(
    ("family", "notes"),
    [
        (
            "qwen2_vl",
            (
                "4 rotary embeddings stay as they are: the cosine is changed after it is taken, by "
                "aten.cat (add_5)",
                "2 attentions stay as they are: the query is no projection seen as heads, but "
                "aten.add.Tensor (scaled_dot_product_attention)",
                "5 norms, 0 rotary embeddings, 0 attentions",
            ),
        ),
        ("idefics3", ("5 norms, 4 rotary embeddings, 2 attentions",)),
    ],
)
def test_decoders_of_families(family: str, notes: tuple[str, ...]) -> None:
    program = capture_serving(tiny_model(family))["decoder"].program
    before = ir.format(program)
    result = FuseDecoder().run(program)
    assert result.notes == notes
    assert ir.format(program) == before


def test_what_no_output_depends_on_is_not_counted(serving: Serving) -> None:
    # LLaVA takes its features before the last block of the tower.
    result = FuseDecoder().run(serving["vision_encoder"].program)
    assert result.notes[0].startswith("1 attention stays as it is: the mask is missing")
    again = FuseDecoder().run(result.program)
    assert result.modified and not again.modified and again.notes == result.notes
