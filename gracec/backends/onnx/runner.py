"""Run an exported model with ONNX Runtime, and generate with transformers' own `generate`.

The cache stays in the runtime: what the decoder returns is its next input, and is not copied on
the way from one token to the next.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from gracec.backends.onnx.cache import RuntimeCache
from gracec.backends.onnx.fused import FUSED, LENGTHS
from gracec.backends.onnx.fused.session import FusedSession
from gracec.backends.onnx.session import FOLDER, SessionConfig, open_session
from gracec.capture.families import families, family_for
from gracec.capture.families.base import VIDEO, Family
from gracec.capture.greedy import next_positions
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
from gracec.models.cache_argument import CACHE_ARGUMENT
from gracec.models.configs import read_generation_config
from gracec.models.devices import device_and_dtype, same_device
from gracec.models.loading import load_config, load_processor

TEXT = ("input_ids", "attention_mask")
LARGE_DECODER = 512 << 20
"""Bytes of a decoder from which on its threads are not chosen by trying."""


class OnnxModel(GenerationMixin):
    """An exported vision-language model; it is called and generates like a Hugging Face model.

    Attributes:
        config: of the model.
        generation_config: what `generate` goes by where it is told nothing else.
        session_config: how the graphs are run, and the figures of their gates.
        threads: that one operator of the decoder may use.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    main_input_name: ClassVar[str] = "input_ids"
    input_modalities: ClassVar[tuple[str, ...]] = ("text",)  # images are encoded before
    _is_stateful: ClassVar[bool] = False

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
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
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
        most = self.threads = threads or torch.get_num_threads()
        self._fused_session: FusedSession | None = None
        self._decoder = FUSED if FUSED in self.session_config.graphs else DECODER
        self._sessions = {n: self._open(n, most) for n in (VISION, EMBEDDING, self._decoder)}
        if not threads:
            self.threads = self._choose_threads(most)

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

    @cached_property
    def family(self) -> Family:
        return family_for(self.config)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """What `forward` returns: a `CausalLMOutputWithPast`."""
        return self.forward(*inputs, **options)

    def can_generate(self) -> bool:
        return True

    def eval(self) -> Self:
        """Itself: nothing in it behaves otherwise in training."""
        return self

    def to(
        self,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Itself, if that is where and what it already is.

        Raises:
            GracecError: for another device or dtype.
        """
        device, dtype = device_and_dtype(device, dtype)
        if device is not None and not same_device(device, self.device):
            raise GracecError(
                f"the ONNX runner runs on the CPU, not on {device}",
                fix="compile for target torchao to run on a GPU",
            )
        if dtype not in (None, self.dtype):
            raise GracecError(
                f"the graphs compute in float32, not in {dtype}",
                fix="compile for target torchao, with the dtype in the recipe",
            )
        return self

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: RuntimeCache | None = None,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        prompt_positions: Tensor | None = None,
        logits_to_keep: int = 0,
        use_cache: bool = True,
        return_dict: bool = True,
        past_key_values: RuntimeCache | None = None,
        **images: Tensor,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V] of a batch from the processor, or of the tokens after a cache.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, P + S] with a cache of P positions; all ones by default.
            cache: of a call before, which this one makes longer.
            mm_encoder_outputs, prompt_positions: what `generate` has made of the images.
            logits_to_keep: the last positions whose logits are computed, 0 for all.
            use_cache: whether to return a cache.
            return_dict: there is no other form.
            past_key_values: another word for `cache`.
            images: what else the processor returned.

        Raises:
            GracecError: if the images do not fit the prompts.
        """
        given = past_key_values if cache is None else cache
        past = RuntimeCache() if given is None else given
        features = _features(mm_encoder_outputs)
        if images or (features is None and not past.is_initialized):
            prepared, features = self._encoded(
                {"input_ids": input_ids, "attention_mask": attention_mask, **images}
            )
            attention_mask = prepared["attention_mask"]
            prompt_positions = _batch_first(prepared.get("position_ids"))
        embeds, length = self.embed(input_ids), input_ids.shape[1]
        if features is not None:
            embeds = self.family.merge(self.config, input_ids, embeds, features)
        if attention_mask is None:
            shape = (len(input_ids), past.get_seq_length() + length)
            attention_mask = torch.ones(shape, dtype=torch.int64)
        positions = self._positions(attention_mask, length, prompt_positions)
        logits, past = self.decode(embeds, attention_mask, positions, logits_to_keep, past)
        found: Any = {CACHE_ARGUMENT: past if use_cache else None}
        return CausalLMOutputWithPast(logits=logits, **found)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *arguments: Any, **options: Any) -> Any:
        """What `generate` of transformers returns, of a batch from the processor.

        Images are encoded once, whatever becomes of the prompts: beams, or parts that are read one
        after the other (`prefill_chunk_size`).

        Args:
            inputs: `input_ids`, if they are not given by their name.
            arguments, options: the batch, padded on the left, and all that `generate` of
                transformers takes: `generation_config` or settings of one, `streamer`,
                `logits_processor`, `stopping_criteria`, ...

        Raises:
            GracecError: if the batch is not one that the model takes.
            ValueError: of transformers, for settings that it does not know or take together.
        """
        names = [*TEXT, *self.family.vision, *self.family.computed, *VIDEO]
        batch = {name: options.pop(name) for name in names if name in options}
        if inputs is not None:
            batch["input_ids"] = inputs
        prepared, features = self._encoded(batch)
        for name in ("cache", "past_key_values"):
            if name in options:
                options[CACHE_ARGUMENT] = options.pop(name)
        mask, past = prepared["attention_mask"], options.get(CACHE_ARGUMENT)
        if not mask[:, -1].all():
            raise GracecError("padded on the right", where="batch", fix="pad on the left")
        if past is not None and not isinstance(past, RuntimeCache):
            raise GracecError(
                f"a {type(past).__name__} is no cache of the ONNX runner",
                where=CACHE_ARGUMENT,
                fix="give that of an output with return_dict_in_generate=True",
            )
        if features is not None:
            options["mm_encoder_outputs"] = self._encoder_outputs(batch, features, past)
        if "position_ids" in prepared:
            options["prompt_positions"] = _batch_first(prepared["position_ids"])
        made: Any = super()  # typed for models of torch
        return made.generate(prepared["input_ids"], *arguments, attention_mask=mask, **options)

    def is_remote_code(self) -> bool:
        """Asked by transformers; no code of a model is ever run."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Asked by transformers; how experts are computed is in the graph."""
        return {}

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        """Asked by transformers for a cache: it is the runtime's own."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise GracecError(
                f"cache_implementation {kind!r}: the cache is in ONNX Runtime", fix="leave it out"
            )
        if model_kwargs.get(CACHE_ARGUMENT) is None and generation_config.use_cache:
            model_kwargs[CACHE_ARGUMENT] = RuntimeCache()

    def _encoded(self, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Prepared inputs, and the visual tokens [N, H] of all images, if there are any."""
        prepared = self._prepare(batch)
        if not any(name in prepared for name in self.family.vision):
            return prepared, None
        return prepared, self.encode(self.family.vision_feed(prepared))

    def _encoder_outputs(
        self, batch: Mapping[str, Any], features: Tensor, past: RuntimeCache | None
    ) -> dict[str, Any]:
        """Visual tokens by image, as transformers hands them on, without those in the cache."""
        model: Any = self
        given = {name: tensor for name, tensor in batch.items() if tensor is not None}
        found = list(features.split(self.family.image_tokens(model, given)))
        if past is not None and past.get_seq_length():
            visual = given["input_ids"] == model.config.image_token_id
            _, column = visual.nonzero(as_tuple=True)
            found = [features[column >= past.get_seq_length()]]
        return {"image": BaseModelOutputWithPooling(pooler_output=found)}  # type: ignore[arg-type]

    def _positions(self, mask: Tensor, length: int, prompt: Tensor | None) -> Tensor:
        """Positions of the last tokens as the decoder takes them.

        Args:
            mask: int64 [B, P + S].
            length: S.
            prompt: positions [B, 3, T] of all tokens of the prompts, where these are not counted.
        """
        if prompt is None:
            return self.family.positions(mask)[..., -length:]
        known = prompt.movedim(0, 1)
        further = mask.shape[1] - known.shape[-1]
        if further > 0:
            known = torch.cat([known, next_positions(known) + torch.arange(further)], dim=-1)
        return known[..., mask.shape[1] - length : mask.shape[1]]

    def _open(self, name: str, threads: int) -> ort.InferenceSession:
        """A session of a graph, which has to read token ids and write logits as its name says."""
        path = self.folder / self.session_config.graphs[name]
        session = open_session(path, self.session_config.options, threads=threads)
        inputs = {value.name for value in session.get_inputs()}
        outputs = {value.name for value in session.get_outputs()}
        found = "input_ids" in inputs, "logits" in outputs, LENGTHS in inputs
        if found != (name == EMBEDDING, name in (DECODER, FUSED), name == FUSED):
            raise GracecError(
                f"the graph {name!r} is another one", where=str(path), fix="export the model again"
            )
        return session

    def _session(self, name: str) -> ort.InferenceSession:
        """The standard decoder beside the fused one is opened when it is first needed."""
        if name not in self._sessions:
            self._sessions[name] = self._open(name, self.threads)
        return self._sessions[name]

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
            held = self._sessions[self._decoder]
            self._sessions[self._decoder] = self._open(self._decoder, threads // 2)
            found = self._token_seconds()
            if found >= best:
                self._sessions[self._decoder] = held
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
        """As `Runtime` has it; the cache is the one that was given, made longer."""
        past = RuntimeCache() if past is None else past
        fused = self._fused
        if fused is not None and fused.takes(attention_mask, embeds.shape[1]):
            return fused.run(embeds, keep, past), past
        session = self._session(DECODER)
        feed = _ort_values(decoder_inputs(embeds, attention_mask, position_ids, keep))
        feed |= past.as_values() or self._empty_cache(len(embeds))
        # As IOBinding does it, but with one call instead of one for every part of the cache.
        values = session.run_with_ort_values(self._decoder_outputs, feed)
        found = dict(zip(self._decoder_outputs, values, strict=True))
        logits = torch.from_numpy(found.pop("logits").numpy())
        past.values = {name.replace(GROWN_CACHE, CACHE): value for name, value in found.items()}
        return logits, past

    @property
    def runs_fused_only(self) -> bool:
        """Whether nothing has needed the decoder of standard operators yet."""
        return DECODER not in self._sessions

    @property
    def _fused(self) -> FusedSession | None:
        """The decoder whose cache is written in place, of the session as it is now."""
        session = self._sessions.get(FUSED)
        if session is None:
            return None
        if self._fused_session is None or self._fused_session.session is not session:
            self._fused_session = FusedSession(session)
        return self._fused_session

    @cached_property
    def _decoder_outputs(self) -> list[str]:
        return [value.name for value in self._session(DECODER).get_outputs()]

    def _empty_cache(self, batch: int) -> dict[str, Any]:
        inputs = {value.name: value.shape for value in self._session(DECODER).get_inputs()}
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


def _features(encoded: Mapping[str, Any] | None) -> Tensor | None:
    """Visual tokens [N, H] of what transformers handed on; None without any."""
    if not encoded:
        return None
    tokens = encoded["image"].pooler_output
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in tokens])


def _batch_first(positions: Tensor | None) -> Tensor | None:
    """Positions [3, B, T] as [B, 3, T]: transformers widens a batch in its first dimension."""
    return None if positions is None else positions.movedim(1, 0)


def _ort_values(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        name: ort.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())
        for name, tensor in tensors.items()
    }
