from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

import gracec
from gracec import gates
from gracec.capture import family_of
from gracec.errors import GateError
from gracec.ir.program import Program
from gracec.passes.freeze import frozen_weights
from gracec.passes.lower_torchao import lowered_weights

After = Callable[[str], Program]
FAKE = "analyze-modality,plan-quantization,insert-fake-quant"
FROZEN = f"{FAKE},freeze"
LOWERED = f"{FROZEN},lower-torchao"
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj.weight"


def test_the_kernels_of_a_device_may_round_and_nothing_more(
    captured: Program, llava: LlavaForConditionalGeneration
) -> None:
    assert gates.default_kernels_agree(captured, llava) == 0  # the CPU has the same for both
    other = captured.copy()
    name = "model.model.language_model.layers.0.self_attn.q_proj.weight"
    other.set_tensor(name, nn.Parameter(captured.tensor(name) * 1.0001))
    assert 0 < gates.default_kernels_agree(other, llava) < 1e-3
    other.set_tensor(name, nn.Parameter(captured.tensor(name) * 1.1))
    with pytest.raises(GateError, match="the logits differ from those of the model by"):
        gates.default_kernels_agree(other, llava)


def test_frozen_gate_catches_one_changed_code(after: After, batch: dict[str, Tensor]) -> None:
    expected = after(FAKE)(**batch)
    gates.frozen_equals_fake_quantized(expected, after(FROZEN), batch)
    broken = after(FROZEN).copy()
    codes = broken.tensor(f"model.{Q_PROJ}_codes").clone()
    codes[0, 0] ^= 1  # the lowest bit of one code
    broken.set_tensor(f"model.{Q_PROJ}_codes", codes)
    with pytest.raises(GateError, match="frozen and fake-quantized logits differ"):
        gates.frozen_equals_fake_quantized(expected, broken, batch)


def test_matmul_gate_catches_codes_of_another_weight(after: After) -> None:
    packed, weights = lowered_weights(after(LOWERED)), frozen_weights(after(FROZEN))
    assert gates.matmul_error(packed, weights) < 1e-5
    other = Q_PROJ.replace("layers.0", "layers.1")
    with pytest.raises(GateError, match=r"layers\.0\.self_attn\.q_proj.*INT4 matmul is off"):
        gates.matmul_error(packed, {**weights, Q_PROJ: weights[other]})


def test_kernel_gate_catches_a_float_weight_under_a_quantized_name(
    after: After, batch: dict[str, Tensor]
) -> None:
    assert gates.int4_kernels_run(after(LOWERED), batch) == 14
    swapped = after(LOWERED).copy()
    dense = frozen_weights(after(FROZEN))[Q_PROJ].dequantize()
    swapped.set_tensor(f"model.{Q_PROJ}", nn.Parameter(dense))
    with pytest.raises(GateError, match="13 INT4 kernels ran in the lowered graph, 14 are planned"):
        gates.int4_kernels_run(swapped, batch)


def test_kernel_gate_catches_a_float_weight_in_the_generating_model(
    llava: LlavaForConditionalGeneration, batch: dict[str, Tensor]
) -> None:
    compiled = gracec.compile(llava)
    inputs = {
        name: tensor.bfloat16() if name == "pixel_values" else tensor
        for name, tensor in batch.items()
    }
    prepared = family_of(compiled.model).prepare(compiled.model, inputs)
    assert gates.int4_kernels_run(compiled.program, prepared, compiled.model) == 14
    dense = nn.Parameter(compiled.weights[Q_PROJ].dequantize(torch.bfloat16))
    compiled.model.model.language_model.layers[0].self_attn.q_proj.weight = dense
    with pytest.raises(GateError, match="13 weights ran on INT4 kernels in the generating"):
        gates.int4_kernels_run(compiled.program, prepared, compiled.model)


def test_logit_agreement_by_hand() -> None:
    reference = torch.tensor([[[2.0, 0.0], [0.001, 0.0], [5.0, 0.0]]])
    found = torch.tensor([[[2.0, 0.0], [0.0, 0.001], [0.0, 5.0]]])
    mask = torch.tensor([[1, 1, 0]])
    agreement = gates.logit_agreement(reference, found, mask)
    assert agreement.top1 == 0.5  # the second flipped, the third is padding
    assert agreement.top1_clear == 0.5  # of two tokens, one wins by the whole spread: no tie
    p = torch.softmax(reference[0, 1].double(), -1)
    q = torch.softmax(found[0, 1].double(), -1)
    assert agreement.kl == pytest.approx(float((p * (p / q).log()).sum()) / 2)


def test_a_flipped_near_tie_counts_only_in_the_plain_figure() -> None:
    reference = torch.tensor([[[3.0, 0.0, -5.0], [0.01, 0.0, -5.0]]])
    found = torch.tensor([[[3.0, 0.0, -5.0], [0.0, 0.01, -5.0]]])
    agreement = gates.logit_agreement(reference, found, torch.ones(1, 2))
    assert agreement.top1 == 0.5
    assert agreement.top1_clear == 1.0


def test_lowered_logits_may_not_be_worse_than_dense_ones() -> None:
    good = gates.LogitAgreement(kl=1e-3, top1=1.0, top1_clear=1.0)
    bad = gates.LogitAgreement(kl=1e-1, top1=0.9, top1_clear=0.95)
    gates.lowered_is_as_good_as_dense(good, good)
    with pytest.raises(GateError, match="off by KL 0.1"):
        gates.lowered_is_as_good_as_dense(bad, good)
    both = gates.LogitAgreement(kl=0.31, top1=0.9, top1_clear=0.95)  # made by one faulty hand
    with pytest.raises(GateError, match="dense weights with the values of the codes are off"):
        gates.lowered_is_as_good_as_dense(both, both)


def test_a_16_bit_reference_is_allowed_its_own_noise() -> None:
    equal = gates.LogitAgreement(kl=0.0, top1=1.0, top1_clear=1.0)
    close = gates.LogitAgreement(kl=2e-4, top1=1.0, top1_clear=1.0)
    far = gates.LogitAgreement(kl=2e-2, top1=1.0, top1_clear=1.0)
    gates.lowered_is_as_good_as_dense(close, equal, torch.bfloat16)
    with pytest.raises(GateError):
        gates.lowered_is_as_good_as_dense(close, equal)
    with pytest.raises(GateError):
        gates.lowered_is_as_good_as_dense(far, equal, torch.bfloat16)
