import pytest
import torch
from torch import Tensor

from gracec.errors import GracecError
from gracec.program import Program, annotate, annotation


def test_a_copy_has_its_own_graph_and_the_same_tensors(
    captured: Program, batch: dict[str, Tensor]
) -> None:
    copy = captured.copy()
    merge = next(node for node in copy.graph.nodes if "masked_scatter" in str(node.target))
    annotate(merge, role="merge")
    assert not any(annotation(node) for node in captured.graph.nodes)
    target = "model.lm_head.weight"
    assert copy.tensor(target) is captured.tensor(target)
    copy.set_tensor("model.lm_head.extra", torch.zeros(1))
    with pytest.raises(AttributeError):
        captured.tensor("model.lm_head.extra")
    assert torch.equal(copy(**batch)[0], captured(**batch)[0])


def test_a_tied_head_carries_both_names(captured: Program) -> None:
    assert captured.fqns["model.lm_head.weight"] == (
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
    )


def test_annotations_survive_reexport(captured: Program) -> None:
    program = captured.copy()
    merge = next(node for node in program.graph.nodes if "masked_scatter" in str(node.target))
    annotate(merge, role="merge", modality="fused")
    exported = program.reexport()
    found = {str(n.target): annotation(n) for n in exported.graph.nodes if annotation(n)}
    checks = [name for name in found if "_assert_" in name]  # re-export adds them beside the node
    assert [found.pop(name) for name in checks] == [{"role": "merge", "modality": "fused"}]
    assert found == {"aten.masked_scatter.default": {"role": "merge", "modality": "fused"}}


def test_annotate_says_whether_it_changed_something(captured: Program) -> None:
    node = next(iter(captured.copy().graph.nodes))
    assert annotate(node, role="x")
    assert not annotate(node, role="x")
    assert annotate(node, role=None)
    assert "custom" not in node.meta or not annotation(node)


def test_inputs_that_do_not_fit_are_named(captured: Program, batch: dict[str, Tensor]) -> None:
    with pytest.raises(GracecError, match=r"missing \['pixel_values'\]"):
        captured(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with pytest.raises(GracecError, match=r"unknown \['labels'\]"):
        captured(**batch, labels=batch["input_ids"])


def test_a_query_that_finds_nothing_says_so(captured: Program) -> None:
    with pytest.raises(GracecError, match="0 nodes of the graph carry"):
        captured.node(role="merge")
