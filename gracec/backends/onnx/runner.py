"""Run an exported model with ONNX Runtime: images, prompts, greedy answers, token by token.

The cache stays in the runtime: what the decoder returns is its next input, and is never copied on
the way.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from gracec.backends.onnx.logits import logits_processors, settings_not_done
from gracec.backends.onnx.session import FOLDER, SessionConfig, open_session
from gracec.capture.families import families
from gracec.capture.families.base import Family
from gracec.capture.greedy import Step, greedy, next_positions, prompt_logits
from gracec.capture.serving_graph import (
    CACHE,
    DECODER,
    EMBEDDING,
    GROWN_CACHE,
    VISION,
    decoder_inputs,
    empty_cache,
)
from gracec.errors import GracecError
from gracec.models.configs import read_generation_config
from gracec.models.loading import load_config, load_processor

TEXT = ("input_ids", "attention_mask")
DEFAULT_NEW_TOKENS = 64
LARGE_DECODER = 512 << 20
"""Bytes of a decoder from which on its threads are not chosen by trying."""


class OnnxModel:
    """An exported vision-language model; generates like a Hugging Face model, greedily.

    Attributes:
        config: of the model.
        session_config: how the graphs are run, and the figures of their gates.
        threads: that one operator of the decoder may use.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(
        self,
        folder: Path,
        config: PreTrainedConfig,
        generation_config: GenerationConfig | None = None,
        *,
        session_config: SessionConfig | None = None,
        threads: int | None = None,
    ) -> None:
        """Load the graphs of a folder.

        Args:
            session_config: how to run them; by default read from the folder.
            threads: that one operator may use. By default the number that torch may use for image
                and prompt; for the decoder, as many or fewer, as a token is faster.

        Raises:
            GracecError: if a file is not the one that was written, or the runtime does not take it.
        """
        self.folder, self.config = folder, config
        self.generation_config = generation_config or GenerationConfig()
        self.session_config = session_config or SessionConfig.read(folder)
        if self.session_config.family != config.model_type or config.model_type not in families():
            raise GracecError(
                f"the graphs are of the family {self.session_config.family!r}, "
                f"config.json is of {config.model_type!r}",
                where=str(folder),
                fix="export the model again",
            )
        missing = [n for n in (VISION, EMBEDDING, DECODER) if n not in self.session_config.graphs]
        if missing:
            raise GracecError(
                f"there is no graph {missing[0]!r}", where=str(folder), fix="export the model again"
            )
        most = threads or torch.get_num_threads()
        self._sessions = {name: self._open(name, most) for name in self.session_config.graphs}
        for name, (reads, writes) in {
            VISION: (False, False),
            EMBEDDING: (True, False),
            DECODER: (False, True),
        }.items():
            inputs, outputs = self._sessions[name].get_inputs(), self._sessions[name].get_outputs()
            found = (
                "input_ids" in {value.name for value in inputs},
                "logits" in {value.name for value in outputs},
            )
            if found != (reads, writes):
                raise GracecError(
                    f"the graph {name!r} is another one",
                    where=str(folder / self.session_config.graphs[name]),
                    fix="export the model again",
                )
        self.threads = most if threads else self._choose_threads(most)

    @classmethod
    def load(cls, directory: str | Path, *, threads: int | None = None) -> OnnxModel:
        """From a directory with a model configuration and a folder `onnx`.

        Raises:
            GracecError: if there is no such model, or it is not whole.
        """
        directory = Path(directory)
        if not (directory / FOLDER).is_dir():
            load_config(directory)  # which says so if it is no model at all
            raise GracecError(
                f"no folder {FOLDER!r}, so it holds no ONNX graphs",
                where=str(directory),
                fix="compile with --format onnx, or use export_onnx",
            )
        session_config = SessionConfig.read(directory / FOLDER)
        session_config.check_model(directory)
        return cls(
            directory / FOLDER,
            load_config(directory),
            read_generation_config(directory),
            session_config=session_config,
            threads=threads,
        )

    @cached_property
    def processor(self) -> Any:
        """Tokenizer and image processor, from the directory of the model."""
        return load_processor(self.folder.parent)

    @property
    def family(self) -> Family:
        return families()[self.config.model_type]

    def __call__(self, **inputs: Tensor) -> Tensor:
        """Logits [B, T, V] of a batch from the processor."""
        return prompt_logits(self, self._prepare(inputs))

    def generate(
        self,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        num_beams: int = 1,
        streamer: Any = None,
        prefill_chunk: int | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """The prompt followed by the most likely tokens, int64 [B, T + new].

        Args:
            max_new_tokens: the longest answer; by default that of the generation config, or 64.
            streamer: has `put(tokens)` and `end()`, as streamers of transformers do.
            prefill_chunk: positions of the prompt to read at once, to bound memory.
            inputs: a batch from the processor, padded on the left.

        Raises:
            GracecError: for anything but greedy generation.
        """
        if do_sample or num_beams != 1:
            raise GracecError(
                "the ONNX runner generates greedily only", fix="pass do_sample=False, num_beams=1"
            )
        steps = self.stream(max_new_tokens=max_new_tokens, prefill_chunk=prefill_chunk, **inputs)
        tokens = [inputs["input_ids"]]
        if streamer is not None:
            streamer.put(tokens[0])
        for step in steps:
            tokens.append(step.tokens[:, None])
            if streamer is not None:
                streamer.put(step.tokens)
        if streamer is not None:
            streamer.end()
        return torch.cat(tokens, dim=1)

    def stream(
        self,
        *,
        max_new_tokens: int | None = None,
        prefill_chunk: int | None = None,
        **inputs: Tensor,
    ) -> Iterator[Step]:
        """The same token by token: each as soon as it is known, with its logits."""
        settings = self.generation_config
        for name in settings_not_done(settings):
            raise GracecError(
                f"the generation config sets {name}, which the ONNX runner does not do",
                where=str(self.folder.parent / "generation_config.json"),
                fix="remove it, or run the model with torch",
            )
        prepared = self._prepare(inputs)
        if not prepared["attention_mask"][:, -1].all():
            raise GracecError("padded on the right", where="batch", fix="pad on the left")
        end = settings.eos_token_id
        ends = [end] if isinstance(end, int) else list(end or ())
        pad = settings.pad_token_id
        return greedy(
            self,
            prepared,
            max_new_tokens=max_new_tokens or settings.max_new_tokens or DEFAULT_NEW_TOKENS,
            end=ends,
            pad=pad if pad is not None else (ends or [0])[0],
            chunk=prefill_chunk,
            processors=logits_processors(settings, prepared["input_ids"].shape[1], ends),
        )

    def _open(self, name: str, threads: int) -> ort.InferenceSession:
        path = self.folder / self.session_config.graphs[name]
        return open_session(path, self.session_config.options, threads=threads)

    def _choose_threads(self, threads: int) -> int:
        """Halve the decoder's threads for as long as a token gets faster; keep its best session.

        The operators of a small decoder are so short that threads wait for each other longer than
        they work. Those of a large one are limited by memory, and it is not loaded twice.
        """
        path = self.folder / self.session_config.graphs[DECODER]
        size = sum(file.stat().st_size for file in self.folder.glob(f"{path.name}*"))
        if size > LARGE_DECODER:
            return threads
        best = self._token_seconds() if threads > 1 else 0.0
        while threads > 1:
            held, self._sessions[DECODER] = (
                self._sessions[DECODER],
                self._open(DECODER, threads // 2),
            )
            found = self._token_seconds()
            if found >= best:
                self._sessions[DECODER] = held
                break
            best, threads = found, threads // 2
        return threads

    def _token_seconds(self) -> float:
        """The median of some tokens after a short prompt."""
        prompt, count = 16, 12
        hidden = self.config.get_text_config().hidden_size
        embeds = torch.zeros(1, prompt, hidden)
        mask = torch.ones(1, prompt, dtype=torch.int64)
        positions = self.family.positions(mask)
        _, past = self.decode(embeds, mask, positions, 1)
        seconds = []
        for _ in range(count):
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
            positions = next_positions(positions)
            start = time.perf_counter()
            _, past = self.decode(embeds[:, :1], mask, positions, 1, past)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensor:
        session = self._sessions[VISION]
        feed = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
        return torch.from_numpy(session.run(None, feed)[0])

    def embed(self, input_ids: Tensor) -> Tensor:
        feed = {"input_ids": np.ascontiguousarray(input_ids.numpy())}
        return torch.from_numpy(self._sessions[EMBEDDING].run(None, feed)[0])

    def decode(
        self,
        embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        keep: int,
        past: Any = None,
    ) -> tuple[Tensor, Any]:
        session = self._sessions[DECODER]
        feed = _ort_values(decoder_inputs(embeds, attention_mask, position_ids, keep))
        feed |= past or self._empty_cache(len(embeds))
        # As IOBinding does it, but with one call instead of one for every part of the cache.
        values = session.run_with_ort_values(self._decoder_outputs, feed)
        found = dict(zip(self._decoder_outputs, values, strict=True))
        logits = torch.from_numpy(found.pop("logits").numpy())
        return logits, {name.replace(GROWN_CACHE, CACHE): value for name, value in found.items()}

    @cached_property
    def _decoder_outputs(self) -> list[str]:
        return [value.name for value in self._sessions[DECODER].get_outputs()]

    def _empty_cache(self, batch: int) -> dict[str, Any]:
        inputs = {value.name: value.shape for value in self._sessions[DECODER].get_inputs()}
        return _ort_values(empty_cache(inputs, batch, self.dtype, self.device))

    def _prepare(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Inputs of the graphs, checked; a prompt may come without an image."""
        vision = self.family.vision
        known = [*TEXT, *vision, *self.family.computed]
        unknown = [name for name in batch if name not in known]
        if unknown:
            raise GracecError(f"the ONNX runner does not take {unknown[0]!r}", fix=f"pass {known}")
        given = {name: tensor for name, tensor in batch.items() if tensor is not None}
        ids = given.get("input_ids")
        images = any(name in given for name in vision)
        if ids is None or images or (ids == self.config.image_token_id).any():
            model: Any = self  # its config and dtype are all that is looked at
            return self.family.prepare(model, given)
        mask = given.get("attention_mask")
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids) if mask is None else mask,
        }


def _ort_values(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        name: ort.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())
        for name, tensor in tensors.items()
    }
