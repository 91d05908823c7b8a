"""GGUF for llama.cpp and the programs around it.

    DIR/gguf/model.gguf    the decoder, its vocabulary and the chat template; quantized weights in
                           blocks of Q4_0 or Q8_0 that hold the canonical codes
    DIR/gguf/mmproj.gguf   the tower and the projector

What is not quantized is in float16, bfloat16 or float32, whichever is the first to hold its values.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gracec.backends.base import Format
from gracec.backends.gguf import decoder, projector, tokenizer
from gracec.backends.gguf.blocks import Codes, block_type, pack, refusal, whole, whole_type
from gracec.backends.gguf.entries import Entry, Refused, order_of_rows
from gracec.frozen import Frozen
from gracec.models.lora import MERGE

MODEL, PROJECTOR = "model.gguf", "mmproj.gguf"
SOURCES = "gracec.sources"
"""Key of the metadata: tensor -> FQN, heads whose rows were put in another order, number of a part;
of what is stored as it is."""

CLASS_TOKEN = "v.class_embd"
CLASS_TOKEN_LAST = (
    "llama.cpp (tried with llama-cpp-python 0.3.36) puts the class token of a CLIP tower after the "
    "patches and reads pictures wrong; the file is right"
)


class Gguf(Format):
    name: ClassVar[str] = "gguf"
    folder: ClassVar[str] = "gguf"
    by_name_alone: ClassVar[bool] = True

    def refusal(self, frozen: Frozen) -> str:
        if importlib.util.find_spec("gguf") is None:
            return "the package gguf is not installed: pip install 'gracec[gguf]'"
        if not frozen.weights:
            return "no weight is quantized"
        if frozen.adapters:
            return f"llama.cpp has adapters in files of their own; compile with {MERGE}"
        if reason := super().refusal(frozen):
            return reason
        for fqn, weight in frozen.weights.items():
            if reason := refusal(weight):
                return f"{fqn}: {reason}"
        try:
            self._plan(frozen)
            _vocabulary(frozen)
        except Refused as error:
            return str(error)
        return ""

    def dtype(self, frozen: Frozen) -> torch.dtype:
        return torch.float32

    def write(self, frozen: Frozen, directory: Path) -> tuple[str, ...]:
        import gguf

        self.check(frozen)
        directory.mkdir(parents=True, exist_ok=True)
        entries, vocabulary = self._plan(frozen), _vocabulary(frozen)
        writer = gguf.GGUFWriter(None, decoder.architecture(frozen.config))
        _add_general(writer, frozen, entries[MODEL])
        decoder.write_metadata(writer, frozen.config)
        tokens = frozen.processor.tokenizer
        template = frozen.processor.chat_template or tokens.chat_template
        tokenizer.write(writer, vocabulary, tokens, template)
        _write(writer, frozen, entries[MODEL], directory / MODEL)
        writer = gguf.GGUFWriter(None, "clip")
        _add_general(writer, frozen, entries[PROJECTOR])
        projector.write_metadata(writer, frozen.config, frozen.processor.image_processor)
        _write(writer, frozen, entries[PROJECTOR], directory / PROJECTOR)
        self.check_stored_weights(frozen, directory)
        narrow = sum(weight.spec.bits < 4 for weight in frozen.weights.values())
        notes = [*vocabulary.notes]
        if any(one.name == CLASS_TOKEN for one in entries[PROJECTOR]):
            notes.append(CLASS_TOKEN_LAST)
        if narrow:
            notes.append(f"codes narrower than 4 bits are stored in 4 ({narrow} weights)")
        left = sorted(set(frozen.others) - {one.fqn for part in entries.values() for one in part})
        if left:
            notes.append(f"{len(left)} tensors that llama.cpp has no use for, such as {left[0]}")
        return tuple(notes)

    def stored_weights(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """By the reader and the arithmetic of the package gguf; of others those that are stored as
        they are."""
        import gguf

        for file in (MODEL, PROJECTOR):
            reader: Any = gguf.GGUFReader(directory / file)
            sources = json.loads(reader.get_field(SOURCES).contents())
            parts: dict[str, dict[int, Tensor]] = {}
            total: dict[str, int] = {}
            for fqn, _, _ in sources.values():
                total[fqn] = total.get(fqn, 0) + 1
            for tensor in reader.tensors:
                if tensor.name not in sources:
                    continue
                fqn, heads, number = sources[tensor.name]
                dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                found = torch.from_numpy(dense.copy())
                if heads:
                    found = found[order_of_rows(len(found), heads).argsort()]
                parts.setdefault(fqn, {})[number] = found
                if len(parts[fqn]) == total[fqn]:
                    whole = parts.pop(fqn)
                    yield fqn, torch.cat([whole[key] for key in sorted(whole)])

    def _plan(self, frozen: Frozen) -> dict[str, list[Entry]]:
        """File -> its tensors."""
        family = projector.projector_of(frozen.config)
        decoder.check(frozen.config)
        family.check(frozen.config)
        found = {MODEL: decoder.entries(frozen), PROJECTOR: projector.entries(frozen)}
        as_they_are = {one.fqn for part in found.values() for one in part if one.change is None}
        for fqn in frozen.weights:
            if fqn not in as_they_are:
                raise Refused(f"llama.cpp has no place for the codes of {fqn}")
        return found


def _vocabulary(frozen: Frozen) -> tokenizer.Vocabulary:
    if frozen.processor is None:
        raise Refused("there is no tokenizer, which llama.cpp cannot do without")
    size: int = frozen.config.get_text_config().vocab_size
    return tokenizer.vocabulary(frozen.processor.tokenizer, size)


def _add_general(writer: Any, frozen: Frozen, entries: Sequence[Entry]) -> None:
    import gguf

    quantized = (frozen.weights[one.fqn] for one in entries if one.fqn in frozen.weights)
    mostly = min(map(block_type, quantized), default="F16")
    writer.add_name(frozen.name or frozen.config.model_type)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{mostly}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kept = {one.name: one.source() for one in entries if one.change is None and one.fqn}
    writer.add_string(SOURCES, json.dumps(kept))


def _write(writer: Any, frozen: Frozen, entries: Sequence[Entry], path: Path) -> None:
    """Header and tensors, one in memory at a time."""
    import gguf

    types = []
    for entry in entries:
        rows = entry.rows(frozen)
        if isinstance(rows, Codes):
            shape, kind = rows.codes.shape, rows.type
        else:
            shape, kind = rows.shape, whole_type(rows, entry.types)
        types.append(kind)
        code = gguf.GGMLQuantizationType[kind]
        stored = gguf.quant_shape_to_byte_shape(tuple(shape), code)
        writer.add_tensor_info(
            entry.name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=code
        )
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry, kind in zip(entries, types, strict=True):
        rows = entry.rows(frozen)
        writer.write_tensor_data(pack(rows) if isinstance(rows, Codes) else whole(rows, kind))
    writer.close()
