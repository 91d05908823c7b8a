"""The cache of a decoder, which stays in ONNX Runtime: what it returns is its next input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from torch import Tensor
from transformers.cache_utils import Cache

BATCH_AXIS, LENGTH_AXIS = 0, 2
"""Of keys and values [B, KV, P, HD]."""
SMALLEST_BUFFER = 64
"""Positions; a longer buffer has twice as many, as often as it takes."""


class RuntimeCache(Cache):
    """Keys and values of all layers, for `generate` of transformers.

    It has the form that the decoder takes which it was given to last: values of the runtime, which
    a longer one takes the place of, or buffers that are written into. They are copied only when
    beams change places, a batch is widened, a buffer is full or the form changes; a buffer of which
    tokens are taken back is not.

    Attributes:
        values: name of an input of the decoder -> [B, KV, P, HD]; empty before the first token.
        buffers: the same with room for more, float32 [B, KV, C, HD], of which `length` are filled.
        bound: what a decoder keeps of the buffers; None when they are other ones.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def __len__(self) -> int:
        return (len(self.values) or len(self.buffers)) // 2

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} layers, {self.get_seq_length()} positions)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length if self.buffers else self._size(LENGTH_AXIS)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # there is none

    @property
    def batch_size(self) -> int:
        return self._size(BATCH_AXIS) if self.is_initialized else -1

    @property
    def is_initialized(self) -> bool:
        return bool(self.values or self.buffers)

    @property
    def is_linear(self) -> list[bool]:
        """Whether each layer keeps a state instead of positions, as transformers asks: none does.

        Of a cache without layers it would be true of all, and prompts would be read again."""
        return [False]

    def reset(self) -> None:
        self.values: dict[str, ort.OrtValue] = {}
        self.buffers: dict[str, np.ndarray] = {}
        self.length = 0
        self.bound: Any = None

    @property
    def capacity(self) -> int:
        """Positions that there are buffers for."""
        return self._size(LENGTH_AXIS) if self.buffers else 0

    def as_values(self) -> dict[str, ort.OrtValue]:
        """Values of the runtime, from now on; empty before the first token."""
        if self.buffers:
            filled = {name: buffer[:, :, : self.length] for name, buffer in self.buffers.items()}
            self.reset()
            self.values = _values(filled)
        return self.values

    def reserve(self, length: int, shapes: Mapping[str, tuple[int, int, int]]) -> None:
        """Buffers with room for this many positions, from now on; a full one becomes twice as long.

        Args:
            shapes: name of an input of the decoder -> B, KV and HD.
        """
        if length <= self.capacity:
            return
        capacity = max(SMALLEST_BUFFER, 1 << (length - 1).bit_length())
        filled, values = self.get_seq_length(), self.values  # whose memory their arrays share
        before = self.buffers or {name: value.numpy() for name, value in values.items()}
        self.reset()
        self.length = filled
        for name, (batch, heads, size) in shapes.items():
            self.buffers[name] = np.zeros((batch, heads, capacity, size), np.float32)
            if before:
                self.buffers[name][:, :, :filled] = before[name][:, :, :filled]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices.cpu().numpy()
        self._change(lambda array: array[rows])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda array: array.repeat(repeats, BATCH_AXIS))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, whose number is given as a negative one."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove as a negative number")
        if tokens_to_remove and self.buffers:
            self.length += tokens_to_remove
        elif tokens_to_remove:
            self._change(lambda array: array[:, :, :tokens_to_remove])

    def _size(self, axis: int) -> int:
        for value in self.values.values():
            return int(value.shape()[axis])
        for buffer in self.buffers.values():
            return int(buffer.shape[axis])
        return 0

    def _change(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
        self.values = _values({n: change(value.numpy()) for n, value in self.values.items()})
        self.buffers = {
            name: np.ascontiguousarray(change(buffer)) for name, buffer in self.buffers.items()
        }
        self.bound = None


def _values(arrays: Mapping[str, np.ndarray]) -> dict[str, ort.OrtValue]:
    """Values of their own: an array of a value shares its memory, which may end before."""
    return {
        name: ort.OrtValue.ortvalue_from_numpy(
            np.array(array, order="C", copy=None if array.flags.owndata else True)
        )
        for name, array in arrays.items()
    }
