from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gracec.passes.fusions.attention import ATTENTIONS
from tests.rewrites import fused, graph_of, reasons

RANDOM = torch.Generator().manual_seed(0)
B, S, P, N, KV, D = 1, 3, 2, 4, 2, 8
INPUTS = {
    "q": torch.randn(B, S, N * D, generator=RANDOM),
    "k": torch.randn(B, S, KV * D, generator=RANDOM),
    "v": torch.randn(B, S, KV * D, generator=RANDOM),
    "past": torch.randn(B, KV, P, D, generator=RANDOM),
    "mask": torch.ones(B, 1, S, P + S, dtype=torch.bool).tril(P),
}
W = torch.ones(1)
Change = Callable[[Tensor], Tensor]


def heads(x: Tensor, size: int = D) -> Tensor:
    return x.view(B, x.shape[1], -1, size).transpose(1, 2)


def grown(past: Tensor, new: Tensor) -> Tensor:
    return torch.cat((past, new), dim=-2)


def repeated(cache: Tensor) -> Tensor:
    """[B, KV, T, D] -> [B, N, T, D], as transformers does it."""
    wide = cache[:, :, None].expand(B, KV, N // KV, cache.shape[2], cache.shape[3])
    return wide.reshape(B, N, cache.shape[2], cache.shape[3])


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(B, S, -1)


def attention(
    query: Callable[[Tensor], Tensor] = heads,
    keys: Callable[[Tensor, Tensor], Tensor] = lambda past, k: repeated(grown(past, heads(k))),
    values: Callable[[Tensor, Tensor], Tensor] = lambda past, v: repeated(grown(past, heads(v))),
    after: Callable[[Tensor], Tensor] = merged,
    masked: bool = True,
    **options: Any,
) -> Callable[..., Tensor]:
    """One attention with a cache, of which parts are computed otherwise."""

    def compute(
        q: Tensor, k: Tensor, v: Tensor, past: Tensor, mask: Tensor, weight: Tensor
    ) -> Tensor:
        operands = query(q), keys(past, k), values(past * 2, v), mask if masked else None
        return after(functional.scaled_dot_product_attention(*operands, **options)) * weight

    return compute


@pytest.mark.parametrize(
    "compute",
    [
        attention(),
        attention(scale=0.5),
        attention(
            keys=lambda past, k: grown(past, heads(k)),
            values=lambda past, v: torch.cat((past, heads(v)), 2),
            enable_gqa=True,
        ),
        attention(after=lambda x: merged(x.reshape(B, N, S, D))),
    ],
)
def test_an_attention_with_a_cache(compute: Callable[..., Tensor]) -> None:
    assert fused(graph_of(compute, W, INPUTS), ATTENTIONS) == 1


def joined(which: str) -> str:
    return f"the {which} are joined otherwise than past and new along the positions"


def neither(which: str) -> str:
    return f"the {which} are neither cat(past, new) nor its heads repeated"


REFUSED: list[tuple[Callable[..., Tensor], str]] = [
    (attention(masked=False), "the mask is missing"),
    (attention(masked=False, is_causal=True), "it is causal by a flag, not by a mask"),
    (
        attention(query=lambda q: heads(q).abs()),
        "the query is no projection seen as heads, but aten.abs",
    ),
    (
        attention(query=lambda q: q.view(B, N, S, D)),
        "the query is no projection seen as heads, but aten.view",
    ),
    (attention(keys=lambda past, k: repeated(grown(past, heads(k))).abs()), neither("keys")),
    (attention(values=lambda past, v: repeated(grown(past, heads(v))).abs()), neither("values")),
    (attention(keys=lambda past, k: repeated(grown(past, heads(k)).abs())), neither("keys")),
    (
        attention(keys=lambda past, k: grown(past, heads(k)).repeat_interleave(2, 1)),
        neither("keys"),
    ),
    (
        attention(
            keys=lambda past, k: (
                grown(past, heads(k))[:, None].expand(B, 2, KV, P + S, D).reshape(B, N, P + S, D)
            )
        ),
        neither("keys"),
    ),
    (
        attention(
            keys=lambda past, k: repeated(torch.cat((past[:, :, :1], past[:, :, 1:], heads(k)), 2))
        ),
        joined("keys"),
    ),
    (
        attention(
            values=lambda past, v: torch.cat((grown(past, heads(v)), grown(past, heads(v))), 1)
        ),
        joined("values"),
    ),
    (
        attention(keys=lambda past, k: repeated(grown(past, heads(k).abs()))),
        "the new keys are no projection seen as heads, but aten.abs",
    ),
    (
        attention(values=lambda past, v: repeated(grown(past, heads(v).abs()))),
        "the new values are no projection seen as heads, but aten.abs",
    ),
    (
        attention(values=lambda past, v: repeated(grown(past[..., :4], heads(v[..., :8], 4)))),
        "the heads of the keys have 8 features, those of the values 4",
    ),
    (attention(after=lambda x: x), "the heads are not merged after it"),
    (attention(after=lambda x: x.reshape(B, S, N * D)), "the heads are not merged after it"),
    (
        attention(after=lambda x: x.transpose(1, 2).reshape(B * S, N * D)),
        "the heads are not merged after it",
    ),
    (attention(after=lambda x: merged(x) + x.mean()), "the heads are not merged after it"),
]


@pytest.mark.parametrize(("compute", "reason"), REFUSED)
def test_what_is_another_attention_stays(compute: Callable[..., Tensor], reason: str) -> None:
    assert reasons(graph_of(compute, W, INPUTS), ATTENTIONS) == [reason]


def test_one_that_drops_stays() -> None:
    graph = graph_of(attention(), W, INPUTS).copy()
    (node,) = (n for n in graph.graph.nodes if ATTENTIONS.is_candidate(n))
    node.update_kwarg("dropout_p", 0.5)
    graph.recompile()
    assert reasons(graph, ATTENTIONS) == ["a share of 0.5 is dropped"]


def test_one_whose_heads_are_the_output_stays() -> None:
    graph = graph_of(attention(after=lambda x: x), W, INPUTS).copy()
    (node,) = (n for n in graph.graph.nodes if ATTENTIONS.is_candidate(n))
    (product,) = node.users
    product.replace_all_uses_with(node)
    graph.recompile()
    assert reasons(graph, ATTENTIONS) == ["the heads are not merged after it"]


def test_what_is_no_attention_is_no_candidate() -> None:
    def compute(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        return (heads(q)[:, :KV] @ heads(k).mT).softmax(-1) * weight

    graph = graph_of(compute, W, {name: INPUTS[name] for name in ("q", "k")})
    assert reasons(graph, ATTENTIONS) == []
