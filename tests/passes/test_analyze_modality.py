import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gracec import ir
from gracec.errors import GracecError, PassError
from gracec.ir.program import Program, annotate, annotation
from gracec.passes import PassResult
from gracec.passes.analyze_modality import AnalyzeModality

Golden = Callable[..., None]
After = Callable[[str], Program]


def analyzed(program: Program) -> Program:
    return AnalyzeModality().run(program).program


def test_golden(after: After, golden: Golden) -> None:
    text = ir.format(after("analyze-modality"))
    golden("analyze-modality/llava.txt", text, made_by=AnalyzeModality())


def test_numerics_are_kept_bit_for_bit(
    captured: Program, after: After, batch: dict[str, Tensor]
) -> None:
    assert torch.equal(after("analyze-modality")(**batch)[0], captured(**batch)[0])


def test_idempotent(after: After) -> None:
    again = AnalyzeModality().run(after("analyze-modality"))
    assert not again.modified
    assert ir.diff(after("analyze-modality"), again.program) == ""


def test_it_finds_what_the_module_names_say(after: After) -> None:
    program = after("analyze-modality")
    for node in program.nodes(torch.ops.aten.linear.default):
        fqn = program.fqn(str(node.args[1].target))
        expected = {
            "model.vision_tower.encoder.layers.0": "vision",
            "model.vision_tower.encoder.layers.1": "unused",  # features leave after layer 0
            "model.multi_modal_projector": "projector",
            "model.language_model.layers": "decoder",
            "model.language_model.embed_tokens": "head",
        }
        (part,) = [part for prefix, part in expected.items() if fqn.startswith(prefix)]
        assert annotation(node)["part"] == part, fqn


def test_block_outputs_are_the_hidden_states_of_the_model(
    after: After, llava: torch.nn.Module, batch: dict[str, Tensor]
) -> None:
    program = after("analyze-modality")
    blocks = list(program.nodes(role="block_output"))
    assert [annotation(node)["block"] for node in blocks] == [0, 1]
    interpreter = torch.fx.Interpreter(program.graph_module, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(*(batch[name] for name in program.example_inputs))
        hidden = llava(**batch, output_hidden_states=True, use_cache=False).hidden_states
        image_features = llava.model.get_image_features(batch["pixel_values"]).pooler_output
    assert torch.equal(interpreter.env[blocks[-2]], hidden[-2])
    vision_tokens = interpreter.env[program.node(role="vision_tokens")]
    assert torch.equal(vision_tokens, torch.cat(image_features))
    mask = interpreter.env[program.node(role="image_mask")]
    assert torch.equal(mask, batch["input_ids"] == llava.config.image_token_id)


def test_matmuls_that_read_one_activation_are_one_set(after: After) -> None:
    program = after("analyze-modality")
    sets: dict[int, list[str]] = {}
    for node in program.nodes(part="decoder"):
        name = program.fqn(str(node.args[1].target)).split(".")[-2]
        sets.setdefault(annotation(node)["fused_set"], []).append(name)
    one_block = [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    assert list(sets.values()) == 2 * one_block


def test_names_play_no_part(captured: Program, after: After) -> None:
    scrambled = captured.copy()
    draw = random.Random(0)
    renamed: dict[str, str] = {}
    for node in scrambled.graph.nodes:
        if "nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = {str(draw.random()): (str(draw.random()), None)}
        if node.op == "get_attr":
            tensor = scrambled.tensor(str(node.target))
            new = renamed.setdefault(str(node.target), f"p{draw.randrange(10**9)}")
            scrambled.set_tensor(new, tensor)
            node.target = new
        elif node.op == "placeholder":
            node.target = f"x{draw.randrange(10**9)}"
        node.name = f"n{draw.randrange(10**9)}"
    scrambled.fqns.clear()
    expected = [dict(annotation(node)) for node in after("analyze-modality").graph.nodes]
    found = AnalyzeModality().apply(scrambled).program
    assert [dict(annotation(node)) for node in found.graph.nodes] == expected


def test_a_program_without_images_is_refused(captured: Program) -> None:
    program = captured.copy()
    (pixels,) = [
        n for n in program.graph.find_nodes(op="placeholder") if n.target == "pixel_values"
    ]
    pixels.meta["val"] = pixels.meta["val"].long()
    with pytest.raises(PassError, match="analyze-modality: no floating-point input"):
        analyzed(program)


def test_modalities_that_never_meet_are_refused(captured: Program) -> None:
    program = captured.copy()
    merge = next(n for n in program.graph.nodes if "masked_scatter" in str(n.target))
    merge.replace_all_uses_with(merge.args[0])
    program.graph.erase_node(merge)
    with pytest.raises(PassError, match="images and text never meet"):
        analyzed(program)


def test_parts_that_were_not_found_are_an_error(
    captured: Program, after: After, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AnalyzeModality, "apply", lambda self, program: PassResult(program, False))
    with pytest.raises(GracecError, match="0 nodes of the graph carry {'role': 'merge'}"):
        AnalyzeModality().run(captured)
    without_blocks = after("analyze-modality").copy()
    for node in list(without_blocks.nodes(role="block_output")):
        annotate(node, role=None)
    with pytest.raises(PassError, match="found no decoder block"):
        AnalyzeModality().run(without_blocks)
