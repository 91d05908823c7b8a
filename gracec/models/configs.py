"""Configurations of models, which are not trusted: no code of theirs runs, and no size is absurd.

transformers runs code of a model directory where `auto_map` names it, and code from the Hub where
an implementation of attention or experts is the name of a kernel there. Both are taken out, at any
depth, before a configuration is made. And a number in a configuration can ask for more memory or
time than there is, so that it is held to what the checkpoint holds before anything is built.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gracec.errors import GracecError, GracecWarning, first_line
from gracec.json_files import read_json_object
from gracec.models.weight_files import checkpoint_files

CODE = ("auto_map", "custom_pipelines")
"""Keys that name Python files."""
IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa"),
    "experts_implementation": ("eager", "grouped_mm", "batched_mm"),
}
"""Key -> what is in transformers itself; another value may be the name of a kernel on the Hub."""
CONFIG_BYTES = 1 << 24
MOST = (
    (re.compile(r"image_size|crop"), 1 << 13),
    (re.compile(r"layers?$|depths?$|blocks?$|stages?$"), 1 << 10),
    (re.compile(r"expert|heads?$"), 1 << 12),
    (
        re.compile(r"size|dim|num_|^n_|channels|length|position|window|width|height|rank|groups"),
        1 << 24,
    ),
)
"""What a key is like -> the largest number it may have: the first that fits."""
NOT_NEGATIVE = re.compile(r"^num_|size$|dim$")
PARAMETERS_A_BYTE, PARAMETERS_MORE = 8, 1 << 26
"""Parameters for each byte of the checkpoint, and beside these: codes have two a byte."""
MOST_IN_BUFFERS = 1 << 28


def read_config(directory: Path) -> PreTrainedConfig:
    """The configuration of a model directory, for code and sizes that transformers itself has.

    What names other code is left out, with a warning.

    Raises:
        GracecError: if it is missing, no JSON object, of a model type that transformers does not
            know, refused by transformers, or asks for a size beyond all reason.
    """
    file = directory / "config.json"
    fields = read_config_fields(directory)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise GracecError(f"model type {model_type!r} is unknown to transformers", where=str(file))
    _check_numbers(fields, file)
    named = sorted(set(code_keys(fields)))
    if named:
        warnings.warn(
            f"{file}: {', '.join(named)} would run code that is not of transformers, and is left "
            "out",
            GracecWarning,
            stacklevel=3,
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(_without_code(fields))
        config.name_or_path = str(directory)
    except Exception as error:
        raise GracecError(
            f"transformers refuses this configuration: {first_line(error)}", where=str(file)
        ) from error
    assert isinstance(config, PreTrainedConfig)
    return config


def read_config_fields(directory: Path) -> dict[str, Any]:
    """What `config.json` holds, as it is.

    Raises:
        GracecError: if it is missing or no JSON object.
    """
    file = directory / "config.json"
    fields = read_json_object(file)
    if file.stat().st_size > CONFIG_BYTES:
        raise GracecError(f"larger than {CONFIG_BYTES} bytes", where=str(file))
    return fields


def read_generation_config(directory: Path) -> GenerationConfig | None:
    """`generation_config.json`, if there is one.

    Raises:
        GracecError: if it is no JSON object, or transformers refuses it.
    """
    file = directory / "generation_config.json"
    if not file.is_file():
        return None
    fields = _without_code(read_json_object(file))
    try:
        found: GenerationConfig = GenerationConfig.from_dict(fields)
    except Exception as error:
        raise GracecError(
            f"transformers refuses it: {first_line(error)}", where=str(file)
        ) from error
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = fields.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(item) is int and -1 <= item < 1 << 31 for item in ids):
            raise GracecError(f"{name} is no token id: {value!r}", where=str(file))
    return found


def check_size(config: PreTrainedConfig, directory: Path) -> None:
    """Refuse a configuration whose model is far larger than its checkpoint, without building it.

    Raises:
        GracecError: if it is, or if no model can be built from it.
    """
    file = directory / "config.json"
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        buffers = sum(buffer.numel() for buffer in model.buffers())
    except Exception as error:
        raise GracecError(
            f"no model can be built from this configuration: {first_line(error)}", where=str(file)
        ) from error
    if buffers > MOST_IN_BUFFERS:
        raise GracecError(f"asks for tables of {buffers:,} numbers", where=str(file))
    try:
        stored = sum(path.stat().st_size for path in checkpoint_files(directory))
    except GracecError:  # a model without its checkpoint can still be looked at
        return
    if parameters > PARAMETERS_A_BYTE * stored + PARAMETERS_MORE:
        raise GracecError(
            f"asks for {parameters:,} parameters, and the checkpoint has {stored:,} bytes",
            where=str(file),
            fix="config.json and the weights belong to different models",
        )


def _check_numbers(fields: dict[str, Any], file: Path) -> None:
    for key, number in _numbers(fields, ""):
        last, said = key.rpartition(".")[2], str(number)[:20]
        most = next((most for pattern, most in MOST if pattern.search(last)), None)
        if number < 0 and NOT_NEGATIVE.search(last):
            raise GracecError(f"{key} is {said}, which is no size", where=str(file))
        if most is not None and abs(number) > most:
            raise GracecError(f"{key} is {said}, more than {most:,}", where=str(file))


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Each number and where it stands; an element of a list stands where the list does."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def _is_code(key: str, value: Any) -> bool:
    known = IMPLEMENTATIONS.get(key.removeprefix("_").removesuffix("_internal"))
    if known is not None:
        return value is not None and value not in known
    return key in CODE


def code_keys(value: Any) -> Iterator[str]:
    """The keys, at any depth, that name code from elsewhere."""
    if isinstance(value, dict):
        for key, item in value.items():
            if _is_code(key, item):
                yield key
            else:
                yield from code_keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from code_keys(item)


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_code(item) for k, item in value.items() if not _is_code(k, item)}
    if isinstance(value, list):
        return [_without_code(item) for item in value]
    return value
