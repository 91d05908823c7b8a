"""A graph in blocks computes the same bits, and holds each parameter once."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.capture import capture
from gracec.errors import GracecError
from gracec.ir.program import Program
from gracec.passes import parse_pipeline, run_passes
from gracec.training.blocks import blocks_of, by_path, in_blocks
from tests.tiny import tiny_llava
from tests.tiny_experts import tiny_experts
from tests.tiny_families import tiny_model

PIPELINE = "analyze-modality,plan-quantization,insert-fake-quant{candidates=2},hoist-fake-quant,"
TAPS = "insert-taps,select-supervised"


def model_of(kind: str) -> PreTrainedModel:
    if kind == "tied":
        return tiny_llava(tie=True)
    return tiny_experts("llava_mixtral") if kind == "experts" else tiny_model(kind)


def gradients(module: torch.nn.Module, program: Program) -> tuple[list[Tensor], dict[str, Tensor]]:
    for parameter in module.parameters():
        parameter.grad = None
    outputs = list(module(**program.example_inputs))
    torch.stack([one.float().square().mean() for one in outputs]).sum().backward()
    found = {name: p.grad for name, p in by_path(module).items() if p.grad is not None}
    return outputs, found


@pytest.mark.parametrize(
    ("kind", "checkpointed"),
    [("tied", False), ("tied", True), ("qwen3_vl", True), ("gemma3", False), ("experts", False)],
)
def test_the_same_bits_of_outputs_and_gradients(kind: str, checkpointed: bool) -> None:
    program = run_passes(capture(model_of(kind)), parse_pipeline(PIPELINE + TAPS)).program
    for parameter in program.graph_module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    expected, by_graph = gradients(program.graph_module, program)
    module = in_blocks(program, checkpointed=checkpointed)
    found, by_blocks = gradients(module, program)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert by_blocks.keys() == by_graph.keys()
    assert all(torch.equal(grad, by_graph[name]) for name, grad in by_blocks.items())

    blocks = list(blocks_of(module))
    assert len(blocks) == program.decoder_layers
    inside = [id(one) for block in blocks for one in block.parameters()]
    assert len(set(inside)) == len(inside), "a parameter is in two blocks"
    quantized = [name for name in by_path(module) if name.endswith("proj.weight_quantized")]
    held = {id(by_path(module)[name]) for name in quantized if "language_model" in name}
    assert held and held <= set(inside)
    assert all(one is program.tensor(name) for name, one in by_path(module).items())


def test_what_is_checkpointed_keeps_less_for_backward() -> None:
    program = run_passes(capture(tiny_model("llava")), parse_pipeline(PIPELINE + TAPS)).program
    kept = []
    for checkpointed in (False, True):
        bytes_kept = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            in_blocks(program, checkpointed=checkpointed)(**program.example_inputs)
        kept.append(bytes_kept)
    assert kept[1] < kept[0]


def test_without_a_known_block_it_refuses() -> None:
    with pytest.raises(GracecError, match="no decoder block is known; run analyze-modality first"):
        in_blocks(capture(tiny_llava()))
