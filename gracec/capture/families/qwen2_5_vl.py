"""Qwen2.5-VL: Qwen2-VL whose tower looks at windows of an image in all but some blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from gracec.capture.families.qwen2_vl import Qwen2VL, patch_places


class Qwen25VL(Qwen2VL):
    model_type: ClassVar[str] = "qwen2_5_vl"
    serving_names: ClassVar[dict[str, str]] = {}
    serving_config: ClassVar[tuple[str, ...]] = ()

    def patch_indices(self, config: Any, patches: int, grid: Tensor) -> dict[str, Tensor]:
        """Patches are ordered by window, so that those of a window are next to each other."""
        merge = config.spatial_merge_size
        image, row, column = patch_places(patches, grid, merge)
        side = config.window_size // merge // config.patch_size  # tokens of a window
        corner = slice(None, None, merge**2)  # the first patch of each token
        window_row = torch.div(row[corner] // merge, side, rounding_mode="floor")
        window_column = torch.div(column[corner] // merge, side, rounding_mode="floor")
        windows_a_row = grid.max() // merge // side + 1
        window = (image[corner] * windows_a_row + window_row) * windows_a_row + window_column
        # All numbers differ, so that any sort keeps the order within a window.
        order = torch.argsort(window * patches + torch.arange(window.shape[0], device=grid.device))
        return {
            "position_ids": torch.stack([row, column], dim=-1),
            "cu_seqlens": image,  # images keep their places
            "window_index": order,
            "cu_window_seqlens": window[order].repeat_interleave(merge**2),
            "max_window_seqlen": 1,
        }
