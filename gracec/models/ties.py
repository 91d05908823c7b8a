"""Which weights of a model are one: what the tensors say, and the configuration after them.

A configuration has one word for it, `tie_word_embeddings`. Whoever reads it ties the head to the
token embedding, whatever the tensors were; so it has to say what they are.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gracec.errors import GracecError
from gracec.models.skeleton import skeleton
from gracec.models.surgery import configurations, names_of_one


def untie_head(model: PreTrainedModel) -> bool:
    """Give a head that is the token embedding a parameter of its own; the configuration says so.

    The two share their memory until one of them is replaced. A quantized head needs it: a table of
    codes cannot be looked up, and the embedding keeps its precision.

    Returns:
        Whether the head was tied.
    """
    if not _head_is_table(model):
        return False
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach(), requires_grad=head.weight.requires_grad)
    _say_untied(model)
    return True


def say_what_is_tied(model: PreTrainedModel) -> tuple[str, ...]:
    """Let the configuration of one's own model say which of its weights are one.

    A checkpoint or an adapter may bring a head of its own to a model that is configured to have the
    token embedding as its head. In turn, weights that are one, and not configured to be, become
    two of equal values.

    Returns:
        Names of the weights that the configuration was wrong about.

    Raises:
        GracecError: if only some of the weights that the configuration ties are apart.
    """
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    apart = [n for n, o in tied.items() if model.get_parameter(n) is not model.get_parameter(o)]
    if apart and len(apart) < len(tied):
        kept = next(name for name in tied if name not in apart)
        raise GracecError(
            f"{apart[0]} is a weight of its own and {kept} is tied, which no configuration can say",
            where=type(model).__name__,
            fix="tie all of them, or none",
        )
    if apart or not _head_is_table(model):  # one part of a configuration may say otherwise
        _say_untied(model)
    return (*apart, *_part(model))


def _part(model: PreTrainedModel) -> list[str]:
    """Give weights that a model of this configuration would have apart a parameter each."""
    several = [names for names in names_of_one(model).values() if len(names) > 1]
    if not several:
        return []
    built = {
        name: first
        for first, names in names_of_one(skeleton(model.config)).items()
        for name in names
    }
    parted = []
    for names in several:
        seen = {built.get(names[0], names[0])}
        for name in names[1:]:
            if built.get(name, name) in seen:
                continue
            seen.add(built.get(name, name))
            weight = model.get_parameter(name)
            owner, _, attribute = name.rpartition(".")
            copied = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            model.get_submodule(owner).register_parameter(attribute, copied)
            parted.append(name)
    return parted


def _head_is_table(model: PreTrainedModel) -> bool:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is table.weight


def _say_untied(model: PreTrainedModel) -> None:
    for part in configurations(model.config):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
