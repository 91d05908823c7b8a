"""analyze-modality: find by dataflow what is vision, what is text, and where they meet.

    modality(n) = vision  if n depends on pixels and not on token ids
                  text    if n depends on token ids and not on pixels
                  fused   if n depends on both

The first floating-point node that depends on both is the merge. Its vision operand holds the
vision tokens, its boolean operand the image mask. The residual stream is walked from the logits
back to the merge: from an addition to what it adds to, and on to the nearest addition that every
path from the merge runs through (a dominator). Each block of the decoder ends at the last residual
addition before the next attention. There have to be as many as the model's configuration says. No
module path, parameter or placeholder name is looked at.

What decides which expert of a block a token is for is a router.

What an adapter adds to its linear, which capture has marked, is no residual.

Annotations:
    modality: vision | text | fused
    role: pixels | token_ids | merge | vision_tokens | image_mask | block_output | router | logits
    block: number of the decoder block, on block outputs
    part (on matmul-like nodes): vision | projector | decoder | head | text, or unused when the
        logits do not depend on it
    fused_set (on matmul-like nodes): number shared by matmuls that read the same activation
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import networkx as nx
import torch
from torch import fx

from gracec.ir.annotations import Part, part_of
from gracec.ir.program import Program, annotate, annotation
from gracec.ir.queries import (
    VIEWS,
    activation_of,
    attends,
    chooses_experts,
    seen_through,
    value,
    weight_of,
)
from gracec.passes.base import Pass, PassResult

aten = torch.ops.aten


ADDITION = {aten.add.Tensor, aten.add_.Tensor}


REPLACEMENTS = {
    aten.clone.default,
    aten.masked_fill.Scalar,
    aten.where.self,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
}
"""What takes other values in some places."""


OF_A_SIZE = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
}
"""A new tensor as large as another one, whose values play no part."""


@dataclass(frozen=True)
class AnalyzeModality(Pass):
    name: ClassVar[str] = "analyze-modality"
    keeps_numerics: ClassVar[bool] = True

    def apply(self, program: Program) -> PassResult:
        before = [dict(annotation(node)) for node in program.graph.nodes]
        dataflow = _Dataflow(program.graph)
        pixels, token_ids = self._sources(program)
        from_pixels = dataflow.reach(pixels)
        from_text = dataflow.reach(token_ids)
        for node in program.graph.nodes:
            # A second run starts from nothing.
            annotate(node, modality=None, role=None, block=None, part=None, fused_set=None)
        for node in program.graph.nodes:
            if isinstance(node.meta.get("val"), (int, torch.SymInt)):
                continue  # a size: export makes these anew whenever it likes
            if node in from_pixels:
                annotate(node, modality="fused" if node in from_text else "vision")
            elif node in from_text:
                annotate(node, modality="text")
        for node in pixels:
            annotate(node, role="pixels")
        for node in token_ids:
            annotate(node, role="token_ids")

        merge = self._merge(program)
        logits = self._logits(program)
        annotate(merge, role="merge")
        annotate(logits, role="logits")
        vision_tokens = self._operand(merge, "vision", floating=True)
        annotate(vision_tokens, role="vision_tokens")
        annotate(self._image_mask(merge), role="image_mask")
        values = _Dataflow(program.graph, sizes=False)
        blocks = values.block_outputs(merge, logits)
        for number, node in enumerate(blocks):
            annotate(node, role="block_output", block=number)
        self._parts(program, dataflow, values, merge, vision_tokens)
        for node in chooses_experts(program.graph):
            annotate(node, role="router")

        after = [dict(annotation(node)) for node in program.graph.nodes]
        parts = [part for n in program.graph.nodes if (part := part_of(n)) is not None]
        counts = ", ".join(f"{parts.count(part)} {part}" for part in dict.fromkeys(parts))
        return PassResult(
            program, after != before, (f"{len(blocks)} decoder blocks; matmuls: {counts}",)
        )

    def ensures(self, before: Program, after: Program) -> None:
        for role in ("merge", "vision_tokens", "image_mask", "logits"):
            after.node(role=role)
        if not list(after.nodes(role="block_output")):
            raise self.refuse("found no decoder block between the merge and the logits")
        found, layers = len(list(after.nodes(role="block_output"))), after.decoder_layers
        if layers is not None and found != layers:
            raise self.refuse(
                f"found {found} decoder blocks, the model's configuration says {layers}",
                where=f"family {after.family}",
                fix="the graph of this decoder is not understood, so nothing is quantized",
            )

    def _sources(self, program: Program) -> tuple[list[fx.Node], list[fx.Node]]:
        placeholders = program.graph.find_nodes(op="placeholder")
        pixels = [
            node
            for node in placeholders
            if (tensor := value(node)) is not None and tensor.is_floating_point()
        ]
        # Token ids look up rows of a parameter; masks and positions never do.
        token_ids = [node for node in placeholders if _looks_up(node)]
        if not pixels:
            raise self.refuse("no floating-point input, so nothing is an image")
        if not token_ids:
            raise self.refuse("no input indexes an embedding, so nothing is text")
        return pixels, token_ids

    def _merge(self, program: Program) -> fx.Node:
        for node in program.nodes(modality="fused"):
            tensor = value(node)
            if tensor is not None and tensor.is_floating_point():
                return node
        raise self.refuse("images and text never meet: no node depends on both")

    def _logits(self, program: Program) -> fx.Node:
        outputs = program.graph.output_node().args[0]
        first = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        assert isinstance(first, fx.Node)
        return first

    def _operand(self, merge: fx.Node, modality: str, *, floating: bool) -> fx.Node:
        for node in merge.all_input_nodes:
            tensor = value(node)
            if (
                tensor is not None
                and tensor.is_floating_point() == floating
                and annotation(node).get("modality") == modality
            ):
                return node
        raise self.refuse(f"the merge {merge.name} ({merge.target}) has no {modality} operand")

    def _image_mask(self, merge: fx.Node) -> fx.Node:
        """From the merge's boolean operand back through its views to the mask [B, T]."""
        for node in merge.all_input_nodes:
            tensor = value(node)
            if tensor is not None and tensor.dtype == torch.bool:
                while node.target in VIEWS and (tensor := value(node)) is not None:
                    if tensor.dim() == 2:
                        break
                    node = node.all_input_nodes[0]
                return node
        raise self.refuse(f"the merge {merge.name} ({merge.target}) has no boolean operand")

    def _parts(
        self,
        program: Program,
        dataflow: _Dataflow,
        values: _Dataflow,
        merge: fx.Node,
        vision_tokens: fx.Node,
    ) -> None:
        below_merge = dataflow.reach([merge])
        logits = next(program.nodes(role="logits"))
        used = nx.ancestors(dataflow.digraph, logits) | {logits}
        last_block = list(program.nodes(role="block_output"))[-1]
        after_blocks = dataflow.reach([last_block])
        pixels = next(program.nodes(role="pixels"))
        residuals = values.residuals(pixels, vision_tokens)
        # The tower ends where its residual stream does.
        after_tower = dataflow.reach(residuals[-1:])
        # Queries that a resampler learns depend on no image, and are the tower's all the same.
        for_images = nx.ancestors(dataflow.digraph, vision_tokens)
        sets: dict[fx.Node, int] = {}
        for node in program.graph.nodes:
            if weight_of(node) is None:
                continue
            if node not in used:
                part = Part.UNUSED
            elif node in below_merge:
                part = Part.HEAD if node in after_blocks else Part.DECODER
            elif annotation(node).get("modality") == "vision" or node in for_images:
                part = Part.PROJECTOR if node in after_tower else Part.VISION
            else:
                part = Part.TEXT
            annotate(
                node, part=part.value, fused_set=sets.setdefault(activation_of(node), len(sets))
            )


class _Dataflow:
    """The graph as networkx sees it: an edge from every node to each of its users.

    Args:
        sizes: whether what is computed from the size of a tensor alone depends on the tensor.
    """

    def __init__(self, graph: fx.Graph, *, sizes: bool = True) -> None:
        self.digraph: Any = nx.DiGraph()  # its stubs take no node type of one's own
        self.digraph.add_nodes_from(graph.nodes)
        self.digraph.add_edges_from(
            (node, user)
            for node in graph.nodes
            for user in node.users
            if sizes or not _reads_a_size(user)
        )

    def reach(self, sources: list[fx.Node]) -> set[fx.Node]:
        """The sources and everything that depends on them."""
        found = set(sources)
        for source in sources:
            found |= nx.descendants(self.digraph, source)
        return found

    def parents(self, source: fx.Node, target: fx.Node) -> dict[fx.Node, fx.Node]:
        """Each node between two -> the next one before it that every path from the source to it
        runs through."""
        between = nx.descendants(self.digraph, source) & nx.ancestors(self.digraph, target)
        region = self.digraph.subgraph(between | {source, target})
        found: dict[fx.Node, fx.Node] = nx.immediate_dominators(region, source)
        return found

    def residuals(self, source: fx.Node, target: fx.Node) -> list[fx.Node]:
        """Additions of two tensors of one shape that both depend on the source, along the stream.

        The last one is on every path to the target. Those before are on every path to what it adds
        to: a later block may also read what an earlier one began with, or its keys and values.
        """
        below = self.reach([source])
        parents = self.parents(source, target)

        def is_residual(node: fx.Node) -> bool:
            operands = [value(n) for n in node.all_input_nodes if n in below]
            return (
                node.target in ADDITION
                and "adapter" not in annotation(node)
                and len(operands) == 2
                and operands[0] is not None
                and operands[1] is not None
                and operands[0].shape == operands[1].shape
            )

        node, found = target, []
        while node != source:
            if is_residual(node):
                found.append(node)
                node = self._stream(node, below) or parents[node]
            else:
                node = parents[node]
        return found[::-1]

    def _stream(self, residual: fx.Node, below: set[fx.Node]) -> fx.Node | None:
        """What a residual adds to: that of its operands which the other one is computed from."""
        one, other = (node for node in residual.all_input_nodes if node in below)
        if nx.has_path(self.digraph, one, other):
            return one
        return other if nx.has_path(self.digraph, other, one) else None

    def block_outputs(self, merge: fx.Node, logits: fx.Node) -> list[fx.Node]:
        """The last residual addition before each next attention, and the last of all."""
        residuals = self.residuals(merge, logits)
        starts = [merge, *residuals[:-1]]
        attends = [
            self._has_attention(start, end) for start, end in zip(starts, residuals, strict=True)
        ]
        following = [*attends[1:], True]
        seen, blocks = False, []
        for node, own, next_attends in zip(residuals, attends, following, strict=True):
            seen |= own
            if seen and next_attends:
                blocks.append(_scaled(node))
        return blocks

    def _has_attention(self, start: fx.Node, end: fx.Node) -> bool:
        between = nx.descendants(self.digraph, start) & nx.ancestors(self.digraph, end)
        return any(map(attends, between))


def _looks_up(token_ids: fx.Node) -> bool:
    """Whether a node, some of its values replaced by others, is what an embedding is asked for."""
    left = [token_ids]
    while left:
        node = left.pop()
        for user in node.users:
            if user.target == aten.embedding.default and user.args[1] is node:
                return True
            if user.target in REPLACEMENTS:
                left.append(user)
    return False


def _scaled(residual: fx.Node) -> fx.Node:
    """A residual, or its product with a number that the model holds, if that alone is read."""
    (user, *more) = residual.users or (residual,)
    if more or user.target != aten.mul.Tensor:
        return residual
    factors = [seen_through(node) for node in user.all_input_nodes if node is not residual]
    numbers = [value(node) for node in factors if node.op == "get_attr"]
    return (
        user if any(number is not None and number.numel() == 1 for number in numbers) else residual
    )


def _reads_a_size(node: fx.Node) -> bool:
    """Whether a node takes nothing from its operand but its size."""
    return node.target in OF_A_SIZE or isinstance(node.meta.get("val"), (int, torch.SymInt))
