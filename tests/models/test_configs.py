"""Configurations of any content end in one line, quickly, and without gigabytes."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from gracec.errors import GracecError
from gracec.models.configs import read_config, read_generation_config
from gracec.models.loading import load_model, load_processor
from gracec.models.skeleton import model_without_weights

DEEP = json.loads("[" * 99 + "]" * 99)


def change(model: Path, place: str, value: Any) -> None:
    file = model / "config.json"
    fields = inside = json.loads(file.read_text())
    *parts, last = place.split(".")
    for part in parts:
        inside = inside[part]
    inside[last] = value
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("model_type", []),
        ("model_type", {}),
        ("model_type", 1),
        ("text_config.model_type", []),
        ("vision_config.model_type", None),
        ("text_config", []),
        ("vision_config", "clip"),
        ("text_config.num_hidden_layers", 10**8),
        ("text_config.num_hidden_layers", 1e8),
        ("text_config.num_hidden_layers", 10**400),
        ("text_config.num_hidden_layers", -1),
        ("text_config.num_hidden_layers", "2"),
        ("text_config.hidden_size", 10**9),
        ("text_config.hidden_size", 2**23),
        ("text_config.vocab_size", 10**12),
        ("text_config.vocab_size", 2**23),
        ("text_config.num_labels", 10**9),
        ("text_config.num_attention_heads", 0),
        ("text_config.intermediate_size", float("inf")),
        ("vision_config.num_hidden_layers", 10**8),
        ("vision_config.image_size", 10**6),
        ("vision_config.image_size", [10**6, 10**6]),
        ("vision_config.patch_size", 0),
        ("vision_config.patch_size", 10**9),
        ("vision_config.num_channels", 10**7),
        ("text_config.rope_parameters", DEEP),
        ("text_config.hidden_act", "os.system"),
        ("text_config.dtype", "float1000"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(model: Path, place: str, value: Any) -> None:
    change(model, place, value)
    started = time.perf_counter()
    for step in (model_without_weights, load_model):
        with pytest.raises(GracecError) as error:
            step(model)
        assert str(model) in str(error.value) and str(error.value).isprintable()
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "\ufeff[1]", "9" * 5_000, ""])
def test_a_file_that_is_no_object_is_refused(model: Path, text: str) -> None:
    for name, read in (
        ("config.json", read_config),
        ("generation_config.json", read_generation_config),
        ("processor_config.json", load_processor),
        ("tokenizer_config.json", load_processor),
        ("tokenizer.json", load_processor),
    ):
        file, before = model / name, (model / name).read_bytes()
        file.write_text(text)
        with pytest.raises(GracecError, match=name):
            read(model)
        file.write_bytes(before)


@pytest.mark.parametrize("value", ["two", [None], True, {}, 2.5])
def test_a_token_that_is_none_is_refused(model: Path, value: Any) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(GracecError, match=r"generation_config\.json"):
        load_model(model)
