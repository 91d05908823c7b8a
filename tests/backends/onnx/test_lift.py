import torch
from torch import fx

from gracec.backends.onnx.lift import CAST, LiftedProgram, lift
from gracec.capture.serving import ServingProgram

Serving = dict[str, ServingProgram]


def test_it_is_the_same_graph_with_tensors_as_inputs(serving: Serving) -> None:
    program = serving["decoder"].program
    exported = lift(program)
    exported.graph.lint()
    assert not exported.graph.find_nodes(op="get_attr")
    assert exported.graph_signature.user_inputs == tuple(program.example_inputs)
    shared = exported.state_dict["model.lm_head.weight"]
    assert shared is program.tensor("model.lm_head.weight")

    names = [*exported.graph_signature.parameters, *exported.graph_signature.buffers]
    values = [exported.state_dict[name] for name in names]
    inputs = [*values, *program.example_inputs.values()]
    found = fx.Interpreter(exported.graph_module).run(*_in_order(exported, names, inputs))
    for one, other in zip(found, program(**program.example_inputs), strict=True):
        assert torch.equal(one, other)


def _in_order(
    exported: LiftedProgram, names: list[str], inputs: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Inputs in the order of the placeholders."""
    tensors = dict(zip(names, inputs, strict=False))
    given = iter(inputs[len(names) :])
    specs = exported.graph_signature.input_specs
    return [tensors[spec.target] if spec.target else next(given) for spec in specs]


def test_casts_and_synonyms_have_names_that_are_translated(serving: Serving) -> None:
    graph = lift(serving["decoder"].program).graph
    targets = {node.target for node in graph.nodes}
    assert CAST in targets
    assert torch.ops.aten.bitwise_and.Tensor in targets
    assert not targets & {torch.ops.aten.to.device, torch.ops.aten.__and__.Tensor}
