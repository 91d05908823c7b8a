from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gracec import ir
from gracec.capture import capture
from gracec.errors import PassError
from gracec.ir.program import Program
from gracec.passes import PassResult, parse_pipeline, run_passes
from gracec.passes.hoist_fake_quant import HoistFakeQuant, quantized_weights
from tests.goldens import ONE_BLOCK
from tests.tiny_experts import tiny_experts

Golden = Callable[..., None]
After = Callable[[str], Program]
FAKE = "analyze-modality,plan-quantization,insert-fake-quant"
SCALES = f"{FAKE},free-scales"


@pytest.mark.parametrize(("before", "name"), [(FAKE, "llava"), (SCALES, "llava-scales")])
def test_golden(before: str, name: str, after_block: After, golden: Golden) -> None:
    hoisted = HoistFakeQuant().run(after_block(before)).program
    text = ir.diff(after_block(before), hoisted) + "\n"
    golden(
        f"hoist-fake-quant/{name}.txt",
        text,
        made_by=HoistFakeQuant(),
        after=before,
        model=ONE_BLOCK,
    )


@pytest.mark.parametrize("before", [FAKE, SCALES])
def test_every_bit_is_the_same_and_the_graph_quantizes_nothing(
    before: str, after: After, batch: dict[str, Tensor]
) -> None:
    hoisted = HoistFakeQuant().run(after(before)).program
    assert torch.equal(hoisted(**batch)[0], after(before)(**batch)[0])
    assert not quantized_weights(hoisted)
    for target, (node, *_) in quantized_weights(after(before)).items():
        held = hoisted.tensor(target)
        assert isinstance(held, nn.Parameter)
        assert held.shape == node.meta["val"].shape
        weight = hoisted.fqn(target).removesuffix("_quantized")
        names = {name for names in hoisted.fqns.values() for name in names}
        # The embedding is tied to the head, and is read as it is.
        tied = weight == "model.language_model.embed_tokens.weight"
        assert (weight in names) == (tied and before == FAKE) or weight.endswith("lm_head.weight")
        assert f"{weight}_scale" not in names


def test_experts_are_one_matrix_and_nothing_of_the_model_is_left_behind() -> None:
    model = tiny_experts("llava_mixtral")
    fake = run_passes(capture(model), parse_pipeline(FAKE)).program
    hoisted = HoistFakeQuant().run(fake).program
    inputs = fake.example_inputs
    assert torch.equal(hoisted(**inputs)[0], fake(**inputs)[0])
    held = [hoisted.tensor(target) for target in quantized_weights(fake)]
    assert held and all(tensor.dim() == 2 for tensor in held)
    read = {str(node.target) for node in hoisted.graph.find_nodes(op="get_attr")}
    assert read == hoisted.fqns.keys()


def test_a_graph_without_fake_quantization_is_refused(captured: Program) -> None:
    with pytest.raises(PassError, match="hoist-fake-quant: nothing is fake-quantized"):
        HoistFakeQuant().run(captured)


def test_what_it_promises_is_checked(after: After, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HoistFakeQuant, "apply", lambda self, program: PassResult(program, False))
    with pytest.raises(PassError, match="a weight is still quantized in the graph"):
        HoistFakeQuant().run(after(FAKE))
