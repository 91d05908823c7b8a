"""What the analysis takes for the output of a block is what the model calls a hidden state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture.capture import run_both
from gracec.capture.families import family_of
from gracec.errors import GateError
from gracec.ir.program import Program, annotation


def blocks_equal_hidden_states(program: Program, model: PreTrainedModel) -> int:
    """Gate: each block output of an analysed graph equals the model's hidden state, bit for bit.

    The last one is left out: transformers normalises it before it hands it out.

    Args:
        program: analysed, and neither quantized nor trained since it was captured.

    Returns:
        The number of blocks compared.

    Raises:
        GateError: naming the first block that differs.
    """
    family, blocks = family_of(model), list(program.nodes(role="block_output"))
    tapped = program.copy()
    copies = list(tapped.nodes(role="block_output"))
    logits = next(iter(tapped.outputs.values()))
    tapped.set_outputs({"logits": logits, **{f"block_{n}": b for n, b in enumerate(copies[:-1])}})
    tapped.recompile()
    batch = family.example_batch(model)
    inputs, own_inputs = family.prepare(model, batch), family.model_inputs(model, batch)
    call: Any = model
    where = type(model).__name__

    def run() -> list[tuple[Tensor, Tensor]]:
        found = call(**own_inputs, use_cache=False, output_hidden_states=True)
        states, outputs = found.hidden_states or (), tapped(**inputs)[1:]
        if len(states) != len(blocks) + 1:
            raise GateError(
                f"{len(blocks)} decoder blocks were found, the model has {len(states)} hidden "
                "states, not one more",
                where=where,
            )
        return list(zip(states[1:], outputs, strict=False))

    pairs = run_both(model, run)
    for node, (hidden, output) in zip(blocks, pairs, strict=False):
        if hidden.shape != output.shape or not torch.equal(hidden, output):
            raise GateError(
                f"what was taken for the output of decoder block {annotation(node)['block']} is "
                "not the hidden state that the model has there",
                where=where,
                fix="the graph of this decoder is not understood",
            )
    return len(pairs)
