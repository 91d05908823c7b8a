"""Image tokens against images: the traced graph no longer compares them, so every batch is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gracec.errors import GracecError


def check_image_tokens(visual: Tensor, sizes: Sequence[int]) -> None:
    """Refuse prompts that do not have room for just their images.

    Args:
        visual: bool [B, T], which tokens are placeholders of images.
        sizes: tokens of each image, in order.

    Raises:
        GracecError: if a prompt ends inside an image, or there are more or fewer placeholders than
            all images take.
    """
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    found = 0
    for row, count in enumerate(visual.sum(1).tolist()):
        found += count
        if found > ends[-1]:
            break  # more places than there are images
        if found not in ends:
            raise GracecError(
                f"the prompt holds {count} image tokens, which is no whole number of its images: "
                f"{_listed(sizes)} tokens each (was it truncated inside an image?)",
                where=f"sample {row} of the batch",
                fix="allow longer prompts or drop the sample",
            )
    total = int(visual.sum())
    if total != ends[-1]:
        raise GracecError(
            f"the prompts have places for {total} visual tokens, the {len(sizes)} images that were "
            f"given have {ends[-1]}",
            where="batch",
            fix="put one image placeholder into the prompt for each image",
        )


def _listed(sizes: Sequence[int]) -> str:
    distinct = list(dict.fromkeys(map(str, sizes)))
    return ", ".join(distinct[:3]) + (", ..." if len(distinct) > 3 else "")
