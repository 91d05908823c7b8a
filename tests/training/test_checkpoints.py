import hashlib
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gracec import directories
from gracec.errors import GracecError, GracecWarning
from gracec.objective.controllers import DualAscentController
from gracec.training.checkpoints import directory as module
from gracec.training.checkpoints import fingerprint
from gracec.training.checkpoints.directory import check_run, latest_checkpoint, save_checkpoint
from gracec.training.checkpoints.fingerprint import (
    Fingerprint,
    describe_device,
    fingerprint_of_json,
    fingerprint_of_tensors,
)
from gracec.training.checkpoints.optimizer import (
    OptimizerState,
    load_optimizer_state,
    optimizer_state,
)
from gracec.training.checkpoints.rng import rng_state, set_rng_state
from gracec.training.checkpoints.sealed import (
    CONTENTS,
    TENSORS,
    Checkpoint,
    load_checkpoint,
    load_tensors,
)
from tests.children import in_a_child
from tests.test_store import snapshot

CPU = torch.device("cpu")
RUN = Fingerprint(model="a" * 64, teacher="", data="d" * 64, processor="p", recipe="r")


class Toy(nn.Module):
    """Weights of two dtypes, one of them unused, so that it never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(8, 16)
        self.head = nn.Linear(16, 1, dtype=torch.bfloat16)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(self.body(x).tanh(), 0.25, training=True)
        result: Tensor = self.head(hidden.to(torch.bfloat16))
        return result.float()


class Trainer:
    """A run whose steps draw from every generator and depend on all that a checkpoint holds."""

    def __init__(self) -> None:
        self.model = Toy()
        self.names = dict(self.model.named_parameters())
        decay = [self.names["body.weight"], self.names["unused"]]
        rest = [self.names[name] for name in ("body.bias", "head.weight", "head.bias")]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "lr": 0.02}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
        self.controller = DualAscentController(tau=0.5, eta=0.1, ema_decay=0.7)
        self.step = 0
        self.best: dict[str, Tensor] = {}
        self.best_score: float | None = None
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)

    def train(self, steps: int) -> "Trainer":
        for _ in range(steps):
            x = torch.randn(4, 8) + float(numpy.random.standard_normal()) + random.gauss(0, 1)
            loss = self.controller.beta * (self.model(x) - x.sum(1, keepdim=True)).abs().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.optimizer.param_groups[0]["lr"] *= 0.9
            self.controller.update(loss.detach())
            self.step += 1
            if self.best_score is None or loss.item() < self.best_score:
                self.best_score = loss.item()
                self.best = {name: value.detach().clone() for name, value in self.names.items()}
        return self

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(
            step=self.step,
            epoch=self.step // 4,
            sample=self.step % 4,
            tensors=self.names,
            optimizer=optimizer_state(self.optimizer, self.names),
            controller=self.controller.state_dict(),
            rng=rng_state(CPU),
            best=self.best,
            best_score=self.best_score,
        )

    def save(self, directory: Path, **options: int) -> Path:
        return save_checkpoint(self.checkpoint(), RUN, directory, **options)

    @classmethod
    def resumed(cls, directory: Path) -> "Trainer":
        path = latest_checkpoint(directory)
        assert path is not None
        found, new = load_checkpoint(path, RUN), cls()
        new.train(2)  # whatever it holds must give way, the state of the optimizer too
        load_tensors(found.tensors, new.names)
        load_optimizer_state(new.optimizer, new.names, found.optimizer)
        new.controller.load_state_dict(dict(found.controller))
        new.step, new.best, new.best_score = found.step, dict(found.best), found.best_score
        set_rng_state(found.rng, CPU)
        return new

    def everything(self) -> str:
        """One text for all that a run is; two runs with the same bits have the same."""
        held = self.checkpoint()
        tensors = {**held.tensors, **held.optimizer.tensors}
        tensors |= {f"best {k}": v for k, v in held.best.items()}
        tensors |= {f"rng {k}": v for k, v in held.rng.tensors.items()}
        texts = [repr(held.optimizer.scalars), repr(held.controller), repr(held.rng.scalars)]
        return "\n".join([fingerprint_of_tensors(tensors), *texts, repr((held.step, held.epoch))])


@pytest.fixture(scope="module", autouse=True)
def _generators() -> Iterator[None]:
    """Other tests go on with the numbers that they would have drawn without these."""
    before = rng_state(CPU)
    yield
    set_rng_state(before, CPU)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 2 and 4."""
    trainer = Trainer()
    for _ in range(2):
        trainer.train(2).save(tmp_path / "run")
    return tmp_path / "run"


@cache
def straight(steps: int) -> str:
    """What a run is that was never interrupted."""
    return Trainer().train(steps).everything()


def listed(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Round trips


def test_every_tensor_comes_back_byte_for_byte(tmp_path: Path) -> None:
    bits = torch.tensor([0, 1, -1, 0x7FC12345, -0x3EDCB], dtype=torch.int32)
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "float32 with NaN, -0 and denormals": bits.view(torch.float32),
        "bfloat16": bits.view(torch.bfloat16),
        "float16": bits.view(torch.float16),
        "float64": torch.tensor(0.1, dtype=torch.float64),
        "int8": torch.tensor([[-128, 127]], dtype=torch.int8),
        "bool": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "transposed": whole.t(),
        "a/name.with/slashes": whole[1:, 1],
        "whole": whole,
        "tied": whole,
        "parameter": nn.Parameter(torch.tensor([0.1, 0.2])),
    }
    held = replace(Trainer().train(1).checkpoint(), tensors=tensors, best={"whole": whole + 1})
    path = save_checkpoint(held, RUN, tmp_path)
    found = load_checkpoint(path, RUN)
    assert listed(path) == [CONTENTS, TENSORS]
    assert {file.stat().st_mode & 0o044 for file in path.iterdir()} == {0o044}
    for kind, before, after in (
        ("tensors", held.tensors, found.tensors),
        ("best", held.best, found.best),
        ("optimizer", held.optimizer.tensors, found.optimizer.tensors),
        ("rng", held.rng.tensors, found.rng.tensors),
    ):
        assert before.keys() == after.keys(), kind
        for name, value in before.items():
            assert raw(after[name]) == raw(value), name
            assert not after[name].requires_grad
            assert after[name].data_ptr() % 64 == 0, "where torch itself puts tensors"


def raw(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, data.numpy().tobytes()


finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=15, deadline=None)
@given(
    controller=st.dictionaries(st.text(max_size=3), finite | st.none() | st.booleans()),
    extra=st.dictionaries(st.text(max_size=3), json_values, max_size=3),
    score=finite | st.none(),
    counts=st.tuples(*[st.integers(0, 10**9)] * 5),
)
def test_every_number_comes_back_as_it_was(
    controller: dict[str, Any], extra: dict[str, Any], score: float | None, counts: tuple[int, ...]
) -> None:
    names = ("step", "epoch", "sample", "skipped_in_a_row", "skipped_total")
    held = replace(
        Trainer().checkpoint(),
        controller=controller,
        extra=extra,
        best_score=score,
        **dict(zip(names, counts, strict=True)),
    )
    with tempfile.TemporaryDirectory() as directory:
        found = load_checkpoint(save_checkpoint(held, RUN, Path(directory)), RUN)
    assert tuple(getattr(found, name) for name in names) == counts
    # repr tells -0.0 from 0.0, True from 1, and gives every bit of a float
    assert repr(sorted(found.controller.items())) == repr(sorted(controller.items()))
    assert repr(found.best_score) == repr(score)
    assert canonical(found.extra) == canonical(extra)


def canonical(value: Any) -> str:
    if isinstance(value, dict):
        return repr(sorted((key, canonical(item)) for key, item in value.items()))
    return repr([canonical(item) for item in value]) if isinstance(value, list) else repr(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"controller": {"ema": float("nan")}}, "controller.ema: nan is not a finite number"),
        ({"extra": {"a": [1, float("inf")]}}, r"extra.a\[1\]: inf is not a finite number"),
        ({"extra": {"a": (1, 2)}}, "extra.a: tuple is not a JSON value"),
        ({"extra": {"a": numpy.float32(1)}}, "extra.a: float32 is not a JSON value"),
        ({"extra": {1: 2}}, "extra: the key 1 is no text"),
        ({"best_score": float("-inf")}, "best_score: -inf is not a finite number"),
        ({"step": -1}, "step: -1 is not a count"),
        ({"sample": True}, "sample: True is not a count"),
        ({"tensors": {"w": torch.empty(2, device="meta")}}, "w is no ordinary dense tensor"),
        ({"tensors": {"w": torch.eye(2).to_sparse()}}, "w is no ordinary dense tensor"),
        ({"tensors": {"w": torch.zeros(1, dtype=torch.complex128)}}, "cannot hold .*complex128"),
    ],
)
def test_what_would_not_come_back_is_refused_and_nothing_is_written(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(GracecError, match=message):
        save_checkpoint(replace(Trainer().checkpoint(), **change), RUN, tmp_path / "run")
    assert not (tmp_path / "run").exists() or listed(tmp_path / "run") == []


def test_the_generators_go_on_where_they_were() -> None:
    def draw() -> tuple[Any, ...]:
        # an odd number of normal numbers leaves the second of a pair in each generator
        torch_ones = torch.randn(3).tolist() + torch.rand(2).tolist()
        python_ones = [random.gauss(0, 1), random.random()]
        return torch_ones, python_ones, numpy.random.standard_normal(3).tolist()

    draw()
    state = rng_state(CPU)
    assert state.scalars["python"]["gauss"] is not None
    assert state.scalars["numpy"]["has_gauss"] == 1
    first, second = draw(), draw()
    assert first != second
    set_rng_state(state, CPU)
    assert (draw(), draw()) == (first, second)


def test_only_the_device_of_a_training_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    state = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device) or state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: asked.append(device))
    assert "device" not in rng_state(CPU).tensors
    found = rng_state(torch.device("cuda:1"))
    assert torch.equal(found.tensors["device"], state)
    set_rng_state(found, torch.device("cuda:0"))
    assert asked == [torch.device("cuda:1"), torch.device("cuda:0")]


def test_another_generator_of_numpy_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    other = numpy.random.PCG64(1).state
    monkeypatch.setattr(numpy.random, "get_state", lambda legacy: other)
    with pytest.raises(GracecError, match="numpy.random draws from PCG64"):
        rng_state(CPU)


# Going on


@settings(max_examples=12, deadline=None)
@given(total=st.integers(1, 12), data=st.data())
def test_a_resumed_run_has_the_bits_of_one_that_was_never_interrupted(
    total: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, total))
    with tempfile.TemporaryDirectory() as directory:
        Trainer().train(cut).save(Path(directory))
        assert Trainer.resumed(Path(directory)).train(total - cut).everything() == straight(total)


def test_five_steps_and_five_more_are_ten(tmp_path: Path) -> None:
    Trainer().train(5).save(tmp_path)
    resumed = Trainer.resumed(tmp_path)
    assert resumed.everything() == straight(5)
    ten = resumed.train(5)
    assert ten.everything() == straight(10)
    assert ten.everything() != straight(11)
    for name, value in Trainer().train(10).names.items():
        assert raw(ten.names[name]) == raw(value), name


@pytest.mark.parametrize("piece", ["tensors", "optimizer", "controller", "rng"])
def test_every_piece_is_needed_for_that(piece: str, tmp_path: Path) -> None:
    Trainer().train(5).save(tmp_path)
    other = getattr(Trainer().train(4).checkpoint(), piece)
    path = latest_checkpoint(tmp_path)
    assert path is not None
    forged = replace(load_checkpoint(path, RUN), **{piece: other})
    save_checkpoint(forged, RUN, tmp_path)
    assert Trainer.resumed(tmp_path).train(5).everything() != straight(10)


# The optimizer


def test_the_state_of_an_optimizer_goes_by_names_and_not_by_order() -> None:
    first = Trainer().train(3)
    state = first.checkpoint().optimizer
    assert {
        f"state/{name}/{key}"
        for name in ("body.weight", "body.bias", "head.weight", "head.bias")
        for key in ("step", "exp_avg", "exp_avg_sq")
    } == state.tensors.keys()
    assert state.tensors["state/head.weight/exp_avg"].dtype == torch.bfloat16
    assert state.tensors["state/body.bias/step"].item() == 3

    second = Trainer().train(1)
    second.optimizer.param_groups.reverse()
    for group in second.optimizer.param_groups:
        group["params"].reverse()
    stale = second.names["unused"]
    second.optimizer.state[stale] = {"step": torch.tensor(9.0)}
    load_optimizer_state(second.optimizer, second.names, state)
    assert stale not in second.optimizer.state
    for name, parameter in second.names.items():
        if parameter is not stale:
            held = second.optimizer.state[parameter]
            wanted = first.optimizer.state[first.names[name]]
            assert {key: raw(held[key]) for key in held} == {
                key: raw(wanted[key]) for key in wanted
            }
            assert all(held[key].data_ptr() != wanted[key].data_ptr() for key in held)
    for mine, theirs in zip(
        second.optimizer.param_groups, reversed(first.optimizer.param_groups), strict=True
    ):
        options = [{k: v for k, v in g.items() if k != "params"} for g in (mine, theirs)]
        assert options[0] == options[1]
        assert isinstance(mine["betas"], tuple)


def test_states_keep_their_dtype_and_the_layout_of_their_parameter() -> None:
    """`Optimizer.load_state_dict` would cast the float32 state to the parameter's bfloat16."""
    image = torch.empty(2, 3, 4, 4, dtype=torch.bfloat16)
    weight = nn.Parameter(image.to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    exact = torch.rand(2, 3, 4, 4)
    odd = torch.rand(5)
    optimizer.state[weight] = {"momentum_buffer": exact, "odd": odd, "count": 3, "text": "a"}
    state = optimizer_state(optimizer, {"w": weight})
    optimizer.state.clear()
    load_optimizer_state(optimizer, {"w": weight}, state)
    held = optimizer.state[weight]
    assert raw(held["momentum_buffer"]) == raw(exact)
    assert held["momentum_buffer"].stride() == weight.stride()
    assert raw(held["odd"]) == raw(odd)
    assert (held["count"], held["text"]) == (3, "a")


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2))
    rate = torch.tensor(0.1)
    optimizer = torch.optim.AdamW([weight], lr=rate, capturable=False, foreach=False)
    held = replace(Trainer().checkpoint(), optimizer=optimizer_state(optimizer, {"w": weight}))
    path = save_checkpoint(held, RUN, tmp_path)
    rate.fill_(7)
    optimizer.param_groups[0]["later"] = 1
    load_optimizer_state(optimizer, {"w": weight}, load_checkpoint(path, RUN).optimizer)
    assert optimizer.param_groups[0]["lr"] is rate
    assert raw(rate) == raw(torch.tensor(0.1))
    assert "later" not in optimizer.param_groups[0]


def test_another_optimizer_is_refused() -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    names = {"a": a, "b": b, "c": c}
    state = optimizer_state(torch.optim.AdamW([a, b]), names)
    for parameters, message in (
        ([a, b, c], "optimizer: only this optimizer has c"),
        ([a], "optimizer: only the checkpoint has b"),
        ([{"params": [a]}, {"params": [b]}], "optimizer: a was in a group of other parameters"),
    ):
        with pytest.raises(GracecError, match=message):
            load_optimizer_state(torch.optim.AdamW(parameters), names, state)
    with pytest.raises(GracecError, match=r"group 0 of the optimizer: .*\[2\] has no name"):
        optimizer_state(torch.optim.AdamW([a, b]), {"a": a})
    optimizer = torch.optim.AdamW([a])
    optimizer.state[a]["history"] = [torch.ones(1)]
    with pytest.raises(GracecError, match=r"optimizer.state.a.scalars.history\[0\]: Tensor is not"):
        optimizer_state(optimizer, names)


def test_weights_are_copied_in_place_and_only_onto_their_like() -> None:
    live = {"w": nn.Parameter(torch.zeros(2))}
    load_tensors({"w": torch.ones(2)}, live)
    assert live["w"].tolist() == [1, 1]
    for saved, message in (
        ({}, "only the model has w"),
        ({"w": torch.ones(2), "v": torch.ones(2)}, "only the checkpoint has v"),
        ({"w": torch.ones(1)}, r"w is torch.float32 \[2\] in the model and torch.float32 \[1\]"),
        ({"w": torch.ones(2, dtype=torch.bfloat16)}, "and torch.bfloat16 .* in the checkpoint"),
    ):
        with pytest.raises(GracecError, match=message):
            load_tensors(saved, live)
    assert live["w"].tolist() == [1, 1]


# Interruptions

WRITING = ["created", "tensors written", "filled", "flushed", "in place", "cleaned", "written"]
POINTS = [*WRITING, "unlisted", "removed"]
AGAIN = ["set aside", *WRITING, "unlisted", "removed"]


def interrupted(
    point: str, log: Path, patch: pytest.MonkeyPatch, how: Callable[[], None]
) -> Callable[[], None]:
    """Have the sequence of a save end at a point; a function that takes that back."""

    def reached(name: str) -> None:
        with log.open("a") as file:
            file.write(f"{name}\n")
        if name == point:
            how()

    patch.setattr(directories, "reached", reached)
    return patch.undo


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def press_control_c() -> None:
    raise KeyboardInterrupt


def save_until_killed(point: str, steps: int, run: Path, log: Path) -> None:
    held = Trainer.resumed(run).train(steps).checkpoint()
    with pytest.MonkeyPatch.context() as patch:
        interrupted(point, log, patch, kill)
        save_checkpoint(held, RUN, run, keep=1)


@pytest.mark.parametrize(
    ("point", "steps"), [*((point, 2) for point in POINTS), *((point, 0) for point in AGAIN)]
)
def test_a_run_that_is_killed_while_it_saves_goes_on_with_the_same_bits(
    point: str, steps: int, tmp_path: Path
) -> None:
    """At any point, also where the checkpoint of the same step is written again.

    One checkpoint is kept, so that there is no other to fall back on.
    """
    run, log, sequence = tmp_path / "run", tmp_path / "log", POINTS if steps else AGAIN
    Trainer().train(4).save(run, keep=1)
    assert in_a_child(save_until_killed, point, steps, run, log) == signal.SIGKILL
    assert log.read_text().splitlines() == sequence[: sequence.index(point) + 1]

    in_place = sequence.index(point) >= sequence.index("in place")
    resumed = Trainer.resumed(run)
    assert resumed.step == (4 + steps if in_place else 4)
    resumed.save(run, keep=1)  # of the same step, over whatever is left of the interrupted one
    resumed.train(8 - resumed.step).save(run, keep=1)
    assert resumed.everything() == straight(8)
    assert Trainer.resumed(run).everything() == straight(8)
    assert listed(run) == ["step-00000008"]


@pytest.mark.parametrize("point", AGAIN)
def test_a_save_that_is_stopped_from_the_keyboard_leaves_the_run_as_it_was(
    point: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(saved)
    later = replace(Trainer.resumed(saved).checkpoint(), best_score=-1.0)
    undo = interrupted(point, tmp_path / "log", monkeypatch, press_control_c)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(later, RUN, saved)
    undo()
    latest = latest_checkpoint(saved)
    assert latest == saved / "step-00000004"
    if AGAIN.index(point) < AGAIN.index("in place"):
        assert snapshot(saved) == before
    else:
        assert load_checkpoint(latest, RUN).best_score == -1.0


def save_with_small_files(run: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    for step in (4, 5):
        checkpoint = Trainer().train(step).checkpoint()
        message = f"step-0000000{step}: cannot be written: .*File too large"
        with pytest.raises(GracecError, match=message):
            save_checkpoint(checkpoint, RUN, run)


def test_a_full_disk_is_one_line_and_the_checkpoints_stay(saved: Path) -> None:
    """A real limit of the system, on the size of files, reached inside of safetensors."""
    before = snapshot(saved)
    assert in_a_child(save_with_small_files, saved) == 0
    assert snapshot(saved) == before
    assert listed(saved) == ["step-00000002", "step-00000004"]


def test_a_run_directory_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(GracecError, match="cannot be written: "):
        Trainer().save(tmp_path / "run")


# The directory of a run


def test_older_checkpoints_go_and_nothing_else(tmp_path: Path) -> None:
    for name in ("step-1", ".step-notes", "step-00000001.bak", "step-00000001-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000000").write_text("a file")
    (tmp_path / ".step-00000009.removed").mkdir()
    foreign = [name for name in listed(tmp_path) if name != ".step-00000009.removed"]
    assert latest_checkpoint(tmp_path) is None
    trainer = Trainer()
    for step in (1, 2, 3, 4):
        path = trainer.train(1).save(tmp_path, keep=3)
        assert path == tmp_path / f"step-0000000{step}" == latest_checkpoint(tmp_path)
        kept = [f"step-0000000{n}" for n in range(max(1, step - 2), step + 1)]
        assert listed(tmp_path) == sorted([*foreign, *kept])
    trainer.train(1).save(tmp_path)
    assert listed(tmp_path) == sorted([*foreign, "step-00000004", "step-00000005"])
    with pytest.raises(GracecError, match="keep is 0"):
        trainer.train(1).save(tmp_path, keep=0)


def test_there_is_no_latest_checkpoint_where_there_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    assert latest_checkpoint(tmp_path) is None


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    held = Trainer().checkpoint()
    save_checkpoint(replace(held, step=99_999_999), RUN, tmp_path)
    path = save_checkpoint(replace(held, step=100_000_000), RUN, tmp_path)
    assert path.name == "step-100000000"
    assert latest_checkpoint(tmp_path) == path


def cut_short(path: Path) -> None:
    (path / TENSORS).write_bytes((path / TENSORS).read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / TENSORS).read_bytes())
    content[-1] ^= 1
    (path / TENSORS).write_bytes(content)


def change_a_digit(path: Path) -> None:
    contents = json.loads((path / CONTENTS).read_text())
    contents["contents"]["controller"]["beta"] += 1e-9
    (path / CONTENTS).write_text(json.dumps(contents))


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (cut_short, f"{TENSORS} is not what was written \\(sha256 differs\\)"),
    (flip_a_bit, f"{TENSORS} is not what was written \\(sha256 differs\\)"),
    (lambda path: (path / TENSORS).unlink(), f"{TENSORS} cannot be read: No such file"),
    (lambda path: (path / CONTENTS).unlink(), f"{CONTENTS}: no such file"),
    (lambda path: (path / CONTENTS).write_text("{"), f"{CONTENTS}: not readable as JSON"),
    (lambda path: (path / CONTENTS).write_bytes(b"\xff"), f"{CONTENTS}: not readable as UTF-8"),
    (lambda path: (path / CONTENTS).write_text("[]"), f"{CONTENTS}: not a JSON object but a list"),
    (change_a_digit, f"{CONTENTS} is not what was written"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_taken(
    damage: Callable[[Path], object], message: str, saved: Path
) -> None:
    newest = saved / "step-00000004"
    damage(newest)
    with pytest.raises(GracecError, match=f"step-00000004: {message}.*; remove it"):
        load_checkpoint(newest, RUN)
    with pytest.warns(GracecWarning, match=f"{newest}: .* damaged .*: {message}") as found:
        assert latest_checkpoint(saved) == saved / "step-00000002"
    assert len(found) == 1
    with pytest.warns(GracecWarning):
        resumed = Trainer.resumed(saved)
    resumed.train(1).save(saved)
    assert listed(saved) == ["step-00000002", "step-00000003"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Trainer.resumed(saved).train(5).everything() == straight(8)


def test_without_a_whole_checkpoint_there_is_none(saved: Path) -> None:
    for path in saved.iterdir():
        cut_short(path)
    with pytest.warns(GracecWarning) as found:
        assert latest_checkpoint(saved) is None
    assert len(found) == 2


def test_a_checkpoint_that_lacks_a_file_does_not_push_out_a_whole_one(saved: Path) -> None:
    (saved / "step-00000004" / TENSORS).unlink()
    with pytest.warns(GracecWarning):
        Trainer.resumed(saved).train(4).save(saved)
    assert listed(saved) == ["step-00000002", "step-00000006"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(saved: Path) -> None:
    cut_short(saved / "step-00000004")
    with pytest.warns(GracecWarning):
        Trainer.resumed(saved).train(2).save(saved)
    assert Trainer.resumed(saved).everything() == straight(4)
    assert listed(saved) == ["step-00000002", "step-00000004"]


def test_what_another_version_wrote_is_neither_damaged_nor_removed(saved: Path) -> None:
    file = saved / "step-00000004" / CONTENTS
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    before = snapshot(saved)
    message = "step-00000004: format version 99, this gracec reads 1"
    with pytest.raises(GracecError, match=message):
        load_checkpoint(file.parent, RUN)
    with pytest.raises(GracecError, match=message):
        latest_checkpoint(saved)
    with pytest.raises(GracecError, match=message):
        Trainer().train(5).save(saved)
    assert snapshot(saved) == before


def test_an_old_checkpoint_that_cannot_be_removed_stops_nothing(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module, "remove", refuse)
    message = "step-00000002: an old checkpoint cannot be removed: Operation not permitted"
    with pytest.warns(GracecWarning, match=message):
        path = Trainer.resumed(saved).train(1).save(saved)
    assert latest_checkpoint(saved) == path


# Fingerprints


@pytest.mark.parametrize(
    ("name", "now", "difference", "remedy"),
    [
        ("model", "b" * 64, "the model changed .* \\(then a{12}, now b{12}\\)", "the model it was"),
        ("model", "a" * 63 + "b", "then a{64}, now a{63}b", "start again in another directory"),
        ("teacher", "t" * 9, "the teacher changed .*\\(then none, now t{9}\\)", "the teacher it"),
        ("data", "e" * 64, "the data changed since the checkpoint was written", "the data it was"),
        ("processor", "q", "the processor changed .*\\(then p, now q\\)", "the processor it was"),
        ("recipe", "s", "the recipe changed", "the recipe it was written with"),
        ("torch", "1.0", "was written by torch .* and this is 1.0", "install torch "),
        ("gracec", "99", "was written by gracec .* and this is 99", "install gracec "),
        ("device", "abacus", "was written on .* and this is abacus", "go on where it was written"),
        (
            "threads",
            RUN.threads + 1,
            f"with {RUN.threads} threads and this process has {RUN.threads + 1}",
            f"set OMP_NUM_THREADS={RUN.threads}",
        ),
    ],
)
def test_a_run_that_is_not_the_same_is_refused(
    name: str, now: str | int, difference: str, remedy: str, saved: Path
) -> None:
    other = replace(RUN, **{name: now})
    path = saved / "step-00000004"
    with pytest.raises(GracecError, match=f"step-00000004: .*{difference}") as refused:
        load_checkpoint(path, other)
    assert remedy in refused.value.fix
    assert "\n" not in str(refused.value)
    before = snapshot(saved)
    for step in (4, 6):
        with pytest.raises(GracecError, match=f"a checkpoint of another run: .*{difference}"):
            save_checkpoint(replace(Trainer().checkpoint(), step=step), other, saved)
    assert snapshot(saved) == before


def test_equal_fingerprints_differ_in_nothing_and_the_first_field_is_named() -> None:
    assert RUN.difference(replace(RUN)) == ""
    assert "the data changed" in RUN.difference(replace(RUN, threads=99, data="x"))
    assert RUN.threads == torch.get_num_threads()
    assert RUN.torch == torch.__version__
    assert RUN.device == describe_device(torch.device("cpu"))


def test_a_run_that_starts_again_does_not_overwrite_one_that_is_further(saved: Path) -> None:
    before = snapshot(saved)
    with pytest.raises(GracecError, match="step-00000004: .* of a later step than 3; resume"):
        Trainer().train(3).save(saved)
    with pytest.raises(GracecError, match="of a later step than 0; resume"):
        check_run(saved, RUN)
    check_run(saved, RUN, step=4)
    assert snapshot(saved) == before
    shutil.rmtree(saved)
    check_run(saved, RUN)


def test_tensors_have_the_fingerprint_of_their_names_types_shapes_and_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bits = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    half = bits.view(torch.bfloat16)
    expected = hashlib.sha256(b'["a", "torch.bfloat16", [2, 3]]\n')
    expected.update(bits.numpy().tobytes())
    expected.update(b'["b", "torch.float32", []]\n' + numpy.float32(1).tobytes())
    one = torch.tensor(1.0)
    found = fingerprint_of_tensors({"b": one, "a": half})
    assert found == expected.hexdigest()
    assert found == fingerprint_of_tensors({"a": half.t().contiguous().t(), "b": nn.Parameter(one)})
    monkeypatch.setattr(fingerprint, "CHUNK", 2)
    assert found == fingerprint_of_tensors({"a": half, "b": one})
    zero, different = torch.zeros(2), set()
    for tensors in (
        {},
        {"a": zero},
        {"b": zero},
        {"a": -zero},
        {"a": zero.to(torch.bfloat16)},
        {"a": zero.view(torch.int32)},
        {"a": zero.reshape(1, 2)},
        {"a": zero, "b": zero},
        {"a": torch.empty(0)},
        {"a": torch.empty(0, 2)},
    ):
        different.add(fingerprint_of_tensors(tensors))
    assert len(different) == 10
    with pytest.raises(GracecError, match="w is no ordinary dense tensor"):
        fingerprint_of_tensors({"w": torch.empty(1, device="meta")})


def test_plain_data_has_a_fingerprint_whatever_the_order_of_its_keys() -> None:
    value = {"a": [1, 2.0, "ä"], "b": None}
    assert fingerprint_of_json(value) == fingerprint_of_json({"b": None, "a": [1, 2.0, "ä"]})
    text = '{"a":[1,2.0,"\\u00e4"],"b":null}'
    assert fingerprint_of_json(value) == hashlib.sha256(text.encode()).hexdigest()
    values: list[Any] = [1, 1.0, True, "1", [1], None, [], {}, [[]], "", -0.0, 0.0]
    assert len({fingerprint_of_json(value) for value in values}) == len(values)
    with pytest.raises(GracecError, match="value.a: nan is not a finite number"):
        fingerprint_of_json({"a": float("nan")})


def test_an_optimizer_state_unpacks_into_tensors_and_scalars() -> None:
    trainer = Trainer().train(1)
    tensors, scalars = optimizer_state(trainer.optimizer, trainer.names)
    load_optimizer_state(trainer.optimizer, trainer.names, OptimizerState(tensors, scalars))
    assert scalars["groups"][0]["parameters"] == ["body.weight", "unused"]
    assert set(scalars["state"]) == set(trainer.names) - {"unused"}
