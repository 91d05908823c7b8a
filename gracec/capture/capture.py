"""Capture a model with torch.export, and prove that the graph computes what the model computes."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from gracec.capture.canonical import (
    compute_into_a_new_tensor,
    drop_casts_that_change_nothing,
    mark_adapters,
    normalised_fqns,
    write_no_padding_as_a_number,
)
from gracec.capture.culprit import culprit
from gracec.capture.eager import as_reference, eager_logits, no_fast_path
from gracec.capture.families import GENERIC, Family, family_of
from gracec.errors import GateError, GracecError
from gracec.ir.program import Program, drop_assertions
from gracec.models.experts import GROUPED, expert_modules, experts_computed
from gracec.models.lora import adapters_of

# (batch, images, text tokens): batch 1, several images in one prompt, and left padding among them.
GATE_SHAPES = ((1, 1, 5), (3, 3, 9), (2, 4, 6))


def capture(model: PreTrainedModel, batch: Mapping[str, Tensor] | None = None) -> Program:
    """Capture a vision-language model as one graph from ids and pixels to logits [B, T, V].

    The graph shares its parameters with the model, and the dtype and device of the model are baked
    into it. Batch size, text length and number of images stay dynamic.

    Args:
        model: a Hugging Face vision-language model; it is put into eval mode for the trace.
        batch: what the processor returned for some prompts; built from the config when missing.

    Raises:
        GracecError: if it is none, or torch.export cannot trace it.
    """
    family = family_of(model)
    inputs = family.prepare(model, batch or family.example_batch(model))
    try:
        program = trace(model, family.traced(model), inputs, family.dynamic_shapes(), ("logits",))
    except GracecError as error:
        if family is not GENERIC:
            raise
        refusal = GENERIC.refusal(model, error.what)
        raise GracecError(refusal.what, where=error.where, fix=refusal.fix) from error
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    return replace(program, decoder_layers=layers)


def trace(
    model: nn.Module,
    module: nn.Module,
    inputs: Mapping[str, Tensor | list[Tensor]],
    dynamic_shapes: Mapping[str, Any],
    output_names: tuple[str, ...],
) -> Program:
    """Export a module that wraps a model, in eval mode and without guards.

    Args:
        module: holds the model as its only child, named `model`; or the model itself.
        inputs: its arguments; those that are lists become one input an item, `name_0` and so on.
        dynamic_shapes: as `torch.export.export` takes them, by the names of the arguments.

    Raises:
        GracecError: if torch.export cannot trace the module.
    """
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            _data_dependent_checks_off(),
            _no_graph_dump(),
            _quick_trace(),
            experts_computed(model, GROUPED),
            no_fast_path(),
        ):
            exported = torch.export.export(
                module,
                (),
                kwargs=dict(inputs),
                dynamic_shapes=dict(dynamic_shapes),
                strict=False,
            )
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise GracecError(
            f"torch.export cannot trace the model: {type(error).__name__}: {first_line}",
            where=culprit(error, model),
            fix="see `gracec doctor`",
        ) from error
    finally:
        model.train(was_training)
    graph_module = exported.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    drop_assertions(graph_module)
    drop_casts_that_change_nothing(graph_module)
    write_no_padding_as_a_number(graph_module)
    compute_into_a_new_tensor(graph_module)
    prefix = "" if module is model else "model."
    mark_adapters(graph_module, {f"{prefix}{name}" for name in adapters_of(model)})
    floating = next(p for p in model.parameters() if p.is_floating_point())
    program = Program(
        graph_module=graph_module,
        example_inputs=_flat(inputs),
        dynamic_shapes=_flat(dynamic_shapes),
        output_names=output_names,
        family=getattr(getattr(model, "config", None), "model_type", type(model).__name__),
        fqns=normalised_fqns(graph_module, model, prefix),
        dtype=floating.dtype,
        device=floating.device,
    )
    if any(isinstance(value, list) for value in inputs.values()):
        program.set_signature()
        return program.copy()  # without torch.export's check of the arguments as they were
    return program


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Items of a list under the names that torch.export gives to their inputs."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{name}_{number}": item for number, item in enumerate(value)}
        else:
            flat[name] = value
    return flat


def captured_equals_eager(
    program: Program,
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]] | None = None,
) -> int:
    """Gate: the graph's logits equal the model's, bit for bit, on every batch.

    See `run_both` for what the model is where its decoder has routed experts.

    Args:
        batches: processor outputs; by default three shapes built from the config, batch 1, several
            images in one prompt and left padding among them.

    Returns:
        The number of batches compared.

    Raises:
        GateError: with the shape and the largest difference of the first batch that differs.
    """
    family = family_of(model)
    batches = batches or list(gate_batches(family, model))
    for batch in batches:
        inputs = family.prepare(model, batch)

        def run(
            inputs: Mapping[str, Tensor] = inputs, batch: Mapping[str, Tensor] = batch
        ) -> list[tuple[Tensor, Tensor]]:
            return [(eager_logits(model, batch), program(**inputs)[0])]

        ((expected, logits),) = run_both(model, run)
        if not torch.equal(expected, logits):
            difference = (expected.double() - logits.double()).abs().max().item()
            shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
            raise GateError(
                f"captured graph and eager model differ by {difference:.3g} at {shapes}",
                where=type(model).__name__,
                fix="the capture is wrong for this model; see `gracec doctor`",
            )
    return len(batches)


def run_both(
    model: PreTrainedModel, run: Callable[[], list[tuple[Tensor, Tensor]]]
) -> list[tuple[Tensor, Tensor]]:
    """What a model and its graph compute, in pairs that should be equal.

    Routed experts are computed by the loop of transformers, which every model of it has, and not by
    the kernel that it may prefer, which rounds otherwise: in bfloat16 by a hundredth of the logits.
    The graph has the tokens of all experts in one tensor where the loop has one for each expert.
    Several threads cut them at other places, and an elementwise operator may round the last number
    before a cut otherwise than one in the middle; so what differs runs again on a single thread.

    Args:
        run: what is computed with the model, and what is with the graph.
    """
    with as_reference(model), _one_attention(model.device):
        pairs = run()
        threads = torch.get_num_threads()
        same = all(one.shape == other.shape and torch.equal(one, other) for one, other in pairs)
        if same or threads == 1 or not expert_modules(model):
            return pairs
        torch.set_num_threads(1)
        try:
            return run()
        finally:
            torch.set_num_threads(threads)


def _one_attention(device: torch.device) -> AbstractContextManager[object]:
    """The same kernel for attention in a model as in its graph.

    Without padding transformers drops its mask and asks for `is_causal`, where the graph keeps it.
    On an accelerator these are different kernels, unless it is the one that takes all.
    """
    return nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)


def gate_batches(family: Family, model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """What a capture is held to, built from the configuration."""
    for batch, images, text in GATE_SHAPES:
        yield family.example_batch(model, batch=batch, images=images, text=text)


@contextmanager
def _data_dependent_checks_off() -> Iterator[None]:
    """transformers checks token counts inside forward, which no trace can; `prepare` does it."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _quick_trace() -> Iterator[None]:
    """A quarter less time for a deep model, measured with torch 2.13.

    A cache of fake tensors compares symbolic sizes, which costs more than it saves; and the garbage
    collector walks again and again through what a trace keeps anyway.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def _no_graph_dump() -> Iterator[None]:
    """When it fails, torch prints all of the graph it has so far; the error says what is wrong."""
    printed = io.StringIO()
    with redirect_stderr(printed):
        yield
    sys.stderr.write(printed.getvalue())
