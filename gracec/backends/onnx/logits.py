"""Settings of a generation config that change even a greedy answer, done by transformers' own code.

What a model ships with belongs to it: an answer of the graphs is that of `generate` in
transformers, penalties included. What is not done here is refused when an answer is asked for, and
told when the graphs are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

HARMLESS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "sequence_bias": (None,),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
}
"""Setting -> the values with which it does nothing; in the order in which transformers applies
them."""

DONE: dict[str, Callable[[Any, int, list[int]], Any]] = {
    "repetition_penalty": lambda value, length, end: RepetitionPenaltyLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, length, end: NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": lambda value, length, end: NoBadWordsLogitsProcessor(value, end or None),
    "min_length": lambda value, length, end: MinLengthLogitsProcessor(value, end),
    "min_new_tokens": lambda value, length, end: MinNewTokensLengthLogitsProcessor(
        length, value, end
    ),
    "suppress_tokens": lambda value, length, end: SuppressTokensLogitsProcessor(value),
    "begin_suppress_tokens": lambda value, length, end: SuppressTokensAtBeginLogitsProcessor(
        value, length
    ),
}
"""Setting -> what does it, from its value, the length of the prompt and the tokens that end."""

NEED_AN_END = ("min_length", "min_new_tokens")


def settings_in_use(config: GenerationConfig) -> list[str]:
    """Names of the settings that change a greedy answer."""
    return [n for n, harmless in HARMLESS.items() if getattr(config, n, None) not in harmless]


def settings_not_done(config: GenerationConfig) -> list[str]:
    """Those of them that are refused."""
    return [name for name in settings_in_use(config) if name not in DONE]


def logits_processors(
    config: GenerationConfig, length: int, end: Sequence[int]
) -> LogitsProcessorList:
    """What `generate` of transformers does to logits [B, V] before it takes the largest.

    Args:
        length: tokens of the prompt, padding included.
        end: tokens that end an answer.
    """
    names = [name for name in settings_in_use(config) if end or name not in NEED_AN_END]
    made = [DONE[name](getattr(config, name), length, list(end)) for name in names]
    return LogitsProcessorList(made)
