import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from gracec import doctor
from gracec.doctor import BLOCKED, OK, SKIPPED, Check, Diagnosis, diagnose
from gracec.errors import GateError, GracecError
from gracec.ir.program import Program
from gracec.recipe import Recipe, built_in_recipes
from tests.tiny import tiny_llava, tiny_processor


def statuses(found: Diagnosis) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}


def detail(found: Diagnosis, name: str) -> str:
    return next(check.detail for check in found.checks if check.name == name)


def test_a_good_model_passes_every_check_that_compile_needs(saved: Path) -> None:
    seen: list[Check] = []
    found = diagnose(saved, report=seen.append)
    assert found.compiles and found.verdict() == "gracec can compile it"
    assert tuple(seen) == found.checks
    assert [check.name for check in found.checks if check.needed and check.status != OK] == []
    assert detail(found, "processor") == "LlavaProcessor, 16 tokens an image as the model takes"
    # Three shapes of its own and what the processor makes.
    assert detail(found, "captured equals eager") == "the same logits bit for bit on 4 batches"
    assert detail(found, "target torchao") == "kernels for all 14 weights"
    assert "14 of 31 weights quantized" in detail(found, "plan")
    assert {f"recipe {name}" for name in built_in_recipes()} <= statuses(found).keys()
    assert "8 of 31 weights quantized" in detail(found, "recipe w8a8")
    assert json.loads(json.dumps(found.to_dict()))["compiles"] is True
    assert all("\n" not in check.line() for check in found.checks)


def test_the_recipe_that_is_asked_for_has_to_be_open(saved: Path) -> None:
    wide = {"granularity": "per_group", "group_size": 128}  # the tiny decoder has 64 features
    fields = {"name": "wide", "weights": {"decoder": {}}, "activations": {"decoder": wide}}
    found = diagnose(saved, Recipe.from_dict(fields))
    assert not found.compiles
    assert statuses(found)["recipe wide"] == BLOCKED
    assert found.verdict().startswith("blocked by: ")
    with pytest.raises(GracecError, match="unknown recipe 'w5'"):
        diagnose(saved, "w5")


@pytest.mark.parametrize(
    "path", ["missing", "file", "empty", "\0", "list", "config-is-a-directory"]
)
def test_whatever_is_given_there_is_a_verdict(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("no directory")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    (tmp_path / "config-is-a-directory" / "config.json").mkdir(parents=True)
    found = diagnose(tmp_path / path)
    assert statuses(found)["directory"] == BLOCKED
    assert not found.compiles
    assert OK not in statuses(found).values()


def test_another_family_says_what_an_adapter_needs(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "llava_next_video", "image_grid_pinpoints": [[32, 32]]}
    (model / "config.json").write_text(json.dumps(config))
    found = diagnose(model)
    assert statuses(found)["vision-language model"] == OK
    assert statuses(found)["family"] == BLOCKED
    assert "the family 'llava_next_video' has no adapter" in detail(found, "family")
    assert "gracec/capture/families" in detail(found, "family")
    assert statuses(found)["checkpoint values"] == OK
    assert statuses(found)["capture"] == SKIPPED


def test_a_broken_checkpoint_does_not_hide_the_rest(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    found = diagnose(model)
    assert statuses(found)["checkpoint files"] == BLOCKED
    assert statuses(found)["weights"] == SKIPPED
    assert statuses(found)["capture"] == OK
    assert statuses(found)["captured equals eager"] == SKIPPED
    assert statuses(found)["plan"] == OK
    assert found.verdict() == "blocked by: checkpoint files"


def test_weights_that_are_not_finite_or_not_known(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("post_layernorm.weight"))
    tensors[name][0] = float("nan")
    tensors["rest.weight"] = torch.zeros(1)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    found = diagnose(model)
    assert f"{name} holds NaN or infinity" in detail(found, "checkpoint values")
    tensors[name][0] = 1.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    found = diagnose(model)
    assert found.compiles
    assert "1 tensors of the checkpoint are not in the model" in detail(found, "weights")


def test_a_processor_that_disagrees_with_the_model(model: Path) -> None:
    processor = tiny_processor()
    processor.patch_size = 16  # a quarter of the placeholders
    processor.save_pretrained(model)
    found = diagnose(model)
    assert statuses(found)["processor"] == BLOCKED
    assert "the prompt holds 4 image tokens" in detail(found, "processor")
    assert statuses(found)["captured equals eager"] == OK


def test_what_cannot_be_captured_is_named_with_its_line(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlavaMultiModalProjector.forward

    def depends_on_data(self: LlavaMultiModalProjector, features: Tensor) -> Tensor:
        projected = forward(self, features)
        return projected if features.sum() > 0 else -projected

    monkeypatch.setattr(LlavaMultiModalProjector, "forward", depends_on_data)
    found = diagnose(saved)
    line = depends_on_data.__code__.co_firstlineno + 2
    assert statuses(found)["capture"] == BLOCKED
    assert detail(found, "capture").startswith(
        f"model.multi_modal_projector at {__file__}:{line}: torch.export cannot trace the model"
    )
    assert statuses(found)["plan"] == statuses(found)["target torchao"] == SKIPPED


def test_weights_that_no_kernel_takes(tmp_path: Path) -> None:
    tiny_llava(hidden_size=64, intermediate_size=96, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    tiny_processor().save_pretrained(tmp_path)
    recipe = tmp_path / "own.yaml"
    recipe.write_text("weights: {decoder: {group_size: 16}}\n")
    found = diagnose(tmp_path, recipe)
    assert statuses(found)["target torchao"] == BLOCKED
    assert "groups of (32, 64, 128, 256), these have 16" in detail(found, "target torchao")


def test_a_graph_that_computes_something_else_blocks(
    model: Path, captured: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "processor_config.json").unlink()  # nor is there a batch of a processor to compare on
    norm = "model.model.language_model.norm.weight"
    wrong = captured.copy()
    wrong.set_tensor(norm, torch.nn.Parameter(captured.tensor(norm).detach() * 1.01))
    monkeypatch.setattr(doctor, "capture", lambda model: wrong)
    found = diagnose(model)
    assert statuses(found)["processor"] == BLOCKED
    assert statuses(found)["captured equals eager"] == BLOCKED
    assert "captured graph and eager model differ by" in detail(found, "captured equals eager")
    assert not found.compiles


def test_a_graph_that_is_wrong_for_the_batch_of_the_processor_blocks(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = doctor.captured_equals_eager

    def only_own(program: Program, model: Any, batches: Any = None) -> int:
        if batches:
            raise GateError("captured graph and eager model differ by 1 at the processor's shapes")
        return compare(program, model)

    monkeypatch.setattr(doctor, "captured_equals_eager", only_own)
    found = diagnose(saved)
    assert detail(found, "captured equals eager").endswith("at the processor's shapes")
    assert not found.compiles
