"""Loading Hugging Face models and processors, with errors that say what to do."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import __version__ as transformers_version
from transformers.models.auto.auto_mappings import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.processing_auto import processor_class_from_name
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

from gracec.checkpoint import checkpoint_files, first_not_finite, stored_dtype
from gracec.errors import GracecError, GracecWarning, first_line


def load_config(path: str | Path) -> PreTrainedConfig:
    """The configuration of a vision-language model.

    Raises:
        GracecError: if the directory or the configuration is missing, unreadable, unknown to
            transformers, or not that of a vision-language model.
    """
    directory = _directory(path)
    file = directory / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        model_type = fields.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise GracecError(
            f"not readable as a JSON object: {first_line(error)}", where=str(file)
        ) from error
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=1)
        known_to = f"transformers {transformers_version}"
        own_code = " (it brings its own code, which is never run)" if "auto_map" in fields else ""
        raise GracecError(
            f"model type {model_type!r} is unknown to {known_to}{own_code}",
            where=str(file),
            fix=f"did you mean {near[0]!r}?" if near else "use a model that transformers knows",
        )
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise GracecError(
            f"transformers refuses this configuration: {first_line(error)}", where=str(file)
        ) from error
    assert isinstance(config, PreTrainedConfig)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise GracecError(
            f"model type {model_type!r} is not a vision-language model",
            where=str(directory),
            fix="give the directory of a Hugging Face ...ForConditionalGeneration checkpoint",
        )
    return config


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A vision-language model from a directory, in eval mode.

    Args:
        dtype: of the weights in memory; by default as stored, but float16 is widened to float32 on
            the CPU, which has no float16 kernels worth using.

    Raises:
        GracecError: if the directory holds no vision-language model, or a checkpoint that is not
            whole: files or tensors missing, cut short, of another shape, or not finite.
    """
    load_config(path)
    directory = Path(path)
    checkpoint_files(directory)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            directory,
            dtype=dtype or "auto",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    except Exception as error:
        raise GracecError(f"cannot be loaded: {first_line(error)}", where=str(directory)) from error
    model: PreTrainedModel = loaded[0]
    _check_keys(loaded[1], directory)
    check_finite(model, where=str(directory))
    if dtype is None and model.dtype == torch.float16 and model.device.type == "cpu":
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    model.eval()
    return model


def configured_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype that the configuration says the weights are stored in, if it says so."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else None


def model_without_weights(path: str | Path) -> PreTrainedModel:
    """The same model, but every parameter is a stand-in that occupies one number.

    Its shapes, dtypes and names are those of `load_model`, so it can be captured and planned before
    any weight is read, or where none are there.

    Raises:
        GracecError: if there is no usable configuration.
    """
    config = load_config(path)
    dtype = configured_dtype(config)
    if dtype is None:
        try:
            dtype = stored_dtype(checkpoint_files(Path(path)))
        except GracecError:  # a model without its checkpoint can still be looked at
            dtype = None
    if dtype is None or dtype == torch.float16:
        dtype = torch.float32
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    except Exception as error:
        raise GracecError(
            f"no model can be built from this configuration: {first_line(error)}",
            where=str(Path(path) / "config.json"),
        ) from error
    assert isinstance(model, PreTrainedModel)
    model.tie_weights()
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        one = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        stand_in = made.setdefault(id(parameter), nn.Parameter(one, requires_grad=False))
        setattr(model.get_submodule(owner), attribute, stand_in)
    model.eval()
    return model


def load_processor(path: str | Path) -> Any:
    """The processor (tokenizer and image processor) of a model directory.

    Raises:
        GracecError: if there is none.
    """
    directory = _directory(path)
    try:
        loader: Any = _without_videos(directory) or AutoProcessor
        return loader.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise GracecError(
            f"no processor can be loaded: {first_line(error)}",
            where=str(directory),
            fix="save the model's processor into this directory",
        ) from error


def _without_videos(directory: Path) -> type[ProcessorMixin] | None:
    """The processor class without its part for videos, which needs torchvision, if that is missing.

    Videos are not captured, and images need no torchvision.
    """
    if is_torchvision_available():
        return None
    model_type = json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"]
    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    for file in ("processor_config.json", "preprocessor_config.json"):
        if (directory / file).is_file():
            fields = json.loads((directory / file).read_text(encoding="utf-8"))
            name = fields.get("processor_class", name)
            break
    found = processor_class_from_name(name) if name else None
    return None if found is None else images_only(found)


def images_only(processor: type[ProcessorMixin]) -> type[ProcessorMixin] | None:
    """The same class without a video processor; None if it has none."""
    parts: list[str] = processor.get_attributes()
    *kept, last = parts
    if last != "video_processor":
        return None

    class ImagesOnly(processor):  # type: ignore[misc,valid-type]
        video_processor = SimpleNamespace(num_frames=None, fps=None)  # templates ask for these

        @classmethod
        def get_attributes(cls) -> list[str]:
            return kept

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **options: Any) -> list[Any]:
            return [*super()._get_arguments_from_pretrained(*args, **options), None]

    ImagesOnly.__name__ = processor.__name__  # it is saved under its name
    return ImagesOnly


def configurations(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A configuration and those of its parts."""
    return [config, *(getattr(config, name) for name in config.sub_configs)]


def untie_head(model: PreTrainedModel) -> bool:
    """Give a head that is the token embedding a parameter of its own; the configuration says so.

    The two share their memory until one of them is replaced. A quantized head needs it: a table of
    codes cannot be looked up, and the embedding keeps its precision.

    Returns:
        Whether the head was tied.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not table.weight:
        return False
    head.weight = nn.Parameter(table.weight.detach(), requires_grad=table.weight.requires_grad)
    for part in configurations(model.config):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return True


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer of this name."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if attribute in module._parameters and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(module, attribute, tensor)


def stand_in(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of this shape that occupies the memory of one number."""
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), requires_grad=False)


def fill_while_running(
    model: nn.Module,
    names: Iterable[str],
    filled: Callable[[str], Tensor],
    left: Callable[[str], Tensor],
) -> list[RemovableHandle]:
    """Let each of some parameters hold one tensor while its module runs, and another afterwards.

    Args:
        filled, left: FQN -> the tensor during a run, and after it.

    Returns:
        Handles that undo it.
    """
    handles = []
    for fqn in names:
        owner = model.get_submodule(fqn.rpartition(".")[0])
        for hook, made, options in (
            (owner.register_forward_pre_hook, filled, {}),
            (owner.register_forward_hook, left, {"always_call": True}),
        ):

            def put(*_: Any, fqn: str = fqn, made: Callable[[str], Tensor] = made) -> None:
                set_tensor(model, fqn, made(fqn))

            handles.append(hook(put, **options))
    return handles


def quantize_inputs(
    model: nn.Module, activations: Mapping[str, Callable[[Tensor], Tensor]]
) -> list[RemovableHandle]:
    """Let linears round their input first, as the graph does.

    Args:
        activations: FQN of a weight -> what puts the input of its linear on its grid.

    Returns:
        Handles that undo it.
    """

    def hook(rounded: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        return lambda module, args: (rounded(args[0]), *args[1:])

    owners = {fqn: model.get_submodule(fqn.rpartition(".")[0]) for fqn in activations}
    return [
        owner.register_forward_pre_hook(hook(activations[fqn])) for fqn, owner in owners.items()
    ]


def check_finite(model: PreTrainedModel, *, where: str = "") -> None:
    """Refuse a model with NaN or infinity in any weight, planned or not.

    Raises:
        GracecError: naming the first such weight.
    """
    name = first_not_finite(chain(model.named_parameters(), model.named_buffers()))
    if name:
        raise GracecError(
            f"{name} holds NaN or infinity",
            where=where or type(model).__name__,
            fix="check the checkpoint",
        )


def _check_keys(found: Any, directory: Path) -> None:
    """transformers draws missing weights at random and says so in a log line; that is no model."""
    wrong = sorted(found["mismatched_keys"])
    if wrong:
        name, stored, expected = wrong[0]
        raise GracecError(
            f"{name} is {tuple(stored)} in the checkpoint, {tuple(expected)} by the configuration",
            where=str(directory),
            fix="config.json and the weights belong to different models",
        )
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise GracecError(
            f"the checkpoint lacks {missing[0]}{more}",
            where=str(directory),
            fix="use a checkpoint of the whole model",
        )
    unexpected = sorted(found["unexpected_keys"])
    if unexpected:
        warnings.warn(
            f"{directory}: {len(unexpected)} tensors of the checkpoint are not in the model "
            f"and were ignored, the first is {unexpected[0]}",
            GracecWarning,
            stacklevel=3,
        )


def _directory(path: str | Path) -> Path:
    directory = Path(path)
    if not directory.is_dir():
        raise GracecError("no such model directory", where=str(directory))
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise GracecError(
                "holds an adapter of PEFT, not a model",
                where=str(directory),
                fix="load it with peft.PeftModel.from_pretrained and compile that model",
            )
        raise GracecError("no config.json, so this is no model", where=str(directory))
    return directory
