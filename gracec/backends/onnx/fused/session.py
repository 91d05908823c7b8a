"""Run the fused decoder on a cache that it writes into.

Everything that stays where it is from one token to the next is bound once: the buffers of the
cache, each as input and output, and the numbers that say how much is in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from gracec.backends.onnx.cache import RuntimeCache
from gracec.backends.onnx.fused import LENGTHS, POSITIONS, TOTAL_LENGTH
from gracec.capture.serving_graph import CACHE, GROWN_CACHE

EMBEDS, KEEP, LOGITS = "inputs_embeds", "num_logits_to_keep", "logits"


@dataclass(frozen=True)
class Bound:
    """Buffers and numbers of a cache, bound to a session."""

    session: ort.InferenceSession
    binding: ort.IOBinding
    lengths: np.ndarray
    total: np.ndarray
    keep: np.ndarray


class FusedSession:
    """The decoder whose cache is written in place."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.positions = int(session.get_modelmeta().custom_metadata_map[POSITIONS])
        inputs = {value.name: value.shape for value in session.get_inputs()}
        self.cache = {name: shape for name, shape in inputs.items() if name.startswith(f"{CACHE}.")}
        self.vocabulary = next(v.shape[2] for v in session.get_outputs() if v.name == LOGITS)

    def takes(self, mask: Tensor, length: int) -> bool:
        """Whether it can run this step; GroupQueryAttention has no mask, and reads the further
        parts of a prompt for one row only.

        Args:
            mask: int64 [B, P + S].
            length: S.
        """
        rows, total = mask.shape
        in_part = 1 < length < total
        return total <= self.positions and not (in_part and rows > 1) and bool(mask.all())

    def run(self, embeds: Tensor, keep: int, past: RuntimeCache) -> Tensor:
        """Logits [B, keep, V], all S for 0; the cache has S positions more then.

        Args:
            embeds: float32 [B, S, H], the tokens after the cache.
        """
        batch, length, _ = embeds.shape
        total = past.get_seq_length() + length
        if total > past.capacity:
            sizes = {name: (batch, shape[1], shape[3]) for name, shape in self.cache.items()}
            past.reserve(total, sizes)
        bound = past.bound
        if bound is None or bound.session is not self.session:
            bound = past.bound = self._bind(batch, past)
        bound.lengths[:], bound.total[()], bound.keep[()] = total - 1, total, keep
        given = embeds.contiguous().numpy()
        _bind(bound.binding.bind_input, EMBEDS, given)
        logits = np.empty((batch, min(keep or length, length), self.vocabulary), np.float32)
        _bind(bound.binding.bind_output, LOGITS, logits)
        self.session.run_with_iobinding(bound.binding)
        past.length = total
        return torch.from_numpy(logits)

    def _bind(self, batch: int, past: RuntimeCache) -> Bound:
        binding = self.session.io_binding()
        lengths, total = np.zeros(batch, np.int32), np.zeros((), np.int32)
        keep = np.zeros((), np.int64)
        for name, array in ((LENGTHS, lengths), (TOTAL_LENGTH, total), (KEEP, keep)):
            _bind(binding.bind_input, name, array)
        for name, buffer in past.buffers.items():
            _bind(binding.bind_input, name, buffer)
            _bind(binding.bind_output, name.replace(CACHE, GROWN_CACHE), buffer)
        return Bound(self.session, binding, lengths, total, keep)


def _bind(bind: Callable[..., None], name: str, array: np.ndarray) -> None:
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
