"""Loading Hugging Face models and processors, with errors that say what to do."""

from __future__ import annotations

import difflib
import sys
import warnings
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
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

from gracec.errors import GracecError, GracecWarning, first_line
from gracec.json_files import read_json_object
from gracec.models.configs import (
    check_size,
    code_keys,
    read_config,
    read_config_fields,
    read_generation_config,
)
from gracec.models.quantized import dequantizing
from gracec.models.surgery import put_on
from gracec.models.weight_files import checkpoint_files, first_not_finite

EITHER = 'give a directory, or "org/name" of a repository of the Hugging Face Hub'


def load_config(path: str | Path) -> PreTrainedConfig:
    """The configuration of a vision-language model.

    Raises:
        GracecError: if the directory or the configuration is missing, unreadable, unknown to
            transformers, or not that of a vision-language model.
    """
    directory = _directory(path)
    fields = read_config_fields(directory)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=1)
        known_to = f"transformers {transformers_version}"
        own_code = " (it brings its own code, which is never run)" if "auto_map" in fields else ""
        raise GracecError(
            f"model type {model_type!r} is unknown to {known_to}{own_code}",
            where=str(directory / "config.json"),
            fix=f"did you mean {near[0]!r}?" if near else "use a model that transformers knows",
        )
    config = read_config(directory)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise GracecError(
            f"model type {model_type!r} is not a vision-language model",
            where=str(directory),
            fix="give the directory of a Hugging Face ...ForConditionalGeneration checkpoint",
        )
    return config


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """A vision-language model from a directory, in eval mode.

    Args:
        dtype: of the weights in memory; by default as stored, but float16 is widened to float32 on
            the CPU, which has no float16 kernels worth using.
        device: where to put it; by default the CPU.

    Raises:
        GracecError: if the directory holds no vision-language model, or a checkpoint that is not
            whole: files or tensors missing, cut short, of another shape, or not finite.
    """
    config = load_config(path)
    directory = Path(path)
    checkpoint_files(directory)
    if (directory / "adapter_config.json").is_file():  # transformers would put them into the model
        raise GracecError(
            "holds adapters of PEFT beside a model",
            where=str(directory),
            fix="move them away, or load them with peft.PeftModel.from_pretrained and compile that",
        )
    read_generation_config(directory)  # transformers reads it too, and its errors say less
    check_size(config, directory)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            directory,
            config=config,
            trust_remote_code=False,
            dtype=dtype or "auto",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **dequantizing(config),
        )
    except Exception as error:
        raise GracecError(f"cannot be loaded: {first_line(error)}", where=str(directory)) from error
    model: PreTrainedModel = loaded[0]
    _check_keys(loaded[1], directory)
    if device is not None:
        put_on(model, device)
    check_finite(model, where=str(directory))
    if dtype is None and model.dtype == torch.float16 and model.device.type == "cpu":
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    model.eval()
    return model


def configured_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype that the configuration says the weights are stored in, if it says so."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else None


def load_processor(path: str | Path) -> Any:
    """The processor (tokenizer and image processor) of a model directory.

    Raises:
        GracecError: if there is none.
    """
    directory = _directory(path)
    _check_processor_files(directory)
    # Chosen here, because AutoProcessor forgets about `trust_remote_code` where it chooses by the
    # model type.
    loader: Any = _processor_class(directory) or AutoProcessor
    try:
        return loader.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = first_line(error)
        if "custom code" in reason:
            reason = "it needs code of its own, which is never run"
        raise GracecError(
            f"no processor can be loaded: {reason}",
            where=str(directory),
            fix="save the model's processor into this directory",
        ) from error


PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)


def _check_processor_files(directory: Path) -> None:
    """Read what transformers will read, whose parsers recurse; say that no code of it runs.

    Raises:
        GracecError: if one is no JSON object.
    """
    for name in PROCESSOR_FILES:
        file = directory / name
        if not file.is_file():
            continue
        named = sorted(set(code_keys(read_json_object(file))))
        if named:
            warnings.warn(
                f"{file}: {', '.join(named)} names code of its own, which is never run",
                GracecWarning,
                stacklevel=4,
            )


def _processor_class(directory: Path) -> type[ProcessorMixin] | None:
    """The class of transformers that the files name, else that of the model type.

    Without its part for videos if torchvision is missing, which that needs: videos are not
    captured, and images need no torchvision.
    """
    names = [PROCESSOR_MAPPING_NAMES.get(str(read_config_fields(directory).get("model_type")))]
    for file in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (directory / file).is_file():
            names.append(read_json_object(directory / file).get("processor_class"))
    for name in reversed(names):
        found = processor_class_from_name(name) if isinstance(name, str) else None
        if name == "PixtralProcessor":
            found = pixtral_processor()
        if isinstance(found, type) and issubclass(found, ProcessorMixin):
            return found if is_torchvision_available() else images_only(found) or found
    return None


def pixtral_processor() -> type[ProcessorMixin]:
    """The class of Pixtral, with torchvision or without.

    Its module takes one function from that of the image processor for torchvision, and the one for
    PIL has the same.
    """
    name = "transformers.models.pixtral.image_processing_pixtral"
    missing = not is_torchvision_available()
    if missing:
        sys.modules[name] = import_module(
            "transformers.models.pixtral.image_processing_pil_pixtral"
        )
    try:
        module = import_module("transformers.models.pixtral.processing_pixtral")
    finally:
        if missing:
            del sys.modules[name]
    found: type[ProcessorMixin] = module.PixtralProcessor
    return found


class _WithoutVideos(ProcessorMixin):
    """After a processor in the order of classes: some hand on by name the part that is missing."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        if options.get("video_processor") is None:
            options.pop("video_processor", None)
        super().__init__(*parts, **options)  # type: ignore[no-untyped-call]


def images_only(processor: type[ProcessorMixin]) -> type[ProcessorMixin] | None:
    """The same class without a video processor; None if it has none."""
    parts: list[str] = processor.get_attributes()
    *kept, last = parts
    if last != "video_processor":
        return None

    class ImagesOnly(processor, _WithoutVideos):  # type: ignore[misc,valid-type]
        video_processor = SimpleNamespace(num_frames=None, fps=None)  # templates ask for these

        @classmethod
        def get_attributes(cls) -> list[str]:
            return kept

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **options: Any) -> list[Any]:
            found: Any = super()
            return [*found._get_arguments_from_pretrained(*args, **options), None]

    ImagesOnly.__name__ = processor.__name__  # it is saved under its name
    return ImagesOnly


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
        raise GracecError("no such model directory", where=str(directory), fix=EITHER)
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise GracecError(
                "holds an adapter of PEFT, not a model",
                where=str(directory),
                fix="load it with peft.PeftModel.from_pretrained and compile that model",
            )
        raise GracecError("no config.json, so this is no model", where=str(directory))
    return directory
