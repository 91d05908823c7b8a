"""Loading Hugging Face models and processors, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from gracec.errors import GracecError


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A vision-language model from a directory, in eval mode.

    Args:
        dtype: of the weights in memory; by default as stored, but float16 is widened to float32 on
            the CPU, which has no float16 kernels worth using.

    Raises:
        GracecError: if the directory is missing or holds no loadable vision-language model.
    """
    directory = _directory(path)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=dtype or "auto", local_files_only=True
        )
    except Exception as error:
        raise GracecError(
            f"cannot be loaded as a vision-language model: {_first_line(error)}",
            where=str(directory),
            fix="give the directory of a Hugging Face ...ForConditionalGeneration checkpoint",
        ) from error
    assert isinstance(model, PreTrainedModel)
    if dtype is None and model.dtype == torch.float16 and model.device.type == "cpu":
        model = model.float()
    model.eval()
    return model


def load_processor(path: str | Path) -> Any:
    """The processor (tokenizer and image processor) of a model directory.

    Raises:
        GracecError: if there is none.
    """
    directory = _directory(path)
    try:
        return AutoProcessor.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise GracecError(
            f"no processor can be loaded: {_first_line(error)}",
            where=str(directory),
            fix="save the model's processor into this directory",
        ) from error


def _directory(path: str | Path) -> Path:
    directory = Path(path)
    if not directory.is_dir():
        raise GracecError("no such model directory", where=str(directory))
    if not (directory / "config.json").is_file():
        raise GracecError("no config.json, so this is no model", where=str(directory))
    return directory


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
