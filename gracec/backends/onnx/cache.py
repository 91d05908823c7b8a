"""The cache of a decoder, which stays in ONNX Runtime: what it returns is its next input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
from torch import Tensor
from transformers.cache_utils import Cache

BATCH_AXIS, LENGTH_AXIS = 0, 2
"""Of keys and values [B, KV, P, HD]."""


class RuntimeCache(Cache):
    """Keys and values of all layers as the runtime's own, for `generate` of transformers.

    They are copied only when beams change places, a batch is widened, or tokens are taken back.

    Attributes:
        values: name of an input of the decoder -> [B, KV, P, HD]; empty before the first token.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.values: dict[str, ort.OrtValue] = {}

    def __len__(self) -> int:
        return len(self.values) // 2

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} layers, {self.get_seq_length()} positions)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._size(LENGTH_AXIS)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # there is none

    @property
    def batch_size(self) -> int:
        return self._size(BATCH_AXIS) if self.values else -1

    @property
    def is_initialized(self) -> bool:
        return bool(self.values)

    @property
    def is_linear(self) -> list[bool]:
        """Whether each layer keeps a state instead of positions, as transformers asks: none does.

        Of a cache without layers it would be true of all, and prompts would be read again."""
        return [False]

    def reset(self) -> None:
        self.values = {}

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
        if tokens_to_remove:
            self._change(lambda array: array[:, :, :tokens_to_remove])

    def _size(self, axis: int) -> int:
        for value in self.values.values():
            return int(value.shape()[axis])
        return 0

    def _change(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
        self.values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(change(value.numpy())))
            for name, value in self.values.items()
        }
