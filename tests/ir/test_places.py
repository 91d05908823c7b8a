"""The places of matmuls, found by dataflow, beside the names that transformers gives modules."""

from functools import partial

import pytest

from gracec.capture import capture
from gracec.ir.places import block_count, places_of
from gracec.ir.program import Program
from gracec.ir.queries import weight_of
from gracec.passes import parse_pipeline, run_passes
from gracec.selectors import Place
from tests.tiny_experts import tiny_experts
from tests.tiny_families import tiny_model

ROLES = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "out",
    "self_attn.out_proj": "out",
    "attn.qkv": "qkv",
    "attn.proj": "out",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
    "experts.gate_up_proj": "up",
    "experts.down_proj": "down",
    "mlp.gate": "",
    "conv.in_proj": "",
    "conv.out_proj": "out",
    "feed_forward.w1": "gate",
    "feed_forward.w3": "up",
    "feed_forward.w2": "down",
    "linear_attn.in_proj_qkv": "qkv",
    "linear_attn.out_proj": "out",
}
MODELS = {
    "llava": partial(tiny_model, "llava"),
    "qwen2_vl": partial(tiny_model, "qwen2_vl"),
    "experts": partial(tiny_experts, "llava_mixtral"),
    "lfm2_vl": partial(tiny_model, "lfm2_vl"),
    "qwen3_5": partial(tiny_model, "qwen3_5"),
}
SLOW = ("qwen3_5",)


def named(program: Program) -> dict[str, Place]:
    """FQN without "weight" -> place."""
    weights = {node: weight_of(node) for node in places_of(program)}
    fqns = {node: program.fqn(str(one.target)) for node, one in weights.items() if one is not None}
    return {fqns[n].removesuffix(".weight"): place for n, place in places_of(program).items()}


@pytest.mark.parametrize(
    "kind", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in MODELS]
)
def test_they_are_what_the_names_of_modules_say(kind: str) -> None:
    program = run_passes(capture(MODELS[kind]()), parse_pipeline("analyze-modality")).program
    found, seen = named(program), set[str]()
    for fqn, place in found.items():
        last = ".".join(fqn.split(".")[-2:])
        if last in ROLES:
            assert place.role == ROLES[last], fqn
            seen.add(place.role)
        *_, number = (part for part in f"0.{fqn}".split(".") if part.isdigit())
        in_block = place.part == "decoder"
        assert place.block == (int(number) if in_block else None), fqn
    assert {"q", "k", "v", "out", "up", "down"} <= seen
    assert block_count(program) == 1 + max(p.block for p in found.values() if p.block is not None)
