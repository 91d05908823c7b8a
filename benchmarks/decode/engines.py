"""The runtimes, each with the decode loop that its own users run: greedy, one prompt.

Every import of a runtime is in its class: an environment need not have the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import SimpleNamespace
from typing import Any

CONTEXT = 1024
"""Positions that runtimes which reserve their cache reserve."""
SPINNING = "session.intra_op.allow_spinning"

Stream = Callable[[Sequence[int], int], Iterator[int]]
"""(prompt, count) -> that many greedy tokens, each as soon as it is known; none ends an answer."""


def imports(engine: str) -> None:
    """Import what an engine needs, so that its load time has no imports in it."""
    import torch  # noqa: F401

    if engine in ("torch", "torchao", "onnx"):
        import transformers.models.llama.modeling_llama  # noqa: F401

        import gracec.backends.onnx.runner  # noqa: F401
    elif engine == "genai":
        import onnxruntime_genai  # noqa: F401
    else:
        import llama_cpp  # noqa: F401


def torch_model(directory: Path, threads: int, dtype: str) -> tuple[Stream, int]:
    """The Hugging Face model and its cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), local_files_only=True
    )
    return cached_loop(model), torch_bytes(model)


def torchao(directory: Path, threads: int) -> tuple[Stream, int]:
    """What `gracec.load` gives: the Hugging Face model with packed INT4 weights."""
    import torch

    import gracec

    torch.set_num_threads(threads)
    model: Any = gracec.load(directory, "torchao").model
    decoder = torch.nn.ModuleList([model.model.language_model, model.lm_head])
    decoder.get_input_embeddings = model.get_input_embeddings
    return cached_loop(model), torch_bytes(decoder)


def cached_loop(model: Any) -> Stream:
    """One forward a token. `generate` does the same and more, which would be the slower peer."""
    import torch
    from transformers import DynamicCache

    def stream(prompt: Sequence[int], count: int) -> Iterator[int]:
        cache, ids = DynamicCache(), torch.tensor([list(prompt)])
        for _ in range(count):
            with torch.inference_mode():
                found = model(
                    input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                ids = found.logits[:, -1].argmax(-1, keepdim=True)
            yield int(ids)

    return stream


def torch_bytes(model: Any) -> int:
    """Bytes of weights that a token reads: all but the embedding, unless it is the head too."""
    embedding = model.get_input_embeddings().weight
    total, heads = 0, 0
    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            if tensor is embedding and "Embedding" in type(module).__name__:
                continue
            parts = [getattr(tensor, name, None) for name in ("qdata", "scale_and_zero")]
            stored = [part for part in parts if part is not None] or [tensor]
            total += sum(part.nbytes for part in stored)
            heads += tensor is embedding
    assert heads <= 1
    return total


def onnx(directory: Path, threads: int) -> tuple[Stream, int]:
    """gracec's runner, as its users call it."""
    import torch

    from gracec.backends.onnx import runner

    torch.set_num_threads(threads)
    opened = runner.open_session

    @functools.wraps(opened)
    def without_spinning(path: Path, options: Any, **rest: Any) -> Any:
        return opened(path, {**options, SPINNING: "0"}, **rest)

    runner.open_session = without_spinning
    model = runner.OnnxModel.load(directory, threads=threads)
    model.generation_config.eos_token_id = None

    def stream(prompt: Sequence[int], count: int) -> Iterator[int]:
        came: SimpleQueue[torch.Tensor | None] = SimpleQueue()
        streamer = SimpleNamespace(put=came.put, end=lambda: None)
        options: dict[str, Any] = {
            "max_new_tokens": count,
            "do_sample": False,
            "streamer": streamer,
        }
        ids = torch.tensor([list(prompt)])

        def generate() -> None:
            try:
                model.generate(ids, **options)
            finally:
                came.put(None)  # also after an error, so that nobody waits for more

        thread = Thread(target=generate)
        thread.start()
        came.get()  # the prompt
        while (token := came.get()) is not None:
            yield int(token)
        thread.join()

    (decoder,) = (directory / "onnx").glob("decoder_model_merged*.onnx")
    return stream, onnx_bytes(decoder)


def onnx_bytes(path: Path) -> int:
    """Bytes of a graph's tensors, less those of which a token reads one row."""
    import onnx
    from onnx import TensorProto

    narrow = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT2: 2, TensorProto.UINT2: 2}
    graph = onnx.load(str(path), load_external_data=False).graph
    rows = {node.input[0] for node in graph.node if node.op_type.startswith("Gather")}
    rows -= {name for n in graph.node if not n.op_type.startswith("Gather") for name in n.input}
    total = 0
    for tensor in graph.initializer:
        if tensor.name in rows:
            continue
        wide = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
        values = functools.reduce(lambda a, b: a * b, tensor.dims, 1)
        total += values * narrow.get(tensor.data_type, wide) // 8
    return total


def genai(directory: Path, threads: int) -> tuple[Stream, int]:
    """onnxruntime-genai on what its model builder wrote."""
    import json

    import onnxruntime_genai as og

    config = og.Config(str(directory))
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1, SPINNING: "0"}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)

    def stream(prompt: Sequence[int], count: int) -> Iterator[int]:
        params = og.GeneratorParams(model)
        most = len(prompt) + count + 1
        params.set_search_options(
            do_sample=False, max_length=most, min_length=most, batch_size=1, num_beams=1
        )
        generator = og.Generator(model, params)
        generator.append_tokens(list(prompt))
        for _ in range(count):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return stream, onnx_bytes(directory / "model.onnx")


def llama_cpp(file: Path, threads: int) -> tuple[Stream, int]:
    """llama.cpp, called as its own programs call it."""
    import ctypes

    import llama_cpp as lib
    import numpy as np
    from gguf import GGUFReader

    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    embedding = "token_embd.weight"
    size = sum(tensors.values()) - (tensors[embedding] if "output.weight" in tensors else 0)
    model = lib.Llama(
        str(file),
        n_ctx=CONTEXT,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,  # what llama.cpp chooses by itself where it can
        verbose=False,
    )
    words = model.n_vocab()

    def decode(ids: Sequence[int]) -> int:
        context = model.ctx  # which ends with the model, so that the model has to be kept
        array = (lib.llama_token * len(ids))(*ids)
        if lib.llama_decode(context, lib.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = lib.llama_get_logits_ith(context, -1)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, shape=(words,)).argmax())

    def stream(prompt: Sequence[int], count: int) -> Iterator[int]:
        lib.llama_memory_clear(lib.llama_get_memory(model.ctx), True)
        token = decode(prompt)
        yield token
        for _ in range(count - 1):
            token = decode([token])
            yield token

    return stream, size


ENGINES: dict[str, Callable[..., tuple[Stream, int]]] = {
    "torch": torch_model,
    "torchao": torchao,
    "onnx": onnx,
    "genai": genai,
    "llama.cpp": llama_cpp,
}
"""Name -> (path, threads, options) -> the stream, and the bytes of weights that a token reads."""
