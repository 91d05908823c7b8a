"""Canonical text of a program: equal graphs print equal text, on every machine.

    %linear_14 = aten.linear(%mul_9, @model.language_model.layers.0.mlp.up_proj.weight:f32[128, 64])
        : f32[s0, s1, 128]  {fused quant=int4/g64 fused_set=11 part=decoder}

One line a node (wrapped here). `%name` is a value, named by its op and numbered per op, so that an
inserted node renames no other; `@name` is a parameter or buffer by its state-dict name, with dtype
and shape; symbolic sizes are renamed s0, s1, ... in the order in which they appear. File paths,
memory addresses and the symbol names of torch are left out.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from gracec.ir.annotations import planned_act, planned_quant
from gracec.ir.program import Program, annotation

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}
_SYMBOL = re.compile(r"\b[su]\d+\b")
_SLICE_END = 2**63 - 1


def format(program: Program) -> str:
    """The canonical text of a program, ending in a newline."""
    return _Printer(program).text()


def diff(before: Program, after: Program, *, context: int = 0) -> str:
    """What changed between two programs, as a unified diff of their texts without file headers.

    Nodes that both have keep the name of the first, so that a removed node renames no other.
    """
    first = _Printer(before)
    text = first.text()
    lines = difflib.unified_diff(
        text.splitlines(), _Printer(after, first).text().splitlines(), n=context, lineterm=""
    )
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def op_name(node: fx.Node) -> str:
    """`aten.linear`; overloads other than default are spelled out: `aten.add.Tensor`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    if node.op == "call_module":
        return f"observer.{annotation(node).get('observer', target)}"
    if callable(target):  # torch.nn.functional.linear of a lowered graph, operator.getitem
        module = getattr(target, "__module__", None) or "torch"
        return f"{module.rpartition('.')[2].strip('_') or 'torch'}.{target.__name__}"
    return f"{node.op}.{target}"


def operators(program: Program) -> Counter[str]:
    """Op -> how many nodes of a program compute it."""
    return Counter(op_name(node) for node in program.graph.nodes if node.op.startswith("call_"))


class _Printer:
    def __init__(self, program: Program, earlier: _Printer | None = None) -> None:
        self.program = program
        self.symbols: dict[str, str] = dict(earlier.symbols) if earlier else {}
        self.counts: Counter[str] = Counter(earlier.counts) if earlier else Counter()
        # Copies of a graph keep torch's node names, which tell which nodes are the same.
        self.kept = {node.name: name for node, name in earlier.names.items()} if earlier else {}
        self.names: dict[fx.Node, str] = {}

    def text(self) -> str:
        program = self.program
        dtype = _DTYPES.get(program.dtype, str(program.dtype))
        lines = [f"program {program.family} {dtype} {program.device.type}"]
        for node in program.graph.nodes:
            if node.op == "placeholder":
                lines.append(f"input %{self.name(node)} : {self.kind(node)}{self.notes(node)}")
            elif node.op == "output":
                returned = node.args[0]
                values = returned if isinstance(returned, (tuple, list)) else (returned,)
                outputs = zip(program.output_names, values, strict=True)
                lines += [f"output {name} = {self.value(value)}" for name, value in outputs]
            elif node.op != "get_attr":
                operands = [self.value(argument) for argument in self.arguments(node)]
                operands += [f"{key}={self.value(item)}" for key, item in node.kwargs.items()]
                call = f"{op_name(node)}({', '.join(operands)})"
                lines.append(f"%{self.name(node)} = {call} : {self.kind(node)}{self.notes(node)}")
        return "\n".join(lines) + "\n"

    def name(self, node: fx.Node) -> str:
        if node not in self.names:
            stem = op_name(node).split(".")[1] if node.op == "call_function" else ""
            if node.op == "placeholder":
                stem = str(node.target)
            elif node.op == "call_module":
                stem = "observer"
            kept = self.kept.get(node.name, "")
            if kept.rpartition("_")[0] == stem:
                self.names[node] = kept
                return kept
            number = self.counts[stem]
            self.counts[stem] += 1
            self.names[node] = stem if node.op == "placeholder" else f"{stem}_{number}"
        return self.names[node]

    @staticmethod
    def arguments(node: fx.Node) -> list[Any]:
        """Positional arguments without trailing defaults, which torch drops when it saves."""
        arguments = list(node.args)
        if isinstance(node.target, torch._ops.OpOverload):
            declared = node.target._schema.arguments
            while arguments:
                last = declared[len(arguments) - 1]
                if not last.has_default_value() or isinstance(arguments[-1], fx.Node):
                    break
                if arguments[-1] != last.default_value:
                    break
                arguments.pop()
        return arguments

    def value(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return (
                self.parameter(argument) if argument.op == "get_attr" else f"%{self.name(argument)}"
            )
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(self.value(item) for item in argument)}]"
        if isinstance(argument, torch.dtype):
            return _DTYPES.get(argument, str(argument))
        if isinstance(argument, int) and not isinstance(argument, bool) and argument == _SLICE_END:
            return "end"
        if isinstance(argument, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            return self.rename(str(argument))
        return str(argument)

    def parameter(self, node: fx.Node) -> str:
        target = str(node.target)
        tensor = self.program.tensor(target)
        return f"@{self.program.fqn(target)}:{self.shape(tensor)}"

    def kind(self, node: fx.Node) -> str:
        found = node.meta.get("val")
        if isinstance(found, Tensor):
            return self.shape(found)
        if isinstance(found, (list, tuple)):
            parts = (self.shape(item) if isinstance(item, Tensor) else "?" for item in found)
            return f"({', '.join(parts)})"
        return "?" if found is None else self.rename(str(found))

    def shape(self, tensor: Tensor) -> str:
        sizes = ", ".join(self.rename(str(size)) for size in tensor.shape)
        return f"{_DTYPES.get(tensor.dtype, str(tensor.dtype))}[{sizes}]"

    def rename(self, expression: str) -> str:
        def replace(match: re.Match[str]) -> str:
            return self.symbols.setdefault(match.group(), f"s{len(self.symbols)}")

        return _SYMBOL.sub(replace, expression)

    def notes(self, node: fx.Node) -> str:
        notes = dict(annotation(node))
        parts: list[str] = []
        if "modality" in notes:
            parts.append(notes.pop("modality"))
        if "quant" in notes:
            notes.pop("quant")
            parts.append(f"quant={planned_quant(node)}")
        if "act" in notes:
            notes.pop("act")
            spec = planned_act(node)
            parts.append(f"act={spec}/{spec.observer}")
        parts += _pairs(sorted(notes.items()))
        return f"  {{{' '.join(parts)}}}" if parts else ""


def _pairs(items: Iterable[tuple[str, Any]]) -> list[str]:
    return [
        f'{key}="{value}"' if isinstance(value, str) and " " in value else f"{key}={value}"
        for key, value in items
    ]
