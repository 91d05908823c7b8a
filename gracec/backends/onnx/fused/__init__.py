"""The decoder for gracec's own runner: fewer operators, and a cache that is written in place.

    the decoder of standard operators  --linears, attention, norm-->  fused_decoder.onnx

It is made of the graph that other clients read, and is a header of its tensors: both graphs are of
the same data file. Operators of ONNX Runtime take the place of standard ones:

    linears     MatMulNBits, one for q, k and v and one for gate and up
    attention   GroupQueryAttention, whose cache is one buffer that it writes into
    norm        SkipSimplifiedLayerNormalization, an addition and the norm after it

`decoder` puts them together, and says which decoders have no such form.
"""

from __future__ import annotations

FUSED = "fused_decoder"
"""The graph, and the stem of its file."""
POSITIONS = "positions"
"""Field of the file's metadata: the most that a cache may hold."""
LENGTHS, TOTAL_LENGTH = "seqlens_k", "total_sequence_length"
"""Inputs: int32 [B], the positions of each row less one, and int32 [], those of the longest row."""
