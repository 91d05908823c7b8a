"""The runner on the fused decoder gives the tokens of the standard one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gracec
from gracec.backends.onnx.cache import RuntimeCache
from gracec.backends.onnx.runner import OnnxModel
from gracec.backends.onnx.session import SessionConfig
from gracec.models.cache_argument import CACHE_ARGUMENT
from gracec.models.loading import load_config
from tests.tiny import tiny_batch

PROMPT = torch.tensor([[1, 9, 12, 15, 9, 12, 15, 9]])
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "num_return_sequences": 2, "temperature": 0.7},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "in parts": {"prefill_chunk_size": 3},
    "beams in parts": {"prefill_chunk_size": 3, "num_beams": 2},
    "drafts": {"prompt_lookup_num_tokens": 3},
    "without a cache": {"use_cache": False},
}


@pytest.fixture(scope="module")
def standard(bundle: Path) -> OnnxModel:
    read = SessionConfig.read(bundle / "onnx")
    graphs = {name: file for name, file in read.graphs.items() if name != "fused_decoder"}
    config = read.model_copy(update={"graphs": graphs})
    return OnnxModel(bundle / "onnx", load_config(bundle), session_config=config, threads=1)


@pytest.fixture
def fused(bundle: Path) -> OnnxModel:
    return gracec.load(bundle, backend="onnx")


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_the_standard_decoder(
    name: str, standard: OnnxModel, fused: OnnxModel
) -> None:
    settings = {"max_new_tokens": 6, "do_sample": False} | SETTINGS[name]
    found = [
        torch.manual_seed(3) and model.generate(PROMPT, **settings) for model in (standard, fused)
    ]
    assert torch.equal(*found)
    assert fused.runs_fused_only == (name != "beams in parts")  # which has parts of two rows
    assert not standard.runs_fused_only


def test_logits_across_a_longer_buffer(standard: OnnxModel, fused: OnnxModel) -> None:
    """61 positions and 8 more: the buffer becomes a longer one once, and stays where it is else."""
    ids = torch.arange(61)[None] % 40 + 20
    caches: list[Any] = [RuntimeCache(), RuntimeCache()]
    places = []
    for tokens in (ids, *ids[:, :8].split(1, dim=1)):
        pair = zip((standard, fused), caches, strict=True)
        expected, found = (m(tokens, past_key_values=cache).logits for m, cache in pair)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        places.append({name: buffer.ctypes.data for name, buffer in caches[1].buffers.items()})
    assert [one == next_ for one, next_ in pairwise(places)].count(False) == 1
    assert caches[1].capacity == 128
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 69
    bound = caches[1].bound
    caches[1].crop(-3)
    assert (caches[1].get_seq_length(), caches[1].bound) == (66, bound)


def test_what_it_does_not_take_goes_to_the_standard_decoder(
    standard: OnnxModel, fused: OnnxModel
) -> None:
    """Padding, parts of several prompts, and positions beyond its tables, in the midst of an
    answer; and back."""
    batch = tiny_batch(None, ("what is this ?", "where is the small red circle ?"))
    options = {"max_new_tokens": 5, "do_sample": False}
    assert fused._fused is not None
    fused._fused.positions = len(PROMPT[0]) + 2
    assert torch.equal(*(model.generate(PROMPT, **options) for model in (standard, fused)))
    assert not fused.runs_fused_only
    for given in (batch, {"input_ids": PROMPT.expand(2, -1), "prefill_chunk_size": 3}):
        assert torch.equal(*(model.generate(**given, **options) for model in (standard, fused)))
    first = fused.generate(PROMPT, return_dict_in_generate=True, **options)
    cache = first[CACHE_ARGUMENT]
    assert cache.values
    fused._fused.positions = 100
    expected = standard.generate(PROMPT, max_new_tokens=9, do_sample=False)
    rest = fused.generate(first.sequences, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert torch.equal(rest, expected)
    assert cache.buffers


def test_what_it_takes(fused: OnnxModel) -> None:
    session = fused._fused
    assert session is not None

    def takes(rows: list[list[int]], length: int) -> bool:
        return session.takes(torch.tensor(rows), length)

    assert takes([[1, 1, 1]], 3)
    assert takes([[1, 1, 1]], 2)
    assert takes([[1, 1, 1], [1, 1, 1]], 1)
    assert not takes([[1, 1, 1], [1, 1, 1]], 2)
    assert not takes([[0, 1, 1]], 1)
    assert not takes([[1] * (session.positions + 1)], 1)


def test_a_cache_in_buffers() -> None:
    shapes = {"past.0.key": (2, 1, 3), "past.0.value": (2, 1, 3)}
    cache = RuntimeCache()
    cache.reserve(65, shapes)
    assert (len(cache), cache.capacity, cache.batch_size, cache.get_seq_length()) == (1, 128, 2, 0)
    cache.length = 2
    cache.buffers["past.0.key"][:, :, 1] = np.array([[[1.0]], [[2.0]]])
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.buffers["past.0.key"][:, 0, 1, 0].tolist() == [2, 2]
    cache.batch_repeat_interleave(2)
    assert (cache.batch_size, cache.bound) == (4, None)
    values: Tensor = torch.from_numpy(cache.as_values()["past.0.key"].numpy())
    assert (values.shape, cache.buffers) == ((4, 1, 2, 3), {})
    assert values[:, 0, 1].unique().tolist() == [2]
