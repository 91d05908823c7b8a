"""protect-fragile: keep the precision of weights that few codes would describe badly.

plan(w) = spec  ->  kept, with the reason      if SNR(w, codes(w) * scales(w)) < floor
"""

from dataclasses import dataclass
from typing import ClassVar

from gracec.ir.program import Program, annotate, annotation
from gracec.ir.queries import weight_of
from gracec.passes import Pass, PassResult
from gracec.passes.insert_fake_quant import FAKE_QUANTIZE
from gracec.passes.plan_quantization import plan_of
from gracec.quant import QuantSpec, dequantize, quantize, signal_to_noise_db
from gracec.quant.observers import weight_scales


@dataclass(frozen=True)
class ProtectFragile(Pass):
    """Options: `floor`, the lowest signal to noise ratio, in decibels, that a weight may have."""

    floor: float = 18.0
    name: ClassVar[str] = "protect-fragile"
    keeps_numerics: ClassVar[bool] = True

    def requires(self, program: Program) -> None:
        if not plan_of(program).quantized:
            raise self.refuse("no weight has a plan", fix="run plan-quantization first")
        if any(program.nodes(FAKE_QUANTIZE)):
            raise self.refuse("the plan is carried out", fix="run it before insert-fake-quant")

    def apply(self, program: Program) -> PassResult:
        planned = [node for node in program.graph.nodes if "quant" in annotation(node)]
        reasons: dict[int, str] = {}
        for node in planned:
            parameter = weight_of(node)
            assert parameter is not None
            target = str(parameter.target)
            weight = program.tensor(target).detach()
            spec = QuantSpec(**annotation(node)["quant"])
            group = spec.group_of(weight.shape[1])
            scales = weight_scales(weight, spec)
            codes = quantize(weight, scales, spec.bits, group)
            found = signal_to_noise_db(weight, dequantize(codes, scales, group))
            if found < self.floor:
                reason = f"fragile: {program.fqn(target)} has {found:.1f} dB as {spec}"
                reasons.setdefault(annotation(node)["fused_set"], reason)
        for node in planned:
            if kept := reasons.get(annotation(node)["fused_set"]):
                annotate(node, kept=kept, quant=None, act=None, weight_observer=None)
        return PassResult(program, bool(reasons), tuple(reasons.values()))

    def ensures(self, before: Program, after: Program) -> None:
        if not plan_of(after).quantized:
            raise self.refuse("nothing is left to quantize", fix="lower the floor")
