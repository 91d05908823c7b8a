"""What onnxruntime-genai needs to load a directory, beside the files of other clients.

    DIR/genai_config.json               the graphs, and how to generate
    DIR/genai_processor.json            what its own image processor does with a picture
    DIR/onnx/genai_vision_encoder.onnx  the vision encoder for one image, with the names of genai
    DIR/onnx/genai_embedding.onnx       token ids and visual tokens -> embeddings
    DIR/onnx/genai_decoder.onnx         the decoder, with the logits of the last position

The graphs are headers: their weights are in the data files of the graphs that other clients run.

A family is added with one line in `TYPES`, if genai has a type that makes its pixels and positions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from gracec.backends.onnx import gates
from gracec.backends.onnx.session import open_session
from gracec.capture.families import family_for, family_of
from gracec.capture.families.qwen2_vl import GRID, SERVED_PATCHES
from gracec.capture.serving_graph import (
    CACHE,
    DECODER,
    EMBEDDING,
    GROWN_CACHE,
    VISION,
    decoder_graph,
    decoder_inputs,
    empty_cache,
)
from gracec.errors import GateError
from gracec.frozen import Frozen

TYPES = {"qwen2_vl": "qwen2_5_vl", "qwen2_5_vl": "qwen2_5_vl"}
"""Model type of the Hugging Face config -> the type of genai that runs it."""
CONFIG_FILE, PROCESSOR_FILE = "genai_config.json", "genai_processor.json"
HEADERS = {
    VISION: "genai_vision_encoder.onnx",
    EMBEDDING: "genai_embedding.onnx",
    DECODER: "genai_decoder.onnx",
}
"""Name of a graph -> the file of its header."""
TOKENS = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>"}
"""Field of the configuration -> the token that genai's processor writes for it."""
KEEP = "num_logits_to_keep"
FILTERS = {0: "NEAREST", 1: "LANCZOS", 2: "LINEAR", 3: "CUBIC"}
"""Number of a filter of Pillow -> its name in genai."""
SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
"""What genai takes from a generation config, by the same names."""


def refusal(frozen: Frozen) -> str:
    """Why genai cannot load the graphs of this model, or an empty string."""
    config, processor = frozen.config, frozen.processor
    if config.model_type not in TYPES:
        return f"it has no model type for {config.model_type!r}"
    if processor is None:
        return "there is no processor"
    for field, token in TOKENS.items():
        if processor.tokenizer.convert_tokens_to_ids(token) != getattr(config, field):
            return f"its processor writes {token}, which is not the {field} of the tokenizer"
    images = _image_fields(frozen)
    steps = ("do_resize", "do_rescale", "do_normalize")
    left_out = [step for step in steps if not images[step]]
    if left_out:
        return f"its processor does what {left_out[0]} turns off"
    if images["resample"] not in FILTERS:
        return f"its processor has no filter {images['resample']}"
    return ""


def write_headers(
    model: PreTrainedModel, files: Mapping[str, Path], options: Mapping[str, str]
) -> None:
    """Write the graphs, and hold them to those they share their tensors with.

    Args:
        model: of the graphs.
        files: name of a graph -> its file, beside which the tensors lie in one of their own.
        options: of the sessions.

    Raises:
        GateError: if a header computes something else.
    """
    written = {name: files[name].with_name(file) for name, file in HEADERS.items()}
    headers = {name: ir.load(files[name]) for name in HEADERS}
    _one_image(headers[VISION].graph, family_for(model.config).serving_names)
    _merge_features(headers[EMBEDDING].graph, model.config)
    _last_logits(headers[DECODER].graph)
    for name, header in headers.items():
        ir.save(header, written[name])
        written[name].chmod(0o644)
        gates.file_is_valid(written[name])
    _check(model, files, written, options)


def write_config(frozen: Frozen, directory: Path, options: Mapping[str, str]) -> None:
    """Write `genai_config.json` and `genai_processor.json`.

    Args:
        directory: where configuration and tokenizer are.
        options: of the sessions.
    """
    _write(genai_config(frozen, options), directory / CONFIG_FILE)
    _write(image_processor(frozen), directory / PROCESSOR_FILE)


def genai_config(frozen: Frozen, options: Mapping[str, str]) -> dict[str, Any]:
    """What `genai_config.json` holds.

    Args:
        options: entries of the configuration of each session.
    """
    config, generation = frozen.config, frozen.generation_config or GenerationConfig()
    text = config.get_text_config()
    images = _image_fields(frozen)
    heads = text.num_attention_heads
    tokens = {
        name: _first(name, generation, text, frozen.processor.tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    for name in ("image_token_id", "video_token_id", "vision_start_token_id"):
        tokens[name] = getattr(config, name)
    search = {name: getattr(generation, name, None) for name in SEARCH}
    return {
        "model": {
            "type": TYPES[config.model_type],
            "vocab_size": text.vocab_size,
            "context_length": text.max_position_embeddings,
            **{name: value for name, value in tokens.items() if value is not None},
            "vision": {
                "filename": f"onnx/{HEADERS[VISION]}",
                "config_filename": PROCESSOR_FILE,
                "patch_size": images["patch_size"],
                "spatial_merge_size": images["merge_size"],
                "inputs": {"pixel_values": "pixel_values", GRID: GRID},
                "outputs": {"image_features": "image_features"},
            },
            "embedding": {
                "filename": f"onnx/{HEADERS[EMBEDDING]}",
                "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
                "outputs": {"inputs_embeds": "inputs_embeds"},
            },
            "decoder": {
                "filename": f"onnx/{HEADERS[DECODER]}",
                "session_options": {"provider_options": [], **options},
                "hidden_size": text.hidden_size,
                "num_hidden_layers": text.num_hidden_layers,
                "num_attention_heads": heads,
                "num_key_value_heads": text.num_key_value_heads,
                "head_size": getattr(text, "head_dim", None) or text.hidden_size // heads,
                "inputs": {
                    "inputs_embeds": "inputs_embeds",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": f"{CACHE}.%d.key",
                    "past_value_names": f"{CACHE}.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{GROWN_CACHE}.%d.key",
                    "present_value_names": f"{GROWN_CACHE}.%d.value",
                },
            },
        },
        "search": {
            "max_length": text.max_position_embeddings,
            # The decoder returns a longer cache; it does not write into a buffer of full length.
            "past_present_share_buffer": False,
            **{name: value for name, value in search.items() if value is not None},
        },
    }


def image_processor(frozen: Frozen) -> dict[str, Any]:
    """What `genai_processor.json` holds: the steps from the bytes of a picture to patches."""
    images = _image_fields(frozen)
    patches = {"patch_size": images["patch_size"], "merge_size": images["merge_size"]}
    resize = {
        "interpolation": FILTERS[images["resample"]],
        "smart_resize": 1,
        "min_pixels": images["size"]["shortest_edge"],
        "max_pixels": max_pixels(frozen),
        **patches,
    }
    normalize = {
        "mean": list(map(float, images["image_mean"])),
        "std": list(map(float, images["image_std"])),
    }
    steps: dict[str, dict[str, Any]] = {
        "DecodeImage": {"color_space": "RGB"},
        "Resize": resize,
        "Rescale": {"rescale_factor": float(images["rescale_factor"])},
        "Normalize": normalize,
        "PatchImage": {**patches, "temporal_patch_size": images["temporal_patch_size"]},
    }
    operations = [
        {"operation": {"name": kind, "type": kind, "attrs": options}}
        for kind, options in steps.items()
    ]
    return {"processor": {"name": "image_processor", "transforms": operations}}


def max_pixels(frozen: Frozen) -> int:
    """Pixels of the largest image: what the model's processor allows, and the graph takes."""
    images = _image_fields(frozen)
    return min(int(images["size"]["longest_edge"]), SERVED_PATCHES * int(images["patch_size"]) ** 2)


def notes(frozen: Frozen) -> list[str]:
    """What a user should know, of a family that genai has a type for."""
    if frozen.config.model_type not in TYPES:
        return []
    reason = refusal(frozen)
    if reason:
        return [f"onnxruntime-genai: no {CONFIG_FILE}: {reason}"]
    largest, wanted = max_pixels(frozen), _image_fields(frozen)["size"]["longest_edge"]
    if largest == wanted:
        return []
    return [
        f"onnxruntime-genai: images are scaled down to {largest:,} pixels, not {wanted:,}, since "
        f"the vision encoder takes {SERVED_PATCHES:,} patches"
    ]


def _first(name: str, *sources: Any) -> Any:
    """The first value that is not None, by the name of an attribute."""
    found = (getattr(source, name, None) for source in sources)
    return next((value for value in found if value is not None), None)


def _image_fields(frozen: Frozen) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(frozen.processor.image_processor.to_json_string())
    return fields


def _one_image(graph: ir.Graph, names: Mapping[str, str]) -> None:
    """Name the grid as genai does, and let the graph take one image.

    genai hands over images of one size together if a graph takes several. Together they would be
    more patches than there is memory for.

    Args:
        names: input of a family -> its name in the graph, where it has another.
    """
    (grid,) = (value for value in graph.inputs if value.name == names.get(GRID, GRID))
    grid.name, grid.shape = GRID, ir.Shape((1, 3))


def _last_logits(graph: ir.Graph) -> None:
    """Let a decoder compute the logits of the last position, without an input that says so.

    genai would hand that input to the vision encoder as well. From the shape of the logits it knows
    that there is one position.
    """
    (keep,) = (value for value in graph.inputs if value.name == KEEP)
    assert keep.name is not None
    graph.inputs.remove(keep)
    keep.const_value = ir.tensor(np.asarray(1, np.int64), name=keep.name)
    graph.register_initializer(keep)
    logits = graph.outputs[0]
    assert logits.name == "logits" and logits.shape is not None
    logits.shape = ir.Shape((logits.shape[0], 1, logits.shape[2]))


def _merge_features(graph: ir.Graph, config: PreTrainedConfig) -> None:
    """Let a graph of embeddings put rows of a new input in the place of image tokens, in order.

    A token without a row keeps its embedding: there are no rows while answers are generated, and an
    answer may hold the token.
    """
    hidden = config.get_text_config().hidden_size
    (ids,), (embeds,) = graph.inputs, graph.outputs
    features = ir.Value(
        name="image_features",
        shape=ir.Shape(("num_image_tokens", hidden)),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    graph.inputs.append(features)
    name = str(embeds.name)
    embeds.name = f"{name}.text"
    tape = ir.tape.Tape(graph)

    def constant(value: Any, kind: type, name: str) -> ir.Value:
        return tape.initializer(ir.tensor(np.asarray(value, kind), name=f"genai.{name}"))

    image = constant(config.image_token_id, np.int64, "image_token_id")
    one, first = constant([1], np.int64, "one"), constant(0, np.int64, "first_axis")
    flat, last = constant([-1], np.int64, "flat"), constant([-1], np.int64, "last_axis")
    none = constant(np.zeros((1, hidden)), np.float32, "no_feature")
    visual = tape.op("Equal", [ids, image])
    counted = tape.op("Cast", [tape.op("Reshape", [visual, flat])], {"to": ir.DataType.INT64})
    number = tape.op("Sub", [tape.op("CumSum", [counted, first]), one])
    number = tape.op("Reshape", [number, tape.op("Shape", [ids])])
    rows = tape.op("Shape", [features], {"start": 0, "end": 1})
    found = tape.op("And", [visual, tape.op("Less", [number, rows])])
    padded = tape.op("Concat", [features, none], {"axis": 0})
    picked = tape.op("Gather", [padded, tape.op("Where", [found, number, rows])], {"axis": 0})
    merged = tape.op("Where", [tape.op("Unsqueeze", [found, last]), picked, embeds])
    merged.name, merged.shape, merged.type = name, embeds.shape, embeds.type
    graph.outputs[0] = merged


def _check(
    model: PreTrainedModel,
    files: Mapping[str, Path],
    headers: Mapping[str, Path],
    options: Mapping[str, str],
) -> None:
    """Gate: the headers compute what the graphs and the host do, bit for bit."""
    family = family_of(model)
    inputs = family.prepare(model, family.example_batch(model, batch=1, images=1))
    ids = inputs["input_ids"]

    def run(path: Path, feed: Mapping[str, Tensor]) -> Tensor:
        session = open_session(path, options, threads=torch.get_num_threads())
        found = session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})
        return torch.from_numpy(found[0])

    features = run(files[VISION], family.vision_feed(inputs))
    embeds = run(files[EMBEDDING], {"input_ids": ids})
    merged = family.merge(model.config, ids, embeds, features)
    shapes = decoder_graph(model, family.serving_positions).inputs
    mask = inputs["attention_mask"]
    positions = inputs.get("position_ids", family.positions(mask))
    step = decoder_inputs(merged, mask, positions, 1)
    step |= empty_cache(shapes, 1, merged.dtype, merged.device)
    tried: list[tuple[str, dict[str, Tensor], Tensor]] = [
        (VISION, {name: inputs[name] for name in family.vision}, features),
        (EMBEDDING, {"input_ids": ids, "image_features": features}, merged),
        (EMBEDDING, {"input_ids": ids, "image_features": features[:0]}, embeds),
        (DECODER, {n: t for n, t in step.items() if n != KEEP}, run(files[DECODER], step)),
    ]
    for name, feed, expected in tried:
        if not torch.equal(run(headers[name], feed), expected):
            raise GateError(f"computes something else than {files[name].name}", where=HEADERS[name])


def _write(fields: Mapping[str, Any], path: Path) -> None:
    text = json.dumps(fields, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
