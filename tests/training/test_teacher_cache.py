"""A teacher in files: what it says of a sample is kept once, and learnt as if it said it again."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import gracec
from gracec.capture import capture
from gracec.data.collate import Collator, EmptyBatch
from gracec.errors import GracecError
from gracec.objective import GraceObjective, Grams, LazyLogits, Outputs
from gracec.passes import parse_pipeline, run_passes
from gracec.recipe import Training
from gracec.training import teacher_cache as module
from gracec.training.learner import Learner
from gracec.training.loader import one_by_one
from gracec.training.micro_batch import MicroBatch
from gracec.training.samples import open_samples
from gracec.training.teacher_cache import Cached, Part, cached_teacher, folder_of
from tests.tiny import VOCAB_SIZE, tiny_image, tiny_llava, tiny_processor

TEACHER = "analyze-modality,insert-taps{block=-1},select-supervised,return-head"
WORDS = ("red", "green", "blue", "gray", "yellow", "red")
RECORDS: list[dict[str, Any]] = [
    {"image": tiny_image(n), "question": "what color is this ?" * (1 + n % 2), "answer": word}
    for n, word in enumerate(WORDS)
]
RECORDS[3] = {"question": "what is red ?", "answer": "blue"}  # of no picture


def rule(**fields: Any) -> Training:
    return Training.model_validate({"held_out": 0.2, "micro_batch_size": 2, **fields})


def learner_of(model: LlavaForConditionalGeneration) -> Learner:
    return Learner(run_passes(capture(model), parse_pipeline(TEACHER)).program, model)


@pytest.fixture(scope="module")
def teacher() -> Learner:
    return learner_of(
        tiny_llava(seed=5, num_hidden_layers=1, hidden_size=96, num_attention_heads=6)
    )


class Counted(Learner):
    """A teacher that counts the samples that it runs on."""

    ran: list[int]

    def __call__(self, micro: MicroBatch) -> Outputs:
        self.ran.append(len(micro.keys or ()))
        return super().__call__(micro)


def counted(teacher: Learner, vocabulary: int | None = None) -> Counted:
    made = Counted(teacher.program, teacher.model, vocabulary)
    object.__setattr__(made, "ran", [])
    return made


def samples_of(records: Sequence[Any], options: Training, model: Any) -> Any:
    collate = Collator(tiny_processor(), model, names_pictures=True)
    return open_samples(list(records), list(records[:1]), options, collate)[0]


def kept(
    teacher: Learner,
    folder: Path,
    records: Sequence[Any] = RECORDS,
    fingerprint: str = "t",
    **fields: Any,
) -> Cached:
    options = rule(**fields)
    samples = samples_of(records, options, teacher.model)
    part = Part.of(samples, one_by_one(samples.batch), options)
    processor = {"kind": "tiny"}
    return cached_teacher(
        teacher, [part], options, folder, fingerprint=fingerprint, processor=processor
    )


def micro_of(teacher: Learner, numbers: Sequence[int], **fields: Any) -> MicroBatch:
    options = rule(**fields)
    batch = samples_of(RECORDS, options, teacher.model).batch(numbers)
    images, everywhere = bool(options.distillation.omega), options.labels == "all"
    return MicroBatch.read(teacher.model, batch, images=images, everywhere=everywhere)


def step(micro: MicroBatch, taught: Outputs, student: Learner) -> list[Tensor]:
    """Normalisers, terms and the gradients of a student's head input and hidden states."""
    objective = GraceObjective(omega_warmup=0)
    said = student(micro)
    assert isinstance(said.logits, LazyLogits) and isinstance(said.hidden, Tensor)
    given, hidden = (x.clone().requires_grad_() for x in (said.logits.hidden, said.hidden))
    outputs = Outputs(LazyLogits(given, said.logits.weight), hidden)
    normalisers = objective.normalisers(taught, micro.targets)
    terms = objective.terms(outputs, taught, micro.targets)
    loss = objective.loss(terms, normalisers, 0.7, 1)
    return [normalisers, terms.totals, terms.weights, *torch.autograd.grad(loss, (given, hidden))]


@pytest.fixture(scope="module")
def student(after: Any, llava: LlavaForConditionalGeneration) -> Learner:
    return Learner(after(TEACHER), llava)


def test_one_sample_is_learnt_with_the_same_bits_and_several_but_for_rounding(
    teacher: Learner, student: Learner, tmp_path: Path
) -> None:
    """Alone, what a teacher says is what was kept; padding changes the last bits of its matmuls."""
    cached = kept(teacher, tmp_path)
    assert (cached.read, cached.computed) == (0, len(RECORDS))
    for numbers in ([0], [3], [1, 0], [2, 3, 4, 5]):
        micro = micro_of(teacher, numbers)
        plain, found = teacher(micro), cached.teacher(micro)
        assert isinstance(plain.logits, LazyLogits) and isinstance(found.logits, LazyLogits)
        assert isinstance(found.hidden, Grams)
        if len(numbers) == 1:
            assert torch.equal(found.logits.hidden, plain.logits.hidden)
        expected, got = (step(micro, taught, student) for taught in (plain, found))
        if len(numbers) == 1:
            assert torch.equal(got[3], expected[3])  # of cross-entropy and L_GDKD
        for one, other in zip(got, expected, strict=True):
            bound = 1e-5 * other.abs().max().item() + 1e-9
            torch.testing.assert_close(one, other, rtol=0, atol=bound)
        assert (torch.equal(expected[0], expected[2]) and expected[1].all()) or numbers == [3]


def test_what_is_there_is_not_computed_again_whoever_asks(teacher: Learner, tmp_path: Path) -> None:
    first = counted(teacher)
    kept(first, tmp_path, RECORDS[:4])
    assert first.ran == [1] * 4
    again = counted(teacher)
    found = kept(again, tmp_path, micro_batch_size=1, lr=1.0)  # another recipe, more data
    assert (found.read, found.computed) == (4, 2) and again.ran == [1] * 2
    assert f"{tmp_path}" in found.notes[0]
    assert "4 samples were there, 2 were computed" in found.notes[0]
    third = counted(teacher)
    found = kept(third, tmp_path)
    assert (found.read, found.computed) == (len(RECORDS), 0) and not third.ran
    found = kept(third, tmp_path, labels="all")  # other positions are supervised
    assert found.computed == len(RECORDS)


def test_relations_are_added_where_they_were_not_asked_for(
    teacher: Learner, tmp_path: Path
) -> None:
    without = {"distillation": {"omega": 0}}
    assert kept(teacher, tmp_path, **without).computed == len(RECORDS)
    found = kept(teacher, tmp_path)
    assert (found.read, found.computed) == (0, len(RECORDS))
    assert kept(teacher, tmp_path, **without).read == len(RECORDS)
    said = found.teacher(micro_of(teacher, [0, 3], **without))
    assert said.hidden is None


def test_a_run_that_was_stopped_leaves_what_it_wrote(
    teacher: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = module.TeacherCache.add, []

    def add(self: Any, key: str, said: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(key)
        real(self, key, said)

    monkeypatch.setattr(module.TeacherCache, "add", add)
    with pytest.raises(KeyboardInterrupt):
        kept(teacher, tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*/whole/*"))
    again = counted(teacher)
    found = kept(again, tmp_path)
    assert (found.read, found.computed) == (3, 3) and again.ran == [1] * 3


def test_another_teacher_processor_or_dtype_has_files_of_its_own(
    teacher: Learner, tmp_path: Path
) -> None:
    kept(teacher, tmp_path, RECORDS[:1])
    assert kept(teacher, tmp_path, RECORDS[:1], fingerprint="other").computed == 1
    assert len(list(tmp_path.iterdir())) == 2
    (own,) = {kept(teacher, tmp_path, RECORDS[:1]).teacher.cache.folder}
    about = own / "about.json"
    about.write_text(about.read_text().replace(torch.__version__, "1.0"))
    _, note = kept(teacher, tmp_path, RECORDS[:1]).notes
    assert f"begun with torch 1.0, not {torch.__version__}: what is read may differ" in note


def test_a_sample_is_its_tokens_its_positions_and_its_pictures(teacher: Learner) -> None:
    def keys(records: list[dict[str, Any]], **fields: Any) -> tuple[str, ...]:
        options = rule(**fields)
        batch = samples_of(records, options, teacher.model).batch(range(len(records)))
        everywhere = options.labels == "all"
        return MicroBatch.read(teacher.model, batch, everywhere=everywhere).keys or ()

    plain = keys(RECORDS)
    assert len(set(plain)) == len(RECORDS) and keys(RECORDS[2:3]) == plain[2:3]  # unpadded
    assert keys(RECORDS[:1], labels="all") != plain[:1]
    for change in ({"image": tiny_image(77)}, {"question": "what ?"}, {"answer": "blue"}):
        assert keys([{**RECORDS[0], **change}]) != plain[:1]


def test_the_size_is_told_before_anything_is_written_and_what_does_not_fit_is_refused(
    teacher: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Any = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        GracecError, match=r"answers to 6 samples take about 0\.\d+ MB .* are 0.001 MB free"
    ):
        kept(teacher, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_is_missing_or_damaged_is_named(teacher: Learner, tmp_path: Path) -> None:
    cached, micro = kept(teacher, tmp_path), micro_of(teacher, [0, 1])
    assert micro.keys is not None
    file = cached.teacher.cache.file(micro.keys[1])
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(GracecError, match="not readable: .*; remove it"):
        cached.teacher(micro)
    file.unlink()
    with pytest.raises(GracecError, match="a sample is not in the teacher's cache; remove .*whole"):
        cached.teacher(micro)
    nameless = MicroBatch(micro.inputs, micro.index, micro.labels, micro.shape)
    with pytest.raises(GracecError, match="does not say which pictures its samples have"):
        cached.teacher(nameless)
    whole = run_passes(
        capture(tiny_llava(num_hidden_layers=1)),
        parse_pipeline("analyze-modality,select-supervised"),
    ).program
    with pytest.raises(GracecError, match="cannot be computed from what goes into its head; leave"):
        kept(Learner(whole, teacher.model), tmp_path)


def test_of_a_teacher_in_files_nothing_but_the_head_stays(tmp_path: Path) -> None:
    model = tiny_llava(num_hidden_layers=1)
    own, decoder = learner_of(model), weakref.ref(model.model.language_model.layers[0])
    micro, cached = micro_of(own, [0, 1]), kept(own, tmp_path)
    del own, model
    gc.collect()
    assert decoder() is None
    assert [len(one) for one in cached.teacher.tensors()] == [VOCAB_SIZE]
    assert isinstance(cached.teacher(micro).hidden, Grams)


def test_each_rank_computes_its_share(
    teacher: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(2):
        ranks = SimpleNamespace(
            is_available=lambda: True,
            is_initialized=lambda: True,
            get_rank=lambda rank=rank: rank,
            get_world_size=lambda: 2,
            all_reduce=lambda counts: counts.mul_(2),  # what the other one says is the same
        )
        monkeypatch.setattr(module, "dist", ranks)
        own = counted(teacher)
        found = kept(own, tmp_path)
        assert (found.read, found.computed, own.ran) == (0, len(RECORDS), [1] * 3)
        for done in tmp_path.glob("*/whole/*"):
            done.unlink()  # the first rank says so when all are done
    monkeypatch.undo()
    assert kept(teacher, tmp_path).read == len(RECORDS)


def test_broken_samples_are_left_out(teacher: Learner, tmp_path: Path) -> None:
    options = rule()
    samples = samples_of(RECORDS[:3], options, teacher.model)

    def batch(numbers: Sequence[int]) -> Any:
        if numbers == [1]:
            raise EmptyBatch("broken")
        return samples.batch(numbers)

    part = Part(one_by_one(batch), 3, "data")
    found = cached_teacher(teacher, [part], options, tmp_path, fingerprint="t", processor={})
    assert found.computed == 2


def test_a_folder_is_the_one_named_or_among_the_users_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert folder_of("some/where") == Path("some/where")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder_of(True) == tmp_path / "gracec" / "teachers"


def test_a_training_with_it_is_the_training_without(tmp_path: Path) -> None:
    """Where the teacher also chooses the state that is kept."""
    training = {"steps": 2, "batch_size": 2, "held_out": 0.3, "labels": "all"}
    training["distillation"] = {"omega_warmup": 0}
    fields = {"name": "test", "weights": {"decoder": {"group_size": 32}}}
    rows, model, other = [], tiny_llava(tie=True), tiny_llava(seed=3)
    for cache in (False, str(tmp_path)):
        of = {**fields, "training": {**training, "teacher_cache": cache}}
        report = gracec.compile(
            model,
            gracec.Recipe.from_dict(of),
            teacher=other,
            train_data=RECORDS,
            processor=tiny_processor(),
            progress=False,
        ).report
        rows.append(report.training["rows"] + report.training["held_out"])
        notes = [note.text for note in report.notes if note.text.startswith("teacher cache")]
    assert len(notes) == 1 and notes[0].endswith("0 samples were there, 6 were computed")
    for plain, found in zip(*rows, strict=True):
        for name, value in plain.items():
            wanted = value if value is None else pytest.approx(value, rel=1e-4)
            assert found[name] == wanted, name


def test_a_cache_needs_a_teacher() -> None:
    with pytest.raises(ValueError, match="teacher_cache needs a term that has a teacher"):
        rule(teacher_cache=True, distillation={"kind": "none", "omega": 0})
