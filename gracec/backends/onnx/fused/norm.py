"""An addition and the norm after it are one operator.

    s = a + b, RMSNormalization(s, w)  ->  SkipSimplifiedLayerNormalization(a, b, w), which returns
                                           s as well

The residual stream of a decoder is added to twice a layer, and each time a norm comes next.
"""

from __future__ import annotations

import onnx_ir as ir

from gracec.backends.onnx.fused.nodes import insert, is_initializer, take_place

SKIP_NORM = "SkipSimplifiedLayerNormalization"


def fuse_norms(graph: ir.Graph) -> int:
    """Fuse in place; how many there are. A norm of anything but a sum of two values stays."""
    count = 0
    for norm in [node for node in graph if node.op_type == "RMSNormalization"]:
        total, weight = norm.inputs[:2]
        add = total.producer() if total is not None else None
        if add is None or add.op_type != "Add" or any(map(is_initializer, add.inputs)):
            continue
        assert total is not None
        epsilon = {"epsilon": norm.attributes["epsilon"].as_float()}
        name = str(norm.outputs[0].name)
        names = [name, "", "", str(total.name)] if len(total.uses()) > 1 else [name]
        found = insert(add, SKIP_NORM, [*add.inputs, weight], epsilon, names)
        take_place(graph, norm.outputs[0], found[0])
        graph.remove(norm, safe=True)
        if len(found) > 1:
            take_place(graph, total, found[3])
        graph.remove(add, safe=True)
        count += 1
    return count
