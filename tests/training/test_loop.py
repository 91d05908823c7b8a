"""The loop on tiny captured programs: it learns, adds up, resumes to the bit and stops in time."""

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from gracec.capture import Family, capture
from gracec.data.collate import EmptyBatch
from gracec.data.conversations import epoch_order
from gracec.errors import GracecError
from gracec.ir.program import Program
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.free_scales import FreeScales
from gracec.passes.freeze import Freeze, frozen_weights
from gracec.passes.insert_fake_quant import InsertFakeQuant, fake_quantized, signs_of_scales
from gracec.passes.plan_quantization import PlanQuantization
from gracec.passes.return_head import ReturnHead
from gracec.passes.select_supervised import SelectSupervised
from gracec.quant import FrozenWeight
from gracec.quant.frozen import code_hash
from gracec.recipe import Recipe, Training
from gracec.training import micro_batch
from gracec.training.checkpoints.directory import latest_checkpoint
from gracec.training.checkpoints.fingerprint import Fingerprint
from gracec.training.curve import Curve
from gracec.training.learner import Learner, score
from gracec.training.loader import Loader, one_by_one
from gracec.training.loop import Run, train
from gracec.training.micro_batch import Batch
from tests.children import in_a_child, start, wait
from tests.signed import fake_quantized_by_halves
from tests.tiny import IMAGE, IMAGE_TOKENS, PAD, tiny_image, tiny_llava, tiny_processor

FAKE = "analyze-modality,plan-quantization,insert-fake-quant{candidates=8}"
STUDENT = f"{FAKE},insert-taps,select-supervised,return-head"
TEACHER = "analyze-modality,insert-taps,select-supervised,return-head"
SAMPLES = 12
FAST = {
    "batch_size": 4,
    "micro_batch_size": 2,
    "lr": 3e-3,
    "scale_lr": 1e-2,
    "warmup": 0.0,
    "steps": 6,
    "evaluate_every": 3,
    "checkpoint_every": 2,
}
FINGERPRINT = Fingerprint("model", "teacher", "data", "processor", "recipe")
After = Callable[[str], Program]


def rule(**fields: object) -> Training:
    return Training.model_validate({**FAST, **fields})


ALONE = {"kind": "none", "omega": 0}
TEXTS_ONLY = rule(frozen=[], distillation=ALONE)


@pytest.fixture(scope="module")
def teacher() -> Learner:
    return a_teacher()


@pytest.fixture
def student(after: After, llava: LlavaForConditionalGeneration) -> Learner:
    return Learner(with_own_tensors(after(STUDENT)), llava)


def a_teacher() -> Learner:
    """Wider and deeper than the student."""
    model = tiny_llava(seed=7, hidden_size=96, num_hidden_layers=3, num_attention_heads=6)
    return Learner(run_passes(capture(model), parse_pipeline(TEACHER)).program, model)


def a_student() -> Learner:
    """Another of those that the fixture makes."""
    model = tiny_llava(tie=True)
    return Learner(run_passes(capture(model), parse_pipeline(STUDENT)).program, model)


def with_own_tensors(program: Program) -> Program:
    """A copy that can be trained without changing the program that other tests share."""
    own = program.copy()
    for target in own.fqns:
        tensor = own.tensor(target).detach().clone()
        parameter = isinstance(program.tensor(target), nn.Parameter)
        own.set_tensor(target, nn.Parameter(tensor) if parameter else tensor)
    return own


def collate(numbers: Sequence[int], texts: Sequence[int] = ()) -> Batch:
    """Prompts of different length, right-padded; the answer to each picture is two tokens.

    Args:
        texts: numbers of samples that have no picture.
    """
    processor = tiny_processor()
    prompts = []
    for number in numbers:
        words = torch.arange(20, 22 + number % 4)
        answer = torch.tensor([40 + number % 5, 2])
        picture = torch.full((0 if number in texts else IMAGE_TOKENS,), IMAGE)
        prompts.append((torch.cat([picture, words]), answer))
    longest = max(len(prompt) + len(answer) for prompt, answer in prompts)
    ids = torch.full((len(prompts), longest), PAD)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(prompts):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.cat([prompt, answer])
        labels[row, len(prompt) : end] = answer
        mask[row, :end] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    images = [tiny_image(number) for number in numbers if number not in texts]
    if images:
        batch |= processor.image_processor(images, return_tensors="pt")
    return batch


HELD_OUT = [collate([0, 5]), collate([3])]


def weights(learner: Learner) -> dict[str, Tensor]:
    program = learner.program
    return {program.fqn(t): program.tensor(t).detach().clone() for t in program.fqns}


def go(student: Learner, teacher: Learner | None, options: Training, **more: object) -> Curve:
    held_out, made = more.pop("held_out", HELD_OUT), more.pop("collate", collate)
    return train(student, teacher, one_by_one(made), SAMPLES, held_out, options, **more)  # type: ignore[arg-type]


def test_grace_learns_and_moves_weights_and_scales_but_not_the_image_side(
    student: Learner, teacher: Learner
) -> None:
    before, teaching = weights(student), weights(teacher)
    curve = go(student, teacher, rule(steps=15, distillation={"tau": "auto"}))
    found = [row["held_out_loss"] for row in curve.held_out]
    assert found[-1] < 0.8 * found[0]
    assert {"ce", "distillation", "rcka", "beta", "ema", "omega"} <= curve.rows[0].keys()
    assert all(0 <= row["rcka"] <= 1 and row["distillation"] > 0 for row in curve.rows)
    after = weights(student)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("vision_tower" in name for name in moved)
    q_proj = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert {q_proj, f"{q_proj}_scale", "model.multi_modal_projector.linear_1.weight"} <= moved
    assert all(torch.equal(teaching[name], now) for name, now in weights(teacher).items())


def test_the_best_state_is_kept_and_the_first_is_a_candidate(
    student: Learner, teacher: Learner
) -> None:
    before = weights(student)
    curve = go(student, teacher, rule(lr=10.0, steps=4, evaluate_every=1, clip=1e6))
    assert curve.best_step == 0
    assert "training did not help" in " ".join(curve.notes)
    assert all(torch.equal(before[name], now) for name, now in weights(student).items())


def test_it_ends_with_the_state_of_the_best_step(student: Learner) -> None:
    options = rule(steps=6, evaluate_every=1, distillation={"kind": "none", "omega": 0})
    curve = go(student, None, options)
    best = min(curve.held_out, key=lambda row: row["held_out_loss"] or 99)
    assert curve.best_step == best["step"] > 0
    assert score(student, HELD_OUT).loss == best["held_out_loss"]


def test_the_last_state_is_kept_where_the_recipe_says_so(student: Learner) -> None:
    options = {"steps": 2, "distillation": {"kind": "none", "omega": 0}}
    before = score(student, HELD_OUT).loss
    curve = go(student, None, rule(lr=10.0, clip=1e6, keep="last", **options))
    assert curve.best_step == 2
    assert score(student, HELD_OUT).loss == curve.held_out[-1]["held_out_loss"] > before


def calibrated(student: Learner, *, good: bool) -> dict[str, FrozenWeight]:
    """Codes that say what a trained student does, or, negated, what none would."""
    pupil = Learner(with_own_tensors(student.program), student.model)
    go(pupil, None, rule(steps=6, distillation=ALONE))
    found = frozen_weights(Freeze().run(pupil.program).program)
    for fqn, weight in found.items():
        codes = weight.codes if good else (-weight.codes).clamp(-8, 7)
        found[fqn] = FrozenWeight.from_codes(codes, weight.scales, weight.spec)
    return found


def codes_of(learner: Learner) -> dict[str, str]:
    weights = frozen_weights(Freeze().run(learner.program).program)
    return {fqn: code_hash(weight) for fqn, weight in weights.items()}


def test_a_candidate_that_is_better_than_every_trained_state_is_kept(student: Learner) -> None:
    """Its codes are, to the bit; what else learns is as it was before."""
    candidate, before = calibrated(student, good=True), weights(student)
    rows: list[dict[str, Any]] = []
    options = rule(steps=2, lr=1e-6, scale_lr=1e-6, evaluate_every=1, distillation=ALONE)
    curve = go(student, None, options, candidate=candidate, log=rows.append)
    assert curve.best_step is None and curve.candidate is not None
    assert codes_of(student) == {fqn: code_hash(weight) for fqn, weight in candidate.items()}
    assert score(student, HELD_OUT).row() == curve.candidate
    assert all(curve.candidate["held_out_loss"] < row["held_out_loss"] for row in curve.held_out)
    changed = {name for name, now in weights(student).items() if not torch.equal(before[name], now)}
    assert changed <= {name for fqn in candidate for name in (fqn, f"{fqn}_scale")}
    assert curve.notes[-2] == (
        "the calibrated post-training quantization was better than every trained state: kept"
    )
    assert {"step": 0, "candidate": curve.candidate} in rows


@pytest.mark.parametrize("keep", ["best", "last"])
def test_training_does_not_start_from_a_candidate(student: Learner, keep: str) -> None:
    """One that is worse, or that is not to be kept, changes nothing but what is said."""
    plain = Learner(with_own_tensors(student.program), student.model)
    options = rule(steps=2, evaluate_every=1, keep=keep, distillation=ALONE)
    expected = go(plain, None, options)
    curve = go(student, None, options, candidate=calibrated(student, good=keep == "last"))
    assert curve.candidate is not None
    better = curve.candidate["held_out_loss"] < curve.held_out[0]["held_out_loss"]
    assert better == (keep == "last")
    assert curve.best_step == expected.best_step and curve.rows == expected.rows
    assert curve.held_out == expected.held_out
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(student)[name]), name
    assert any("quantization alone" in note for note in curve.notes)


def test_a_candidate_may_have_weights_of_frozen_parts(after: After) -> None:
    """They are put back for the training, and there in the end if it is kept."""
    text = "analyze-modality,plan-quantization{recipe=w8a8},insert-observers"
    program = after(f"{text},insert-fake-quant{{candidates=8}},select-supervised")
    student = Learner(with_own_tensors(program), tiny_llava(tie=True))
    found = frozen_weights(Freeze().run(program).program)
    candidate = {
        fqn: FrozenWeight.from_codes(weight.codes // 2 * 2, weight.scales, weight.spec)
        for fqn, weight in found.items()
    }
    tower = next(fqn for fqn in candidate if "vision_tower" in fqn)
    learning: list[bool] = []
    alone = rule(distillation=ALONE)
    run = Run(student, None, one_by_one(collate), SAMPLES, alone, None, None, candidate)
    assert tower not in run.parameters
    before = weights(student)
    run._evaluate(HELD_OUT, lambda row: None)
    run.best_score = 1e9  # whatever it scores, it is better
    run._try(candidate, HELD_OUT, lambda row: learning.append(True))
    assert learning and run.curve.best_step is None
    assert all(torch.equal(before[name], now) for name, now in weights(student).items())
    run.best_score = -1.0
    run.go(HELD_OUT, lambda row: None)
    found = frozen_weights(Freeze().run(student.program).program)
    for fqn, weight in candidate.items():
        assert torch.equal(found[fqn].stored, weight.stored), fqn


SCALES_ONLY = {
    "learns": "scales",
    "labels": "all",
    "cross_entropy": 0,
    "scale_lr": 3e-2,
    "distillation": {
        "kind": "kl",
        "gate": False,
        "omega": 0,
        "controller": "fixed",
        "beta": 1,
        "temperature": 1,
    },
}


@pytest.fixture
def rough(after: After, llava: LlavaForConditionalGeneration) -> Learner:
    """Few codes whose scales learn."""
    recipe = Recipe.from_dict({"name": "rough", "weights": {"decoder": {"bits": 2}}})
    passes = [
        PlanQuantization(recipe),
        InsertFakeQuant(8),
        FreeScales(),
        SelectSupervised(),
        ReturnHead(),
    ]
    return Learner(with_own_tensors(run_passes(after("analyze-modality"), passes).program), llava)


@pytest.fixture
def itself(after: After, llava: LlavaForConditionalGeneration) -> Learner:
    return Learner(after("analyze-modality,select-supervised,return-head"), llava)


def test_scales_alone_come_nearer_to_the_original(rough: Learner, itself: Learner) -> None:
    """Whatever the labels say: every token of text counts, and nothing but scales moves."""
    before, codes = weights(rough), frozen_weights(Freeze().run(rough.program).program)

    def unlabelled(numbers: Sequence[int]) -> Batch:
        batch = dict(collate(numbers, texts=numbers[:1]))
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    held_out = [unlabelled([0, 5]), unlabelled([3])]
    options = rule(steps=8, evaluate_every=4, **SCALES_ONLY)
    curve = go(rough, itself, options, collate=unlabelled, held_out=held_out)
    first, *_, last = (row["held_out_kl"] for row in curve.held_out)
    assert last < 0.9 * first and curve.chosen_by == "held_out_kl" and curve.best_step == 8
    assert all(0 <= row["held_out_top1"] <= 1 for row in curve.held_out)
    assert all("held_out_exact" not in row for row in curve.held_out)
    assert all(row["ce"] == row["rcka"] == 0 and row["distillation"] > 0 for row in curve.rows)
    assert curve.notes[0].startswith("trained 8 steps; held-out KL to the teacher")
    moved = {name for name, now in weights(rough).items() if not torch.equal(before[name], now)}
    assert moved == {f"{fqn}_scale" for fqn in codes}
    for fqn, weight in frozen_weights(Freeze().run(rough.program).program).items():
        assert torch.equal(weight.stored, codes[fqn].stored)
        assert not torch.equal(weight.scales, codes[fqn].scales)


def test_scales_alone_in_bfloat16_matmuls(rough: Learner, itself: Learner) -> None:
    row = go(rough, itself, rule(steps=1, precision="bfloat16", **SCALES_ONLY)).rows[0]
    assert row["distillation"] > 0 and row["grad_norm"] > 0


def test_where_nothing_learns_it_says_so(rough: Learner, itself: Learner) -> None:
    with pytest.raises(GracecError, match=r"training\.frozen: nothing learns"):
        go(rough, itself, rule(frozen=["decoder", "head"], **SCALES_ONLY))


@pytest.mark.parametrize("size", [1, 4])
def test_a_step_does_not_depend_on_how_the_batch_is_cut(
    size: int, after: After, llava: LlavaForConditionalGeneration, teacher: Learner
) -> None:
    """Answers and prompts differ in length, so that plain means of micro-batches would differ."""
    found = []
    for micro in (2, size):
        learner = Learner(with_own_tensors(after(STUDENT)), llava)
        options = rule(steps=1, micro_batch_size=micro, distillation={"omega_warmup": 0})
        row = go(learner, teacher, options).rows[0]
        found.append(row)
    for name in ("ce", "distillation", "rcka", "grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name


def test_a_batch_of_texts_is_as_good_as_another(
    after: After, llava: LlavaForConditionalGeneration, teacher: Learner
) -> None:
    """Alone in their micro-batch or beside pictures, in training and in the held-out part."""
    chosen = epoch_order(SAMPLES, 0, rule().seed)[:4]
    found = []
    for micro in (1, 4):
        learner = Learner(with_own_tensors(after(STUDENT)), llava)
        before = weights(learner)
        options = rule(steps=1, micro_batch_size=micro, distillation={"omega_warmup": 0})
        texts = partial(collate, texts=chosen[1:])
        curve = go(learner, teacher, options, collate=texts, held_out=[texts([chosen[1]])])
        assert curve.held_out[0]["held_out_loss"] is not None
        found.append(curve.rows[0])
        assert any(not torch.equal(before[name], now) for name, now in weights(learner).items())
    assert found[0]["rcka"] > 0
    for name in ("ce", "distillation", "rcka", "grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name


def test_a_step_of_texts_alone_gives_the_image_side_no_gradient(student: Learner) -> None:
    micro = micro_batch.MicroBatch.read(student.model, collate([0, 1], texts=[0, 1]), images=True)
    assert micro.image_sizes == ()
    run = Run(student, None, one_by_one(collate), SAMPLES, TEXTS_ONLY, None, None)
    said = student.outputs(run.module.graph(**student.inputs(micro)))
    run.objective.terms(said, None, micro.targets).ce.total.backward()
    run.quantized.hand_on_gradients()
    gradients = {name: p.grad for name, p in run.parameters.items() if p.grad is not None}
    visual = {name for name in gradients if "vision_tower" in name or "projector" in name}
    assert visual and visual < gradients.keys()
    assert all(not gradients[name].any() for name in visual)
    assert any(gradients[name].any() for name in gradients.keys() - visual)


def test_a_step_and_a_held_out_part_of_nothing_say_why(student: Learner) -> None:
    def none(numbers: Sequence[int]) -> Batch:
        raise EmptyBatch("broken samples leave nothing to train on, the last being a.jsonl:1: why")

    with pytest.raises(GracecError, match="every sample of an optimizer step .*a.jsonl:1: why"):
        go(student, None, TEXTS_ONLY, collate=none)
    with pytest.raises(GracecError, match="no sample of the held-out data can be used"):
        go(student, None, TEXTS_ONLY, held_out=[])


def test_a_micro_batch_is_read_once_for_student_and_teacher(
    student: Learner, teacher: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        usual = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return usual(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    for name in ("read", "image_index"):
        count(Family, name)
    count(micro_batch, "supervised_positions")
    options = rule(steps=3, evaluate_every=3)
    go(student, teacher, options)
    trained = options.steps * options.batch_size // options.micro_batch_size
    scored = 2 * len(HELD_OUT)  # before and after
    assert calls == {
        "read": trained + scored,
        "supervised_positions": trained + scored,
        "image_index": trained,
    }


def test_the_rule_that_goes_by_epochs_hears_of_their_end(
    student: Learner, teacher: Learner
) -> None:
    rows = go(
        student,
        teacher,
        rule(steps=6, distillation={"controller": "epoch-lagrangian", "eta": 0.1, "omega": 0}),
    ).rows
    first, second = ({row["beta"] for row in part} for part in (rows[:3], rows[3:]))
    assert len(first) == len(second) == 1 and first != second


def test_terms_can_be_switched_off(student: Learner) -> None:
    options = rule(steps=2, distillation={"kind": "none", "omega": 0})
    curve = go(student, None, options)
    assert all(row["distillation"] == row["rcka"] == 0 for row in curve.rows)
    with pytest.raises(GracecError, match="there is no teacher"):
        go(student, None, rule())


def test_bfloat16_matmuls_stay_near_float32(
    after: After, llava: LlavaForConditionalGeneration, teacher: Learner
) -> None:
    rows = []
    for precision in ("float32", "bfloat16"):
        learner = Learner(with_own_tensors(after(STUDENT)), llava)
        rows.append(go(learner, teacher, rule(steps=1, precision=precision)).rows[0])
    assert rows[0]["ce"] == pytest.approx(rows[1]["ce"], rel=0.05)
    assert rows[0]["ce"] != rows[1]["ce"]


def train_until_killed(stop: int, directory: Path) -> None:
    def die(row: dict[str, object]) -> None:
        if row["step"] == stop and "ce" in row:
            os.kill(os.getpid(), signal.SIGKILL)

    options = rule(distillation={"tau": "auto"})
    more: dict[str, Any] = {"fingerprint": FINGERPRINT, "directory": directory, "log": die}
    go(a_student(), a_teacher(), options, **more)


def test_an_interrupted_run_resumes_to_the_same_bytes(
    after: After, llava: LlavaForConditionalGeneration, teacher: Learner, tmp_path: Path
) -> None:
    options = rule(distillation={"tau": "auto"})
    whole = Learner(with_own_tensors(after(STUDENT)), llava)
    expected = go(whole, teacher, options, fingerprint=FINGERPRINT, directory=tmp_path / "whole")
    for stop in (1, 3, 5):
        directory = tmp_path / str(stop)
        assert in_a_child(train_until_killed, stop, directory) == signal.SIGKILL
        again = Learner(with_own_tensors(after(STUDENT)), llava)
        curve = go(
            again, teacher, options, fingerprint=FINGERPRINT, directory=directory, resume=True
        )
        assert curve.to_dict() == expected.to_dict()
        for name, tensor in weights(whole).items():
            assert torch.equal(tensor, weights(again)[name]), name
        files = [d / "metrics.jsonl" for d in (directory, tmp_path / "whole")]
        assert files[0].read_text() == files[1].read_text()


def test_signs_of_scales_are_not_trained_and_are_part_of_a_checkpoint(
    after: After, llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    fake = fake_quantized_by_halves(after("analyze-modality"))
    student = run_passes(fake, parse_pipeline("select-supervised")).program
    options: dict[str, Any] = {"fingerprint": FINGERPRINT, "directory": tmp_path}
    one = Learner(with_own_tensors(student), llava)
    before = {fake.fqn: fake.scales for fake in fake_quantized(one.program)}
    go(one, None, TEXTS_ONLY, **options)
    trained = {fake.fqn: fake.scales for fake in fake_quantized(one.program)}
    for fqn, scales in trained.items():
        assert not torch.equal(scales, before[fqn]), fqn
        assert torch.equal(scales.sign(), before[fqn].sign()) and (scales < 0).any()
    other = Learner(with_own_tensors(student), llava)
    for sign in signs_of_scales(other.program).values():
        sign.fill_(1)  # whatever a search says when it is done again
    go(other, None, TEXTS_ONLY, resume=True, **options)
    for found in fake_quantized(other.program):
        assert torch.equal(found.scales, trained[found.fqn])


class Stopped(Exception):
    """Somebody stops a run."""


def stop_at(step: int) -> Callable[[dict[str, Any]], None]:
    def stop(row: dict[str, Any]) -> None:
        if row["step"] == step and "ce" in row:
            raise Stopped

    return stop


@pytest.mark.parametrize("good", [True, False])
def test_a_run_with_a_candidate_resumes_to_the_same_bits(
    good: bool, student: Learner, tmp_path: Path
) -> None:
    """It is not scored again, and what else learns is as it was before the run began."""
    candidate = calibrated(student, good=good)
    options = rule(steps=4, evaluate_every=2, distillation=ALONE, lr=1e-6 if good else 3e-3)
    more: dict[str, Any] = {"candidate": candidate, "fingerprint": FINGERPRINT}
    parts = [Learner(with_own_tensors(student.program), student.model) for _ in range(3)]
    expected = go(parts[0], None, options, directory=tmp_path / "whole", **more)
    assert (expected.best_step is None) == good
    more["directory"] = tmp_path / "part"
    with pytest.raises(Stopped):
        go(parts[1], None, options, log=stop_at(3), **more)
    rows: list[dict[str, Any]] = []
    curve = go(parts[2], None, options, resume=True, log=rows.append, **more)
    assert curve.to_dict() == expected.to_dict()
    assert not any("candidate" in row for row in rows)
    for name, tensor in weights(parts[0]).items():
        assert torch.equal(tensor, weights(parts[2])[name]), name


def test_a_run_of_scales_resumes_to_the_same_bits(
    rough: Learner, itself: Learner, tmp_path: Path
) -> None:
    options = rule(steps=4, evaluate_every=2, **SCALES_ONLY)
    parts = [Learner(with_own_tensors(rough.program), rough.model) for _ in range(3)]
    more: dict[str, Any] = {"fingerprint": FINGERPRINT, "directory": tmp_path / "whole"}
    expected = go(parts[0], itself, options, **more)
    more["directory"] = tmp_path / "part"
    with pytest.raises(Stopped):
        go(parts[1], itself, options, log=stop_at(3), **more)
    curve = go(parts[2], itself, options, resume=True, **more)
    assert curve.to_dict() == expected.to_dict() and curve.chosen_by == "held_out_kl"
    for name, tensor in weights(parts[0]).items():
        assert torch.equal(tensor, weights(parts[2])[name]), name


def test_workers_change_no_bit_of_a_run_nor_of_what_it_goes_on_with(
    after: After, llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    made: Any = SimpleNamespace(batch=collate, collate=SimpleNamespace(problems=[]), data=None)
    made.learn = lambda broken, problems: None
    options = rule(steps=5, checkpoint_every=1, distillation=ALONE)
    parts = [Learner(with_own_tensors(after(STUDENT)), llava) for _ in range(3)]
    expected = go(parts[0], None, options)
    more: dict[str, Any] = {"fingerprint": FINGERPRINT, "directory": tmp_path}
    rows: list[dict[str, Any]] = []

    def until(row: dict[str, Any]) -> None:
        rows.append(row)
        stop_at(3)(row)

    with pytest.raises(Stopped):
        train(parts[1], None, Loader(made, 2), SAMPLES, HELD_OUT, options, log=until, **more)
    assert not multiprocessing.active_children()
    assert all(0 <= row["data_seconds"] <= row["seconds"] for row in rows if "ce" in row)
    more |= {"resume": True}
    curve = train(parts[2], None, Loader(made, 1), SAMPLES, HELD_OUT, options, **more)
    assert curve.to_dict() == expected.to_dict()
    assert len(curve.seconds) == 3 and curve.waiting() in curve.notes
    for name, tensor in weights(parts[0]).items():
        assert torch.equal(tensor, weights(parts[2])[name]), name


def test_a_loss_that_is_not_finite_is_skipped_counted_and_stops_the_run(
    student: Learner, teacher: Learner, tmp_path: Path
) -> None:
    def poisoned(bad: set[int]) -> Callable[[Sequence[int]], Batch]:
        calls = iter(range(1000))

        def made(numbers: Sequence[int]) -> Batch:
            batch = dict(collate(numbers))
            if next(calls) in bad:
                batch["pixel_values"] = batch["pixel_values"] * torch.nan
            return batch

        return made

    options = rule(steps=4, max_skipped=2, checkpoint_every=1)
    curve = train(student, teacher, one_by_one(poisoned({2})), SAMPLES, HELD_OUT, options)
    assert curve.skipped == 1
    assert curve.rows[1]["skipped"] and curve.rows[1]["ce"] is None
    assert all(tensor.isfinite().all() for tensor in weights(student).values())
    with pytest.raises(GracecError, match=r"not finite 2 steps in a row.*step-0000000\d"):
        train(
            student,
            teacher,
            one_by_one(poisoned(set(range(2, 99)))),
            SAMPLES,
            HELD_OUT,
            options,
            fingerprint=FINGERPRINT,
            directory=tmp_path,
        )
    assert latest_checkpoint(tmp_path) is not None


TWO_STEPS = {
    "steps": 2,
    "batch_size": 3,
    "micro_batch_size": 1,
    "distillation": {"omega_warmup": 0},
}


def train_as_rank(rank: int, directory: Path) -> None:
    store = f"file://{directory / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    learner = a_student()
    rows = go(learner, a_teacher(), rule(**TWO_STEPS)).rows
    torch.save({"rows": rows, "weights": weights(learner)}, directory / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_take_the_step_of_one(
    after: After, llava: LlavaForConditionalGeneration, teacher: Learner, tmp_path: Path
) -> None:
    """Unequal numbers of tokens on each rank; weights to 1e-5, the same β on both."""
    alone = Learner(with_own_tensors(after(STUDENT)), llava)
    curve = go(alone, teacher, rule(**TWO_STEPS))

    children = [start(train_as_rank, rank, tmp_path) for rank in range(2)]
    assert [wait(child) for child in children] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for result in results:
        for row, expected in zip(result["rows"], curve.rows, strict=True):
            for name in ("ce", "distillation", "rcka", "beta", "grad_norm"):
                assert row[name] == pytest.approx(expected[name], rel=1e-5), name
        for name, tensor in weights(alone).items():
            assert torch.allclose(result["weights"][name], tensor, rtol=1e-4, atol=1e-5), name
    assert [row["beta"] for row in results[0]["rows"]] == [r["beta"] for r in results[1]["rows"]]


@pytest.mark.slow
def test_a_compiled_run_with_activation_checkpointing_takes_the_same_steps(
    after: After,
    llava: LlavaForConditionalGeneration,
    teacher: Learner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, compiled, compile_graph = [], [], torch.compile

    def counted(graph: Any, **options: Any) -> Any:
        compiled.append(graph)
        return compile_graph(graph, **options)

    monkeypatch.setattr(torch, "compile", counted)
    for fields in ({}, {"compile": True, "activation_checkpointing": 0.3}):
        learner = Learner(with_own_tensors(after(STUDENT)), llava)
        options = rule(steps=2, distillation={"omega_warmup": 0}, **fields)
        rows.append(go(learner, teacher, options).rows)
    assert len(compiled) == 2  # student and teacher
    for eager, faster in zip(*rows, strict=True):
        for name in ("ce", "distillation", "rcka", "grad_norm"):
            assert faster[name] == pytest.approx(eager[name], rel=1e-3), name
