"""ONNX graphs for ONNX Runtime, beside a Hugging Face configuration and processor.

    DIR/onnx/vision_encoder.onnx              pixels -> visual tokens
    DIR/onnx/embed_tokens.onnx                token ids -> embeddings
    DIR/onnx/decoder_model_merged_q4.onnx     embeddings and cache -> logits and longer cache
    DIR/onnx/fused_decoder.onnx               the same for gracec's runner, see `fused`
    DIR/onnx/NAME.onnx_data                   tensors of a large graph, or that are shared
    DIR/onnx/session.json                     how to run them, and the figures of the gates

The graphs compute in float32. Codes and scales are the canonical ones; everything else is widened
from the dtype of the model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from gracec.backends.base import Format
from gracec.backends.huggingface import write_json, write_processor
from gracec.backends.onnx.fused import FUSED
from gracec.capture import capture_serving, family_for, family_of
from gracec.capture.serving import (
    Serving,
    apply_codes,
    composed_equals_training,
)
from gracec.capture.serving_graph import DECODER, EMBEDDING, VISION
from gracec.errors import GateError, GracecError
from gracec.file_hashes import file_sha256, hashes_of, read_names
from gracec.frozen import Frozen, build, dense_twin
from gracec.kernels import onnxruntime as kernel
from gracec.kernels.onnxruntime import AUTO, FAITHFUL, FAST, MODES
from gracec.passes.freeze import QUANTIZE_DEQUANTIZE, frozen_weights
from gracec.passes.fuse_decoder import FuseDecoder
from gracec.passes.lower_qdq import LoweredWeight, LowerQdq
from gracec.passes.pipeline import parse_placed
from gracec.quant.frozen import by_matrix
from gracec.recipe import OnnxDeploy

if TYPE_CHECKING:  # these packages take a second, so they are imported where a graph is written
    from gracec.backends.onnx.runner import OnnxModel
    from gracec.backends.onnx.session import SessionConfig
    from gracec.backends.onnx.write import WrittenGraph

FILES = {VISION: "vision_encoder", EMBEDDING: "embed_tokens", DECODER: "decoder_model_merged"}
"""Name of a graph -> stem of its file, as transformers.js looks for it."""


@dataclass(frozen=True)
class Onnx(Format):
    """Options: `ops` (qdq or matmulnbits) and `mode` (auto, fast or faithful); "" is what the
    recipe of the model says, as for everything else.

    Attributes:
        accept: asks graphs in fast mode something that only the caller knows, where the mode is
            auto: why they are not taken, or "".
    """

    ops: str = ""
    mode: str = ""
    accept: Callable[[Any], str] | None = field(default=None, compare=False)

    name: ClassVar[str] = "onnx"
    folder: ClassVar[str] = "onnx"
    holds_activations: ClassVar[bool] = True
    holds_adapters: ClassVar[bool] = True
    passes: ClassVar[tuple[str, ...]] = (LowerQdq.name, FuseDecoder.name)

    def examined(self, accept: Callable[[Any], str]) -> Onnx:
        return replace(self, accept=accept)

    def options(self, frozen: Frozen) -> OnnxDeploy:
        """How the graphs of a model are written.

        Raises:
            GracecError: if there are no such operators, or no such mode.
        """
        given = {"ops": self.ops, "mode": self.mode}
        asked = {name: value for name, value in given.items() if value}
        options = frozen.onnx.model_copy(update=asked)
        kernel.check_options(options.ops, options.mode, MODES)
        return options

    def refusal(self, frozen: Frozen) -> str:
        self.options(frozen)
        if not frozen.weights:
            return "no weight is quantized"
        family = family_of(frozen.skeleton)
        if not family.serving:
            return f"the family {frozen.config.model_type!r} {family.serving_refusal}"
        reasons = ((fqn, kernel.refusal(weight)) for fqn, weight in frozen.weights.items())
        return next((f"{fqn}: {reason}" for fqn, reason in reasons if reason), "")

    def dtype(self, frozen: Frozen) -> torch.dtype:
        return torch.float32

    def stored_weights(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        from gracec.backends.onnx import gates
        from gracec.backends.onnx.session import SessionConfig

        for name, file in SessionConfig.read(directory).graphs.items():
            if name == FUSED:
                continue  # it has the tensors of the decoder, joined
            yield from gates.stored_weights(directory / file)

    def write(self, frozen: Frozen, directory: Path) -> tuple[str, ...]:
        """Write graphs and session file, and run every gate on them.

        Args:
            directory: the folder of the graphs.

        Raises:
            GracecError: if the family has no serving graphs or a weight cannot be held.
            GateError: if what was written is not numerically what it should be.
        """
        self.check(frozen)
        options = self.options(frozen)
        first = FAITHFUL if options.mode == AUTO else options.mode
        return replace(self, ops=options.ops, mode=first)._write(frozen, directory, options)

    def _write(self, frozen: Frozen, directory: Path, options: OnnxDeploy) -> tuple[str, ...]:
        """The same with operators and mode; where it is auto, in faithful mode first."""
        from gracec.backends.onnx import genai, session
        from gracec.backends.onnx.head import quantize_head
        from gracec.backends.onnx.mode import Expected, fast_if_as_good, hold_fused
        from gracec.backends.onnx.runner import OnnxModel

        directory.mkdir(parents=True, exist_ok=True)
        model = build(frozen, torch.float32)
        serving: Serving
        serving, hashes = apply_codes(capture_serving(model), frozen.weights)
        figures: dict[str, Any] = {"equal_code_hashes": hashes}
        dense = dense_twin(frozen, torch.float32, rounded=False)
        training = family_of(model).traced(dense)
        figures["composed_equals_training"] = composed_equals_training(serving, training, model)
        del dense, training
        expected = Expected(serving, model, frozen)
        head = quantize_head(serving, model, expected, options)
        serving = head.serving
        figures |= head.figures

        shared = not genai.refusal(frozen)
        written = self._write_graphs(frozen, serving, directory, shared)
        emitted = {fqn: one for graph in written.values() for fqn, one in graph.lowered.items()}
        figures |= self._kernel_figures(emitted)
        config = session.SessionConfig(
            family=model.config.model_type,
            ops=self.ops,
            mode=self.mode,
            graphs={name: graph.files[0].name for name, graph in written.items()},
            sha256={f.name: file_sha256(f) for graph in written.values() for f in graph.files},
            kernels={name: graph.kernels for name, graph in written.items()},
            options=session.session_options(self.ops, self.mode),
            gates={},
            minimum_runtime=self._minimum_runtime(serving, emitted),
        )
        if shared:
            graphs = {name: graph.files[0] for name, graph in written.items()}
            genai.write_headers(model, graphs, config.options)
        # Which number of threads is fastest is not asked here, so none is tried.
        threads = torch.get_num_threads()

        def opened(config: session.SessionConfig) -> OnnxModel:
            plain = GenerationConfig()  # greedy, and no token ends an answer
            return OnnxModel(directory, model.config, plain, session_config=config, threads=threads)

        trial = expected.measure(opened(config))
        expected.hold(trial, self.mode)
        found = {"matmul_error": figures.pop("matmul_error"), **trial.figures()}
        chosen: list[str] = []
        if options.mode == AUTO:
            fast = replace(self, mode=FAST)
            choice = fast_if_as_good(
                directory,
                config,
                found,
                expected,
                lambda: fast._kernel_figures(emitted)["matmul_error"],
                opened,
                self._accepted(frozen),
            )
            config, found = choice.config, dict(choice.figures)
            chosen.append(choice.note)
        figures |= {"logits_dense_bfloat16": asdict(expected.dense), **found}
        config, fused = self._fuse(config, frozen, serving, written[DECODER])
        if FUSED in config.graphs:
            runner = opened(config)
            figures[FUSED] = hold_fused(runner, serving, model, expected.dense, config.mode)
        config.model_copy(update={"gates": figures}).write(directory)
        told = (note for graph in written.values() for note in graph.notes)
        notes = (str(note) for note in told if note.source != LowerQdq.name)
        said = (*fused, _summary(figures), *head.notes, *chosen)
        return (*notes, *said, *genai.notes(frozen))

    def _accepted(self, frozen: Frozen) -> Callable[[Any], str] | None:
        """`accept`, of a model that ends its answers as the compiled one does."""
        if self.accept is None:
            return None
        accept, config = self.accept, frozen.generation_config

        def asked(model: Any) -> str:
            if config is not None:
                model.generation_config = config
            return accept(model)

        return asked

    def finish(self, frozen: Frozen, directory: Path) -> None:
        """Complete the top level: what transformers.js and onnxruntime-genai look for there."""
        from gracec.backends.onnx import genai
        from gracec.backends.onnx.session import SessionConfig

        if frozen.processor is not None:
            write_processor(frozen.processor, directory)
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
        text_config = frozen.config.get_text_config()
        for name in family_for(frozen.config).serving_config:
            fields[name] = getattr(text_config, name)
        write_json(fields, path)
        if not genai.refusal(frozen):
            genai.write_config(frozen, directory, SessionConfig.read(folder).options)

    def seal(self, directory: Path) -> None:
        """Say in `session.json` which configuration and processor the graphs are run with."""
        from gracec.backends.onnx.session import SessionConfig

        folder = directory / self.folder
        config = SessionConfig.read(folder)
        files = hashes_of(directory, read_names(directory))
        config.model_copy(update={"model_files": files}).write(folder)

    def _write_graphs(
        self, frozen: Frozen, serving: Serving, directory: Path, shared: bool
    ) -> dict[str, WrittenGraph]:
        from gracec.backends.onnx.fused.linears import place_together
        from gracec.backends.onnx.write import write_graph

        further = [parse_placed(text) for text in frozen.passes]
        written = {}
        for name, graph in serving.items():
            stem = FILES[name]

            def path(kinds: Set[str], stem: str = stem) -> Path:
                suffix = "_int8" if kinds == {kernel.MATMUL_INT8} else "_q4" if kinds else ""
                return directory / f"{stem}{suffix}.onnx"

            written[name] = write_graph(
                graph,
                name,
                path,
                ops=self.ops,
                mode=self.mode,
                strict=True,
                further=[FuseDecoder()] if name == DECODER else [],
                place=lambda pipeline: pipeline.placed(further)[0],
                external=shared or (name == DECODER and self.ops == "matmulnbits"),
                arrange=place_together,
            )
            frozen_here, lowered = frozen_weights(graph.program), written[name].lowered
            planned = {
                matrix for fqn, weight in frozen_here.items() for matrix in by_matrix(fqn, weight)
            }
            if lowered.keys() != planned:
                raise GateError(f"{len(lowered)} of {len(planned)} weights are lowered", where=name)
        return written

    def _fuse(
        self,
        config: SessionConfig,
        frozen: Frozen,
        serving: Serving,
        decoder: WrittenGraph,
    ) -> tuple[SessionConfig, list[str]]:
        """Write the decoder for gracec's own runner: the configuration with it, and what to say."""
        from gracec.backends.onnx.fused.decoder import write_fused

        if self.ops != "matmulnbits":
            return config, []
        planned = Counter(weight.kernel for weight in decoder.lowered.values())
        weights = frozen_weights(serving[DECODER].program)  # an added head among them
        try:
            fused = write_fused(decoder.files[0], frozen.config, weights, config.mode, planned)
        except GateError:
            raise
        except GracecError as error:
            return config, [f"no fused decoder: {error}"]
        file = fused.path.name
        changes = {
            "graphs": {**config.graphs, FUSED: file},
            "sha256": {**config.sha256, file: file_sha256(fused.path)},
            "kernels": {**config.kernels, FUSED: fused.kernels},
        }
        return config.model_copy(update=changes), [f"fused decoder: {fused.note}"]

    def _kernel_figures(self, emitted: Mapping[str, LoweredWeight]) -> dict[str, Any]:
        from gracec.backends.onnx import gates

        counts = Counter(weight.kernel for weight in emitted.values())
        figures: dict[str, Any] = {"int4_kernels": counts[kernel.MATMUL_NBITS]}
        if counts[kernel.MATMUL_INT8]:
            figures["int8_kernels"] = counts[kernel.MATMUL_INT8]
        figures["matmul_error"] = gates.matmul_error(emitted, self.ops, self.mode)
        return figures

    def _minimum_runtime(self, serving: Serving, emitted: Mapping[str, LoweredWeight]) -> str:
        from gracec.backends.onnx import session

        wide = self.ops == "qdq" and any(weight.bits == 8 for weight in emitted.values())
        wide |= any(any(graph.program.nodes(QUANTIZE_DEQUANTIZE)) for graph in serving.values())
        return session.MINIMUM_RUNTIME_8_BITS if wide else session.MINIMUM_RUNTIME


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
