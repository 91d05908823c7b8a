from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gracec import ir
from gracec.capture import capture
from gracec.errors import PassError
from gracec.ir.program import Program
from gracec.passes import PassResult, parse_pipeline, run_passes
from gracec.passes.apply_codes import ApplyCodes
from gracec.passes.freeze import Freeze, frozen_weights, with_codes
from gracec.passes.insert_fake_quant import fake_quantized
from gracec.passes.plan_quantization import plan_of
from gracec.quant.frozen import FrozenWeight, code_hash
from tests.goldens import ONE_BLOCK
from tests.signed import fake_quantized_by_halves
from tests.tiny import tiny_batch, tiny_llava

Golden = Callable[..., None]
After = Callable[[str], Program]
FAKE = "analyze-modality,plan-quantization,insert-fake-quant"
PIPELINE = f"{FAKE},freeze"


def test_golden(after_block: After, golden: Golden) -> None:
    text = ir.diff(after_block(FAKE), after_block(PIPELINE)) + "\n"
    golden("freeze/llava.txt", text, made_by=Freeze(), after=FAKE, model=ONE_BLOCK)


def test_frozen_equals_fake_quantized_bit_for_bit(after: After, batch: dict[str, Tensor]) -> None:
    assert torch.equal(after(PIPELINE)(**batch)[0], after(FAKE)(**batch)[0])


def test_negative_scales_are_frozen_with_their_codes(
    after: After, batch: dict[str, Tensor]
) -> None:
    fake = fake_quantized_by_halves(after("analyze-modality"))
    scales = {one.fqn: one.scales for one in fake_quantized(fake)}
    frozen = Freeze().run(fake).program
    assert torch.equal(frozen(**batch)[0], fake(**batch)[0])
    weights = frozen_weights(frozen)
    assert weights.keys() == scales.keys()
    for fqn, weight in weights.items():
        assert weight.spec.signed and torch.equal(weight.scales, scales[fqn])
        assert (weight.scales < 0).sum() == weight.scales.numel() // 2
    assert not [name for name in frozen.fqns if "scale_sign" in name]
    again = ApplyCodes(weights).run(after("")).program
    assert torch.equal(again(**batch)[0], frozen(**batch)[0])
    for fqn, weight in frozen_weights(again).items():
        assert code_hash(weight) == code_hash(weights[fqn])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_and_in_16_bit(dtype: torch.dtype) -> None:
    model = tiny_llava(dtype=dtype)
    fake = run_passes(capture(model), parse_pipeline(FAKE)).program
    batch = tiny_batch(model)
    assert torch.equal(Freeze().run(fake).program(**batch)[0], fake(**batch)[0])


def test_idempotent(after: After) -> None:
    again = Freeze().run(after(PIPELINE))
    assert not again.modified


def test_it_needs_fake_quant(captured: Program) -> None:
    with pytest.raises(PassError, match="run insert-fake-quant first"):
        Freeze().run(captured)


def test_float_weights_leave_and_codes_stay(after: After) -> None:
    program = after(PIPELINE)
    weights = frozen_weights(program)
    assert set(weights) == set(plan_of(after(FAKE)).quantized)
    names = {name for names in program.fqns.values() for name in names}
    for fqn, weight in weights.items():
        assert fqn not in names
        assert f"{fqn}_scale" not in names
        assert weight.codes.dtype == torch.int8
        assert weight.codes.min() >= -8
        assert weight.codes.max() <= 7
    left = {f"model.{fqn}" for fqn in weights} & dict(
        program.graph_module.named_parameters()
    ).keys()
    assert not left


def test_the_fake_quantized_program_keeps_its_weights(
    after: After, batch: dict[str, Tensor]
) -> None:
    before = after(FAKE)(**batch)[0]
    Freeze().run(after(FAKE))
    assert torch.equal(after(FAKE)(**batch)[0], before)


def test_codes_of_others_take_the_place_of_fake_quantized_weights(
    after: After, batch: dict[str, Tensor]
) -> None:
    fqn, weight = next(iter(frozen_weights(after(PIPELINE)).items()))
    other = FrozenWeight.from_codes((-weight.codes).clamp(-8, 7), weight.scales, weight.spec)
    program = with_codes(after(FAKE), {fqn: other})
    found = frozen_weights(Freeze().run(program).program)
    expected = {**frozen_weights(after(PIPELINE)), fqn: other}
    assert {name: code_hash(one) for name, one in found.items()} == {
        name: code_hash(one) for name, one in expected.items()
    }
    assert fqn not in {name for names in program.fqns.values() for name in names}
    assert torch.equal(after(FAKE)(**batch)[0], after(PIPELINE)(**batch)[0])
    assert not torch.equal(program(**batch)[0], after(FAKE)(**batch)[0])


def test_a_weight_that_is_left_fake_quantized_is_an_error(
    after: After, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Freeze, "apply", lambda self, program: PassResult(program, False))
    with pytest.raises(PassError, match="freeze: a fake_quantize node is left"):
        Freeze().run(after(FAKE))
