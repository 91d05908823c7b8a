"""An addition and the norm after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from gracec.backends.onnx.fused.norm import fuse_norms
from gracec.backends.onnx.session import open_session

TEXT = """
<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
norms (float[B, S, 8] a, float[B, S, 8] b, float[8] w) => (float[B, S, 8] y, float[B, S, 8] z)
<float[8] bias = {1, 2, 3, 4, 5, 6, 7, 8}>
{
    s = Add(a, b)
    n = RMSNormalization <axis = -1, epsilon = 1e-6> (s, w)
    shifted = Add(n, bias)
    m = RMSNormalization <axis = -1, epsilon = 1e-6> (shifted, w)
    t = Add(s, m)
    y = RMSNormalization <axis = -1, epsilon = 1e-6> (t, w)
    z = Mul(s, n)
}
"""


def test_sums_of_two_values_and_their_norms_are_one(tmp_path: Path) -> None:
    model, before, after = (
        ir.from_onnx_text(TEXT),
        tmp_path / "before.onnx",
        tmp_path / "after.onnx",
    )
    ir.save(model, before)
    assert fuse_norms(model.graph) == 2
    kinds = [node.op_type for node in model.graph]
    skip = "SkipSimplifiedLayerNormalization"
    assert kinds == [skip, "Add", "RMSNormalization", skip, "Mul"]
    ir.save(model, after)
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal((2, 3, 8), np.float32) for name in "ab"}
    feed["w"] = rng.standard_normal(8).astype(np.float32)
    runs = [open_session(path, {}, threads=1).run(None, feed) for path in (before, after)]
    for expected, found in zip(*runs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
