"""Qwen2-VL: patches of images of any size, packed into one sequence; rotary positions in 3 axes.

The positions of patches, and which image each belongs to, are computed in the graph from
`image_grid_thw`: whole-number arithmetic on as many elements as there are patches, so that no size
depends on data.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from gracec.capture.families.base import Dims, Family, Inputs
from gracec.capture.serving_graph import BATCH, LENGTH, Shape
from gracec.errors import GracecError
from gracec.quant.ops import segment_attention, segment_lengths

GRID = "image_grid_thw"
SEGMENT_ATTENTION = "gracec_segments_as_flash_attention"
"""transformers hands over packed sequences whole where the name has "flash" in it."""

SEGMENTS = ("cu_seqlens", "cu_window_seqlens")
"""Arguments of a tower that say what attends to what: here how long each segment is."""

SERVED_PATCHES = 1 << 13
"""Patches that a serving graph takes at once. ONNX has no attention of segments: a mask of all
patches and, in 16 heads, 4 GiB of scores. The graphs that torch runs need no such mask."""


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
) -> tuple[Tensor, None]:
    found = segment_attention(query, key, value, options["cu_seq_lens_q"], options["scaling"])
    return found, None


AttentionInterface.register(SEGMENT_ATTENTION, _attend)


class Qwen2VL(Family):
    model_type: ClassVar[str] = "qwen2_vl"
    text: ClassVar[Dims] = {**Family.text, "position_ids": (1, 2)}
    vision: ClassVar[Dims] = {"pixel_values": (0,), GRID: (0,)}
    computed: ClassVar[tuple[str, ...]] = ("mm_token_type_ids",)
    serving: ClassVar[dict[str, dict[int, str]]] = {
        "pixel_values": {0: "num_patches"},
        GRID: {0: "num_images"},
    }
    serving_names: ClassVar[dict[str, str]] = {GRID: "grid_thw"}
    serving_positions: ClassVar[Shape] = (3, BATCH, LENGTH)
    serving_config: ClassVar[tuple[str, ...]] = ("num_hidden_layers",)

    def encode(self, model: PreTrainedModel, inputs: Inputs) -> Tensor:
        features: Tensor = self.tower(model, inputs).pooler_output
        return features

    def tower(self, model: PreTrainedModel, inputs: Inputs) -> Any:
        """What the vision tower returns."""
        parts: Any = model.model
        config = parts.visual.config
        usual = config._attn_implementation
        config._attn_implementation = SEGMENT_ATTENTION
        indices = self.patch_indices(config, inputs["pixel_values"].shape[0], inputs[GRID])
        try:
            return parts.visual(
                inputs["pixel_values"],
                grid_thw=inputs[GRID],
                max_seqlen=1,  # not looked at
                **{
                    name: segment_lengths(found) if name in SEGMENTS else found
                    for name, found in indices.items()
                },
            )
        finally:
            config._attn_implementation = usual

    def patch_indices(self, config: Any, patches: int, grid: Tensor) -> dict[str, Tensor]:
        """What the tower would compute from the grid with sizes that depend on it.

        Args:
            config: of the tower.
            grid: int64 [I, 3], frames (1), rows and columns of patches of each image.
        """
        image, row, column = patch_places(patches, grid, config.spatial_merge_size)
        return {"position_ids": torch.stack([row, column], dim=-1), "cu_seqlens": image}

    def image_tokens(self, model: PreTrainedModel, batch: Inputs) -> list[int]:
        merged = model.config.vision_config.spatial_merge_size**2
        counts: list[int] = (self.required(batch, GRID).prod(-1) // merged).tolist()
        return counts

    def check(self, model: PreTrainedModel, batch: Inputs) -> None:
        grid, patches = self.required(batch, GRID), len(batch["pixel_values"])
        if int(grid.prod(-1).sum()) != patches:
            raise GracecError(
                f"there are {patches} patches, the grids of the images have "
                f"{int(grid.prod(-1).sum())}",
                where=f"batch, {GRID}",
                fix="use the processor",
            )
        if (grid[:, 0] != 1).any():
            raise GracecError(
                "videos are not captured: an image has more than one frame", where=f"batch, {GRID}"
            )

    def text_inputs(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        found = super().text_inputs(model, batch)
        merge = model.config.vision_config.spatial_merge_size
        positions = rotary_positions(
            self.image_index(model, batch)[0], found["attention_mask"], batch[GRID], merge
        )
        return {**found, "position_ids": positions}

    def vision_feed(self, inputs: Inputs) -> dict[str, Tensor]:
        patches = len(inputs["pixel_values"])
        if patches > SERVED_PATCHES:
            raise GracecError(
                f"the images have {patches} patches, the vision encoder takes {SERVED_PATCHES} at "
                "once: its attention needs memory for the square of their number",
                where="pixel_values",
                fix="give fewer or smaller images at once, or use torch",
            )
        return super().vision_feed(inputs)

    def positions(self, attention_mask: Tensor) -> Tensor:
        return super().positions(attention_mask).expand(3, -1, -1)

    def example_images(
        self, model: PreTrainedModel, images: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        config = model.config.vision_config
        merge = config.spatial_merge_size
        shapes = [(2, 2), (2, 3), (4, 1)]
        grid = torch.tensor(
            [(1, merge * rows, merge * columns) for rows, columns in shapes * images][:images]
        )
        channels = getattr(config, "in_channels", None) or config.in_chans
        size = channels * config.temporal_patch_size * config.patch_size**2
        pixels = torch.randn((int(grid.prod(-1).sum()), size), generator=generator)
        return {"pixel_values": pixels, GRID: grid}

    def example_text(self, model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
        return {"mm_token_type_ids": self.image_mask(model, batch).int()}


def patch_places(patches: int, grid: Tensor, merge: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column int64 [P] of each patch of images packed one after the other.

    Patches that are merged into one token, `merge` x `merge` of them, are next to each other.
    """
    rows, columns = grid[:, 1], grid[:, 2]
    ends = (rows * columns).cumsum(0)
    number = torch.arange(patches, device=grid.device)
    image = (number.unsqueeze(1) >= ends.unsqueeze(0)).sum(1)
    within = number - (ends - rows * columns)[image]
    token, inner = within // merge**2, within % merge**2
    tokens_a_row = columns[image] // merge
    row = token // tokens_a_row * merge + inner // merge
    column = token % tokens_a_row * merge + inner % merge
    return image, row, column


def rotary_positions(
    image_index: Tensor, attention_mask: Tensor, grid: Tensor, merge: int
) -> Tensor:
    """Positions int64 [3, B, T] in time, height and width.

    Text counts up in all three. An image begins where the text before it ended; its tokens count
    rows and columns from there, and the text after it begins beyond the largest of them.

    Args:
        image_index: int64 [B, T], number of the image of each token, -1 for text.
        attention_mask: int64 [B, T]; padding has position 0.
        grid: int64 [I, 3].
    """
    positions = torch.zeros((3, *image_index.shape), dtype=torch.int64, device=image_index.device)
    sizes = (grid[:, 1:] // merge).tolist()
    for row, (index, mask) in enumerate(zip(image_index, attention_mask.bool(), strict=True)):
        found, start = [], 0
        numbers, counts = torch.unique_consecutive(index[mask], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number < 0:
                found.append((torch.arange(count) + start).expand(3, -1))
                start += count
                continue
            height, width = sizes[number]
            token = torch.arange(count)
            places = torch.stack([torch.zeros_like(token), token // width, token % width])
            found.append(places + start)
            start += max(height, width)
        positions[:, row, mask] = torch.cat(found, dim=1).to(positions.device)
    return positions
