"""What the models are trained on: answers, and visual tokens that resemble words."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from .concepts import CATEGORIES, CONCEPTS
from .packing import IGNORED, Layout, prefix_ids
from .scenes import CELLS, SIZE
from .tokenizer import PATCH, vocabulary

SHARPNESS = 8.0


def visual_tokens(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Projected image features [B, V, D]."""
    features = model.model.get_image_features(pixel_values=pixel_values, return_dict=True)
    return torch.stack(list(features.pooler_output))


def token_cells() -> Tensor:
    """int64 [V], the grid cell in which each visual token lies."""
    side = torch.arange(SIZE // PATCH) * 2 // (SIZE // PATCH)
    return (side[:, None] * 2 + side[None, :]).flatten()


def alignment(visual: Tensor, words: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, share of emoji recognised) of visual tokens read as words of the model's vocabulary.

    Every token names the concept of its cell (or "nothing"), the cell's row and column, and,
    where there is an emoji, its category. visual [B, V, D]; words [vocabulary, D], the tied
    embedding; cells int64 [B, 4], concept number or -1.
    """
    ids = vocabulary()
    names = [concept.name for concept in CONCEPTS]
    kinds = torch.tensor([CATEGORIES.index(concept.category) for concept in CONCEPTS])
    where = token_cells().to(cells.device)
    concept = cells[:, where]
    empty = concept < 0
    name = concept.masked_fill(empty, len(names))
    kind = kinds.to(cells.device)[concept.clamp(min=0)].masked_fill(empty, IGNORED)
    row, column = (where // 2).expand_as(concept), (where % 2).expand_as(concept)

    def read(choices: list[str], target: Tensor) -> tuple[Tensor, Tensor]:
        table = words[torch.tensor([ids[word] for word in choices], device=words.device)]
        logits = SHARPNESS * visual @ table.T
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED), logits

    name_loss, logits = read([*names, "nothing"], name)
    kind_loss, _ = read(list(CATEGORIES), kind)
    row_loss, _ = read(["top", "bottom"], row)
    column_loss, _ = read(["left", "right"], column)
    with torch.no_grad():
        per_cell = torch.stack([logits[:, where == c].mean(1) for c in range(len(CELLS))], 1)
        hit = (per_cell[..., :-1].argmax(-1) == cells)[cells >= 0].float().mean()
    return name_loss + 0.5 * kind_loss + 0.25 * (row_loss + column_loss), hit


def answer_logits(
    model: LlavaForConditionalGeneration, visual: Tensor, tokens: Tensor, layout: Layout
) -> Tensor:
    """Logits [B, A, vocabulary] at the answer positions of packed sequences.

    visual [B, V, D]; tokens int64 [B, L - prefix].
    """
    prefix = torch.tensor(prefix_ids(), device=tokens.device)
    embed = model.get_input_embeddings()
    start = embed(prefix[:2]).expand(len(tokens), -1, -1)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([start, visual, embed(tokens)], 1),
        attention_mask=layout.mask[None, None].expand(len(tokens), 1, -1, -1),
        position_ids=layout.positions.expand(len(tokens), -1),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[:, layout.answers])


def answer_targets(expected: Tensor, layout: Layout) -> Tensor:
    """int64 [B, A] from `expected` int64 [B, L - prefix]."""
    return expected[:, layout.answers - (len(layout.positions) - expected.shape[1])]


def correct(logits: Tensor, targets: Tensor, layout: Layout) -> Tensor:
    """bool [B, questions]: is every token of the answer, and the end, the likeliest one?

    Then greedy generation gives exactly the expected answer, and otherwise it does not.
    """
    hits = logits.argmax(-1) == targets
    wrong = torch.zeros(len(hits), int(layout.owner.max()) + 1, device=hits.device)
    return wrong.index_add(1, layout.owner, (~hits).float()) == 0
