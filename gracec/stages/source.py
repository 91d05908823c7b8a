"""source: a path or a model becomes a model that is the compiler's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gracec import gates
from gracec.capture import Family, family_of
from gracec.capture.eager import eager_logits
from gracec.directories import is_artifact
from gracec.errors import GracecError
from gracec.journal import Equal, Journal
from gracec.models.devices import same_device
from gracec.models.hub import Place, find_model
from gracec.models.loading import check_finite, load_config, load_model, load_processor
from gracec.models.lora import has_adapters
from gracec.models.quantized import check_full_precision
from gracec.models.skeleton import model_without_weights
from gracec.models.surgery import share_weights
from gracec.models.ties import say_what_is_tied, untie_head
from gracec.recipe import Recipe
from gracec.request import Request
from gracec.stages.peft import keep_adapters, merge_adapters
from gracec.training.ranks import take_device


@dataclass(frozen=True)
class Source:
    """What is compiled.

    Attributes:
        model: in eval mode; reads the memory of the caller's, which it leaves as it is.
        processor: of the model, or None.
        name: for the model card; may be empty.
        revision: its commit, if it is from the Hugging Face Hub.
        parameters: how many the original has; a head that is untied becomes one more weight.
    """

    model: PreTrainedModel
    processor: Any
    name: str
    parameters: int
    revision: str = ""

    @property
    def family(self) -> Family:
        return family_of(self.model)


def load_source(model: PreTrainedModel | str | Path, request: Request, journal: Journal) -> Source:
    """The model of a directory, or one that shares its memory with the caller's.

    Raises:
        GracecError: if it is no vision-language model, not whole, or not finite.
        GateError: if what is made of it computes something else.
    """
    processor = request.processor
    take_device()
    if isinstance(model, (str, Path)):
        place = find_model(model, request.revision)
        path = place.path
        stored = check_full_precision(load_config(path), str(place))
        shell = model_without_weights(path)
        family_of(shell).example_batch(shell)  # refused before gigabytes are read
        processor = processor or load_processor(path)
        given = own = load_model(path, request.dtype, request.device)
    else:
        _check_placed(model, request)
        base: Any = model
        base = base.get_base_model() if has_adapters(model) else base
        stored = check_full_precision(base.config, type(base).__name__)
        given = own = _without_peft(model, request, journal)
        name = str(getattr(own.config, "_name_or_path", ""))
        revision = str(getattr(own.config, "_commit_hash", None) or "")
        place = Place(Path(), Path(name).name if Path(name).exists() else name, revision)
        check_finite(own)
        own = own if request.inplace else share_weights(own)
    journal.note("", *place.note("the model is"), *([stored] if stored else []))
    own.eval()
    batch = family_of(given).example_batch(given)
    expected = eager_logits(given, batch)
    _say_what_is_tied(own, journal)
    parameters = sum(parameter.numel() for parameter in own.parameters())
    if untied(own, request.recipe):
        journal.note("", "the head was tied to the token embedding, which keeps its precision")
    found = eager_logits(own, batch)
    gates.logits_are_those_of("the model that was given", expected, found, 0.0, type(own).__name__)
    journal.figures["source_equals_original"] = Equal(1, "batches")
    return Source(own, processor, place.name, parameters, place.revision)


def _check_placed(model: Any, request: Request) -> None:
    """Refuse to move or cast a model that somebody else has."""
    device, dtype = request.device, request.dtype
    if device is not None and not same_device(device, model.device):
        raise GracecError(
            f"the model is in memory, on {model.device}",
            where=f"device {device}",
            fix=f"leave device out; model.to({str(device)!r}) moves it",
        )
    if dtype is not None and dtype != model.dtype:
        raise GracecError(
            f"the model is in memory, in {str(model.dtype).removeprefix('torch.')}",
            where=f"dtype {str(dtype).removeprefix('torch.')}",
            fix="leave dtype out, or cast the model",
        )


def stand_in_source(
    directory: Path,
    recipe: Recipe,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Source:
    """The model of a directory without its weights: for looking at what a recipe would do.

    Raises:
        GracecError: if there is no usable configuration.
    """
    _check_stored(directory)
    return _looked_at(model_without_weights(directory, dtype, device), directory, recipe)


def weights_source(
    directory: Path,
    recipe: Recipe | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Source:
    """The model of a directory without a processor: for running passes on it.

    Args:
        recipe: that quantizes the head, perhaps, which is untied then.

    Raises:
        GracecError: if it is no vision-language model, not whole, or not finite.
    """
    _check_stored(directory)
    return _looked_at(load_model(directory, dtype, device), directory, recipe)


def _check_stored(directory: Path) -> None:
    """Refuse codes as weights, but for those of an artifact, which says what it was made of."""
    if not is_artifact(directory):
        check_full_precision(load_config(directory), str(directory))


def _say_what_is_tied(model: PreTrainedModel, journal: Journal) -> None:
    names = say_what_is_tied(model)
    if names:
        which = f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
        journal.note("", f"{which}: the tensors and the configuration differ in whether it is tied")


def _looked_at(model: PreTrainedModel, directory: Path, recipe: Recipe | None) -> Source:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if recipe is not None:
        untied(model, recipe)
    return Source(model, None, directory.resolve().name, parameters)


def untied(model: PreTrainedModel, recipe: Recipe) -> bool:
    """Untie the head of one's own model, if a recipe quantizes it; whether it was tied."""
    return recipe.quantizes("head") and untie_head(model)


def _without_peft(model: Any, request: Request, journal: Journal) -> PreTrainedModel:
    """The model, with adapters of PEFT merged or kept in float."""
    found: PreTrainedModel = model
    if has_adapters(model):
        if request.adapters == "merge":
            found, note, error = merge_adapters(model, inplace=request.inplace)
            journal.figures["adapters_merged"] = error
        else:
            shared = model if request.inplace else share_weights(model)
            found, note = keep_adapters(shared.eval())
        journal.note("", note)
    return found
