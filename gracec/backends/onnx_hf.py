"""ONNX graphs for ONNX Runtime, beside a Hugging Face configuration and processor.

    DIR/onnx/vision_encoder.onnx              pixels -> visual tokens
    DIR/onnx/embed_tokens.onnx                token ids -> embeddings
    DIR/onnx/decoder_model_merged_q4.onnx     embeddings and cache -> logits and longer cache
    DIR/onnx/NAME.onnx_data                   tensors of a large graph
    DIR/onnx/session.json                     how to run them, and the figures of the gates

The graphs compute in float32. Codes and scales are the canonical ones; everything else is widened
from the artifact's dtype.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.adapters import attach_adapters
from gracec.backends.base import Artifact, Format, empty_model, write_processor
from gracec.backends.onnx import kernel
from gracec.capture import capture_serving, families, family_of
from gracec.capture.serving import (
    Serving,
    ServingProgram,
    ServingRuntime,
    apply_codes,
    composed_equals_training,
)
from gracec.capture.serving_graph import DECODER, EMBEDDING, VISION
from gracec.errors import GateError, GracecError
from gracec.gates import logit_agreement, lowered_is_as_good_as_dense
from gracec.greedy import prompt_logits
from gracec.models import (
    configurations,
    fill_while_running,
    quantize_inputs,
    set_tensor,
    stand_in,
)
from gracec.passes import run_passes
from gracec.passes.base import Pass
from gracec.passes.freeze import QUANTIZE_DEQUANTIZE, FrozenWeight, frozen_weights
from gracec.passes.fuse_decoder import FuseDecoder
from gracec.passes.lower_qdq import LoweredWeight, LowerQdq, lowered_weights
from gracec.store import file_sha256

FILES = {VISION: "vision_encoder", EMBEDDING: "embed_tokens", DECODER: "decoder_model_merged"}
"""Name of a graph -> stem of its file, as transformers.js looks for it."""
GATE_TOKENS = 16


@dataclass(frozen=True)
class Onnx(Format):
    """Options: `ops` (qdq or matmulnbits) and `mode` (faithful or fast)."""

    ops: str = "matmulnbits"
    mode: str = "faithful"

    name = "onnx"
    folder = "onnx"
    needs = "onnxruntime"
    tested = "The tests of gracec run such directories with ONNX Runtime on the CPU."
    holds_activations = True
    holds_adapters = True

    def weight_refusal(self, weight: FrozenWeight) -> str:
        return kernel.refusal(weight)

    def refusal(self, artifact: Artifact) -> str:
        kernel.check_options(self.ops, self.mode)
        if not artifact.weights:
            return "no weight is quantized"
        reasons = ((fqn, self.weight_refusal(w)) for fqn, w in artifact.weights.items())
        return next((f"{fqn}: {reason}" for fqn, reason in reasons if reason), "")

    def dtype(self, artifact: Artifact) -> torch.dtype:
        return torch.float32

    def notes(self, artifact: Artifact) -> tuple[str, ...]:
        return ()

    def tensors(self, artifact: Artifact) -> tuple[dict[str, Tensor], dict[str, str]]:
        raise NotImplementedError("graphs hold their tensors")

    def quantization_config(self, artifact: Artifact, model: PreTrainedModel) -> dict[str, Any]:
        raise NotImplementedError("graphs need no description")

    def stored_weights(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        from gracec.backends.onnx import gates
        from gracec.backends.onnx.session import SessionConfig

        for file in SessionConfig.read(directory).graphs.values():
            yield from gates.stored_weights(directory / file)

    def write(self, artifact: Artifact, directory: Path) -> tuple[str, ...]:
        """Write graphs and session file, and run every gate on them.

        Args:
            directory: the folder of the graphs.

        Raises:
            GracecError: if the family has no serving graphs or a weight cannot be held.
            GateError: if what was written is not numerically what it should be.
        """
        # Imported where a graph is written: these packages take a second.
        from gracec.backends.onnx import gates, genai
        from gracec.backends.onnx.runner import OnnxModel
        from gracec.backends.onnx.session import (
            MINIMUM_RUNTIME,
            MINIMUM_RUNTIME_8_BITS,
            SessionConfig,
            session_options,
        )

        reason = self.refusal(artifact)
        if reason:
            raise GracecError(reason, where=f"format {self.name}", fix="choose another format")
        directory.mkdir(parents=True, exist_ok=True)
        model = model_of(artifact, torch.float32)
        serving, hashes = apply_codes(capture_serving(model), artifact.weights)
        figures: dict[str, Any] = {"equal_code_hashes": hashes}
        dense = dense_model(artifact, torch.float32, rounded=False)
        training = family_of(model).traced(dense)
        figures["composed_equals_training"] = composed_equals_training(serving, training, model)
        del dense, training

        files: dict[str, list[Path]] = {}
        kernels: dict[str, int] = {}
        emitted: dict[str, LoweredWeight] = {}
        notes: list[str] = []
        shared = not genai.refusal(artifact)
        for name, graph in serving.items():
            files[name], own, fused = self._write_graph(name, graph, directory, shared)
            notes += [f"onnx: {note}" for note in fused]
            path = files[name][0]
            gates.file_is_valid(path)
            planned = Counter(weight.kernel for weight in own.values())
            kernels[name] = gates.kernels_in_session(path, self.ops, self.mode, planned)
            if gates.stored_weights_are_exact(path, artifact.weights) != len(own):
                raise GateError(f"not all of {len(own)} quantized weights read back", where=name)
            emitted |= own
        counts = Counter(weight.kernel for weight in emitted.values())
        figures["int4_kernels"] = counts[kernel.MATMUL_NBITS]
        if counts[kernel.MATMUL_INT8]:
            figures["int8_kernels"] = counts[kernel.MATMUL_INT8]
        figures["matmul_error"] = gates.matmul_error(emitted, self.ops, self.mode)
        wide = self.ops == "qdq" and any(weight.bits == 8 for weight in emitted.values())
        wide |= any(any(graph.program.nodes(QUANTIZE_DEQUANTIZE)) for graph in serving.values())
        session = SessionConfig(
            family=model.config.model_type,
            ops=self.ops,
            mode=self.mode,
            graphs={name: paths[0].name for name, paths in files.items()},
            sha256={path.name: file_sha256(path) for paths in files.values() for path in paths},
            kernels=kernels,
            options=session_options(self.ops, self.mode),
            gates=figures,
            minimum_runtime=MINIMUM_RUNTIME_8_BITS if wide else MINIMUM_RUNTIME,
        )
        session.write(directory)
        if shared:
            graphs = {name: paths[0] for name, paths in files.items()}
            genai.write_headers(model, graphs, session.options)
        # Which number of threads is fastest is not asked here, so none is tried.
        runner = OnnxModel(directory, model.config, threads=torch.get_num_threads())
        figures |= self._run(runner, serving, model, artifact)
        session.write(directory)
        return (*notes, f"onnx: {_summary(figures)}", *genai.notes(artifact))

    def finish(self, artifact: Artifact, directory: Path) -> None:
        """Complete the top level: what transformers.js and onnxruntime-genai look for there."""
        from gracec.backends.onnx import genai
        from gracec.backends.onnx.session import session_options

        if artifact.processor is not None:
            write_processor(artifact.processor, directory)
        path = directory / "config.json"
        fields = json.loads(path.read_text(encoding="utf-8"))
        folder = directory / self.folder
        external = sorted(file.name.removesuffix("_data") for file in folder.glob("*.onnx_data"))
        dtypes = {
            stem: next(
                (d for d in ("q4", "int8") if (folder / f"{stem}_{d}.onnx").is_file()), "fp32"
            )
            for stem in FILES.values()
        }
        fields["transformers.js_config"] = {
            "dtype": dtypes,
            "use_external_data_format": dict.fromkeys(external, 1),
        }
        text_config = artifact.config.get_text_config()
        for field in families()[artifact.config.model_type].serving_config:
            fields[field] = getattr(text_config, field)
        text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        if not genai.refusal(artifact):
            genai.write_config(artifact, directory, session_options(self.ops, self.mode))

    def _write_graph(
        self, name: str, graph: ServingProgram, directory: Path, shared: bool
    ) -> tuple[list[Path], dict[str, LoweredWeight], list[str]]:
        """Lower and write one graph; its files, the weights that run on integer kernels, and what
        was fused."""
        from gracec.backends.onnx import graphs

        frozen = frozen_weights(graph.program)
        passes: list[Pass] = [LowerQdq(self.ops, self.mode, strict=True)] if frozen else []
        if name == DECODER:
            passes.append(FuseDecoder())
        result = run_passes(graph.program, passes)
        program = result.program
        notes = [note for note in result.notes if note.startswith(FuseDecoder.name)]
        lowered = lowered_weights(program)
        if lowered.keys() != frozen.keys():
            raise GateError(f"{len(lowered)} of {len(frozen)} weights are lowered", where=name)
        kinds = {weight.kernel for weight in lowered.values()}
        suffix = "_int8" if kinds == {kernel.MATMUL_INT8} else "_q4" if kinds else ""
        path = directory / f"{FILES[name]}{suffix}.onnx"
        model = graphs.to_onnx(replace(graph, program=program), name)
        return graphs.write_model(model, path, external=shared), lowered, notes

    def _run(
        self, found: Any, serving: Serving, model: PreTrainedModel, artifact: Artifact
    ) -> dict[str, Any]:
        """Gates on the graphs as they run: logits and greedy tokens beside the frozen graphs."""
        from gracec.backends.onnx import gates

        family = family_of(model)
        batch = family.example_batch(model)
        inputs = family.prepare(model, batch)
        mask = inputs["attention_mask"]
        reference = ServingRuntime(serving, model.config)
        with torch.no_grad():
            expected = prompt_logits(reference, inputs)
            agreement = logit_agreement(expected, prompt_logits(found, inputs), mask)
            dense: Any = dense_model(artifact, torch.bfloat16)
            logits = dense(**family.model_inputs(dense, batch), use_cache=False).logits
        beside = logit_agreement(expected, logits, mask)
        if self.mode == "faithful":
            lowered_is_as_good_as_dense(agreement, beside)
        else:
            gates.rounding_is_small(agreement)
        tokens = gates.token_agreement(reference, found, inputs, GATE_TOKENS)
        if self.mode == "faithful" and tokens.different:
            raise GateError(f"{tokens.different} greedy answers differ from those of the codes")
        return {
            "logits": asdict(agreement),
            "logits_dense_bfloat16": asdict(beside),
            "greedy": asdict(tokens),
        }


def model_of(artifact: Artifact, dtype: torch.dtype) -> PreTrainedModel:
    """The model of an artifact, with stand-ins without memory for the quantized weights."""
    config = copy.deepcopy(artifact.config)
    for part in configurations(config):
        part.dtype = dtype
    model = empty_model(config)
    attach_adapters(model, artifact.adapters, artifact.others)
    buffers = dict(model.named_buffers())  # rotary frequencies stay in float32
    for name, tensor in artifact.others.items():
        set_tensor(model, name, tensor if name in buffers else _to(tensor, dtype))
    for fqn, weight in artifact.weights.items():
        set_tensor(model, fqn, stand_in(weight.shape, dtype))
    model.tie_weights()
    model.requires_grad_(False)
    model.eval()
    return model


def dense_model(artifact: Artifact, dtype: torch.dtype, *, rounded: bool = True) -> PreTrainedModel:
    """The same, but each quantized layer has its weight, codes times scales, while it runs.

    Args:
        rounded: let linears put their inputs on the grids that the artifact has for them.
    """
    model = model_of(artifact, dtype)
    fill_while_running(
        model,
        artifact.weights,
        lambda fqn: artifact.weights[fqn].dequantize(dtype),
        lambda fqn: stand_in(artifact.weights[fqn].shape, dtype),
    )
    grids = {fqn: weight.activation for fqn, weight in artifact.weights.items() if rounded}
    quantize_inputs(model, {fqn: grid for fqn, grid in grids.items() if grid is not None})
    return model


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _summary(figures: Mapping[str, Any]) -> str:
    logits, dense, greedy = (
        figures[name] for name in ("logits", "logits_dense_bfloat16", "greedy")
    )
    int8 = figures.get("int8_kernels", 0)
    return (
        f"{figures['int4_kernels']} matmuls on INT4 kernels, "
        f"{f'{int8} on INT8 kernels, ' if int8 else ''}"
        f"KL {logits['kl']:.2g} (dense bfloat16 {dense['kl']:.2g}), "
        f"{greedy['same']} greedy answers the same, {greedy['ambiguous']} ambiguous, "
        f"{greedy['different']} different"
    )
