"""One evaluator for every tool: the loss, KL and top-1 of quantized weights in float32.

The decoder is loaded in float32 and given the weights that a tool handed over. The original's last
hidden states are kept in a file beside them; its head, which no tool touches, makes logits of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import LINEARS, fitting
from safetensors.torch import load_file
from texts import fingerprint
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

CHUNK = 128
"""Positions whose logits are in memory at once: Gemma has 262,144 words."""
Logits = Callable[[Tensor], Callable[[slice], Tensor]]
"""Token ids [1, T] -> positions -> logits [n, V]."""


def load(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def of_decoder(decoder: Any) -> Logits:
    """Logits from the last hidden states."""

    def logits(ids: Tensor) -> Callable[[slice], Tensor]:
        hidden = decoder.model(ids).last_hidden_state[0]
        return lambda positions: decoder.lm_head(hidden[positions])

    return logits


def of_original(decoder: Any, ids: Tensor, cache: Path) -> list[Callable[[slice], Tensor]]:
    """Logits of the original for each window; hidden states are read from `cache` if they are of
    these tokens."""
    mark = fingerprint(ids)
    found = torch.load(cache) if cache.is_file() else {}
    if found.get("tokens") != mark:
        with torch.no_grad():
            hidden = torch.stack([decoder.model(row[None]).last_hidden_state[0] for row in ids])
        found = {"tokens": mark, "hidden": hidden}
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, cache)
    head = decoder.lm_head

    def window(hidden: Tensor) -> Callable[[slice], Tensor]:
        return lambda positions: head(hidden[positions])

    return [window(hidden) for hidden in found["hidden"]]


def put(decoder: Any, handed: Path, bits: int, group_size: int) -> None:
    """Give a decoder the tensors of a tool.

    Raises:
        SystemExit: a linear is missing, or has more levels in a group than its bits allow.
    """
    tensors = load_file(handed / "weights.safetensors")
    state = decoder.state_dict()
    missing = sorted(name for name in state if LINEARS.fullmatch(name) and name not in tensors)
    if missing:
        raise SystemExit(f"{handed} has no {missing}")
    for name, tensor in tensors.items():
        if LINEARS.fullmatch(name):
            grouped = tensor.view(-1, fitting(group_size, tensor.shape[1])).sort(dim=1).values
            if int((grouped[:, 1:] != grouped[:, :-1]).sum(dim=1).max()) + 1 > 2**bits:
                raise SystemExit(f"{handed}: {name} is not on a grid of {bits} bits")
        state[name].copy_(tensor)


@torch.no_grad()
def measure(
    quantized: Logits, original: list[Callable[[slice], Tensor]], ids: Tensor
) -> dict[str, Any]:
    """Loss, its paired change, KL(original, quantized) and top-1 over windows [n, T]."""
    losses, changes, divergences, same = [], [], [], []
    for row, before in zip(ids, original, strict=True):
        after = quantized(row[None])
        parts = []
        for start in range(0, len(row) - 1, CHUNK):
            positions = slice(start, min(start + CHUNK, len(row) - 1))
            target = row[start + 1 : positions.stop + 1]
            old, new = (functional.log_softmax(f(positions), dim=-1) for f in (before, after))
            nll = [-t.gather(1, target[:, None])[:, 0].double() for t in (old, new)]
            kl = (old.exp() * (old - new)).sum(dim=-1).double()
            top = (old.argmax(dim=-1) == new.argmax(dim=-1)).double()
            parts.append(torch.stack([nll[1], nll[1] - nll[0], kl, top]))
        mean = torch.cat(parts, dim=1).mean(dim=1)
        for found, value in zip((losses, changes, divergences, same), mean.tolist(), strict=True):
            found.append(value)
    change, kl = torch.tensor(changes).double(), torch.tensor(divergences).double()
    return {
        "perplexity": round(float(torch.tensor(losses).double().mean().exp()), 3),
        "loss_change_nats": round(float(change.mean()), 4),
        "standard_error": round(float(change.std()) / len(change) ** 0.5, 4),
        "kl_nats": round(float(kl.mean()), 4),
        "kl_standard_error": round(float(kl.std()) / len(kl) ** 0.5, 4),
        "top1": round(sum(same) / len(same), 4),
        "loss_changes": [round(value, 5) for value in changes],
    }
