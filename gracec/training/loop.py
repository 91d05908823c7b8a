"""The training loop: a student program learns from labels and from a teacher program.

    for each optimizer step:  quantize the weights
                              normalisers of all micro-batches, summed over ranks
                              loss of each micro-batch, backward
                              gradients of quantized weights -> of weights and scales
                              clip, AdamW, β

Both are captured graphs. The student's computes with fake-quantized weights, so that weights and
scales learn what rounding does; the teacher's runs without gradients. Nothing in a graph is random,
so a run is decided by its data order, and a checkpoint at an optimizer step resumes bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gracec._memory import trim
from gracec.data.collate import EmptyBatch
from gracec.data.conversations import epoch_order
from gracec.errors import GracecError
from gracec.objective import EpochLagrangianController, Outputs, means
from gracec.passes.insert_fake_quant import signs_of_scales
from gracec.quant.frozen import FrozenWeight
from gracec.recipe import Training
from gracec.training.blocks import in_blocks
from gracec.training.candidate import tensors_of, write_codes
from gracec.training.checkpoints.directory import latest_checkpoint, save_checkpoint
from gracec.training.checkpoints.fingerprint import Fingerprint
from gracec.training.checkpoints.optimizer import load_optimizer_state, optimizer_state
from gracec.training.checkpoints.rng import rng_state, set_rng_state
from gracec.training.checkpoints.sealed import Checkpoint, load_checkpoint, load_tensors
from gracec.training.curve import METRICS, Curve, Seconds, append_metrics, write_metrics
from gracec.training.forward import Forward
from gracec.training.learner import LaterTeacher, Learner, Teacher, compiled, score
from gracec.training.loader import Batches, Groups
from gracec.training.micro_batch import Batch, MicroBatch
from gracec.training.quantized_weights import QuantizedWeights
from gracec.training.setup import (
    allow_mixed_precision,
    capacity,
    controller_of,
    in_fixed_order,
    objective_of,
    parameter_groups,
    precision_of,
    rate,
    steps_of,
    trainable,
)
from gracec.training.sharding import (
    ShardedStudent,
    bytes_for_a_rank,
    bytes_of_a_rank,
    mesh_of,
    shard_blocks,
)
from gracec.training.shards import as_shard, at_first_rank, local, most, number, rows_of

Log = Callable[[dict[str, Any]], bool | None]


def train(
    student: Learner,
    teacher: Teacher | LaterTeacher | None,
    batches: Batches,
    samples: int,
    held_out: Iterable[Batch],
    rule: Training,
    *,
    candidate: Mapping[str, FrozenWeight] | None = None,
    fingerprint: Fingerprint | None = None,
    directory: Path | None = None,
    resume: bool = False,
    log: Log | AbstractContextManager[Log] | None = None,
) -> Curve:
    """Train the student's weights and scales in place, and leave the best ones in it.

    The state before the first step is a candidate too: a run never ends with worse than it began
    with, on the held-out batches. Nor with worse than `candidate`, where the best state is kept.

    Args:
        teacher: one that is made later comes after the student has been sharded, and is then
            sharded itself before anything else, so that no process holds both as a whole.
        batches: with labels, of samples by number.
        samples: how many there are.
        held_out: batches that choose the best state; gone through more than once.
        candidate: FQN -> codes and scales, to be compared with what training reaches. Training
            does not start from them: what else learns is in this state as it was before.
        fingerprint: of everything that decides the run; a checkpoint of another is refused.
            That of a later teacher is put into it.
        directory: for checkpoints and metrics; nothing is written without it.
        resume: go on from the newest checkpoint there, if there is one.
        log: called with every row of figures; whether to end the training after it. One that is a
            context begins when there is nothing left to be made.

    Raises:
        GracecError: if a checkpoint does not fit, or the loss is not finite too often in a row.
    """
    run = Run(student, teacher, batches, samples, rule, fingerprint, directory, candidate)
    if resume:
        run.resume()
    given = log if isinstance(log, AbstractContextManager) else nullcontext(log or _say_nothing)
    with given as told:
        return run.go(held_out, told)


def _say_nothing(row: dict[str, Any]) -> None:
    """For a run that nobody listens to."""


class Run:
    """One run: what it holds changes from step to step."""

    def __init__(
        self,
        student: Learner,
        teacher: Teacher | LaterTeacher | None,
        batches: Batches,
        samples: int,
        rule: Training,
        fingerprint: Fingerprint | None,
        directory: Path | None,
        candidate: Mapping[str, FrozenWeight] | None = None,
    ) -> None:
        if rule.distillation.needs_teacher and teacher is None:
            raise GracecError("the recipe distils and there is no teacher")
        self.student, self.batches, self.samples, self.rule = student, batches, samples, rule
        self.fingerprint, self.directory = fingerprint, directory
        self.candidate = candidate
        self.ranked = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.ranked else 0
        self.ranks = dist.get_world_size() if self.ranked else 1
        self.steps_an_epoch = math.ceil(samples / rule.batch_size)
        self.steps = steps_of(rule, samples)
        self.controller = controller_of(rule, self.steps)
        self.parameters = trainable(student.program, rule.frozen, rule.learns)
        if not self.parameters:
            raise GracecError(
                "nothing learns: every part with something to learn is frozen",
                where="training.frozen",
                fix="leave a part out of it, or quantize one that is not in it",
            )
        self.signs = signs_of_scales(student.program)
        for parameter in student.program.graph_module.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.originals = dict(self.parameters)
        self.narrow = precision_of(rule, student.model.device) == torch.bfloat16
        self.quantized = QuantizedWeights(student.program)
        self.shards: ShardedStudent | None = None
        self.said: list[str] = []
        wanted = teacher if rule.distillation.needs_teacher else None
        self.running = self._running(wanted)
        self.teacher = self._take(wanted)
        vocabulary = None if self.teacher is None else self.teacher.vocabulary
        self.objective = objective_of(rule, self.steps, vocabulary)
        self.module = self._module()
        groups = parameter_groups(student.program, self.parameters, rule)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.ahead: Generator[Batch | EmptyBatch] | None = None
        self.step, self.skipped_in_a_row = 0, 0
        self.curve = Curve()
        if rule.chooses_by_teacher:
            self.curve.chosen_by = "held_out_kl"
        self.best: dict[str, Tensor] = {}
        self.best_score: float | None = None

    def _running(self, teacher: Teacher | LaterTeacher | None) -> Learner:
        """The student as it runs: what it needs of it has memory on each rank, and no more."""
        shards = self._shards(teacher)
        if not shards:  # what is averaged has one dtype
            self.quantized.materialize(narrow=self.narrow and not self.ranked)
        self.quantized.require_gradients(at_once=not self.ranked)
        program, device = self.quantized.program, self.student.model.device
        if self.narrow:
            program = allow_mixed_precision(program)
        by_block = self.rule.activation_checkpointing == "blocks"
        if not by_block and not shards:
            return replace(self.student, program=program, narrow=self.narrow)
        blocks = in_blocks(program, checkpointed=by_block)
        if shards:
            mesh = mesh_of(device, self.ranks)
            self.shards = ShardedStudent(blocks, self.quantized, self.parameters, mesh)
            self.parameters = self.shards.parameters
            trim()
        return replace(self.student, program=program, graph=blocks, narrow=self.narrow)

    def _take(self, teacher: Teacher | LaterTeacher | None) -> Teacher | None:
        """The teacher, made now if it was not; in shards where the student is."""
        if isinstance(teacher, LaterTeacher):
            teacher, told_by = teacher.make()
            if self.fingerprint is not None:
                self.fingerprint = replace(self.fingerprint, teacher=told_by)
        if self.shards is None or not isinstance(teacher, Learner):
            return teacher
        taught = in_blocks(teacher.program)
        shard_blocks(taught, self.shards.mesh, owned=teacher.owned)
        trim()
        return replace(teacher, graph=taught)

    def _module(self) -> Any:
        if self.rule.compile:
            self.running = compiled(self.running)
            if isinstance(self.teacher, Learner):
                self.teacher = compiled(self.teacher)
        module = Forward(self.running, self.objective)
        if not self.ranked or self.shards is not None:
            return module
        return DistributedDataParallel(module, gradient_as_bucket_view=True)

    def _shards(self, teacher: Teacher | LaterTeacher | None) -> bool:
        """Whether each rank holds some rows of everything, and not the whole."""
        if not self.ranked or self.rule.compile:
            return False
        if self.rule.strategy != "auto":
            return self.rule.strategy == "sharded"
        needed = bytes_of_a_rank(self.quantized.program, self.parameters, teacher)
        room = bytes_for_a_rank(self.student.model.device, self.ranks)
        if not most(int(needed > room), self.student.model.device):
            return False
        self.said.append(
            f"sharded over {self.ranks} processes: each would need {needed / 1e9:.1f} GB for the "
            f"whole of student, optimizer and teacher, and has {room / 1e9:.1f} GB for them"
        )
        return True

    def go(self, held_out: Iterable[Batch], log: Log) -> Curve:
        """All steps that are left."""
        budget, device = self.rule.activation_checkpointing, self.student.model.device
        partly = isinstance(budget, float)
        saving = functorch.patch(activation_memory_budget=budget) if partly else nullcontext()
        with saving, in_fixed_order(self.rule, device):
            try:
                return self._go(held_out, log)
            finally:
                if self.ahead is not None:
                    self.ahead.close()  # the workers end now

    def _go(self, held_out: Iterable[Batch], log: Log) -> Curve:
        torch.manual_seed(self.rule.seed)
        if not self.curve.held_out:
            self._evaluate(held_out, log)
            if self.best_score is None:
                raise GracecError("the model's loss on the held-out data is not finite")
            if self.candidate is not None:
                self._try(self.candidate, held_out, log)
        stops = False
        while self.step < self.steps and not stops:
            row = self.take_step()
            ended = self.step % self.steps_an_epoch == 0
            if ended and isinstance(self.controller, EpochLagrangianController):
                with self._in_student():  # looks at every code
                    self.controller.end_epoch(capacity(self.student.program))
            stops = self._anywhere(self._report(row, log))
            last = stops or self.step == self.steps
            if last or self.step % self.rule.evaluate_every == 0:
                stops |= self._anywhere(self._evaluate(held_out, log))
            if last or stops or self.step % self.rule.checkpoint_every == 0:
                self._save()
        if stops and self.step < self.steps:
            self.curve.notes.append(f"a callback ended the training after step {self.step}")
        if self.best:
            self._load(self.best)
        if self.shards is not None:
            self.shards.gather()
        if self.curve.best_step is None and self.candidate is not None:
            write_codes(self.student.program, self.candidate)  # those of frozen parts too
        for parameter in (*self.parameters.values(), *self.originals.values()):
            parameter.grad = None
            parameter.requires_grad_(False)
        distils = self.objective.distillation != "none"
        self.curve.notes += [
            *self.said,
            *self.curve.conclusions(distils=distils),
            self.curve.waiting(),
        ]
        return self.curve

    def take_step(self) -> dict[str, Any]:
        """One optimizer step; its row of figures."""
        began = time.perf_counter()
        self.curve.seconds.append(Seconds())
        row = self._optimizer_step()
        self.curve.seconds[-1].whole = time.perf_counter() - began
        self.step += 1
        return row

    def _optimizer_step(self) -> dict[str, Any]:
        factor = rate(self.step, self.steps, self.rule.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        found = self._accumulate()
        norm = number(nn.utils.clip_grad_norm_(self.parameters.values(), self.rule.clip))
        row = {
            "step": self.step + 1,
            "epoch": self.step // self.steps_an_epoch,
            **found,
            "beta": self.controller.beta,
            "ema": getattr(self.controller, "ema", None),
            "omega": self.objective.omega_at(self.step) if self.objective.omega else 0.0,
            "grad_norm": norm,
            "lr_factor": factor,
            "saturated": self.controller.saturated,
        }
        if not all(math.isfinite(value) for value in (*found.values(), norm)):
            self._skip()
            finite = {key: v for key, v in row.items() if v is None or math.isfinite(v)}
            return {**dict.fromkeys(row), **finite, "skipped": True}
        self.optimizer.step()
        self.skipped_in_a_row = 0
        if self.objective.distillation != "none":
            self.controller.update(found["distillation"])
        return row

    def _accumulate(self) -> dict[str, float]:
        """Gradients of one optimizer step; the mean of each term over all samples and ranks."""
        self.quantized.refresh()
        micro = list(self._micro_batches())
        own = len(micro)
        if self.shards is not None:  # every rank has to gather each block as often
            micro += micro[-1:] * (most(own, self.student.model.device) - own)
        taught = [self._taught(one) for one in micro]
        pairs = zip(taught[:own], (one.targets for one in micro[:own]), strict=True)
        normalisers = torch.stack([self.objective.normalisers(*pair) for pair in pairs]).sum(0)
        self._add_over_ranks(normalisers)
        totals = torch.zeros_like(normalisers)
        averaged = isinstance(self.module, DistributedDataParallel)
        for turn, one in enumerate(micro):
            alone = averaged and turn < own - 1
            with self.module.no_sync() if alone else nullcontext():
                loss, found = self.module(
                    one, taught[turn], normalisers, self.controller.beta, self.step
                )
                counts = self.ranks if turn < own else 0  # ranks are averaged
                (loss * counts).backward()
            totals += found * (turn < own)
            taught[turn] = None
        self.quantized.hand_on_gradients()
        self._add_over_ranks(totals)
        return means(totals, normalisers)

    def _micro_batches(self) -> Iterator[MicroBatch]:
        """The samples of this step that are this rank's, a few at a time."""
        if self.ahead is None:
            self.ahead = _batches(self.batches, self._groups())
        model, images = self.student.model, bool(self.objective.omega)
        everywhere = self.rule.labels == "all"
        empty: EmptyBatch | None = None
        some = False
        for _ in self._groups_of(self.step, range(self.samples)):
            began = time.perf_counter()
            batch = next(self.ahead)
            self.curve.seconds[-1].data += time.perf_counter() - began
            if isinstance(batch, EmptyBatch):
                empty = batch
                continue
            yield MicroBatch.read(model, batch, images=images, everywhere=everywhere)
            some = True
        if not some:
            raise GracecError(
                f"every sample of an optimizer step is broken ({empty})",
                where=f"optimizer step {self.step}",
            )

    def _groups(self) -> Iterator[Sequence[int]]:
        """Numbers of the samples of each micro-batch of this rank, from this step on."""
        epoch, order = -1, list[int]()
        for step in range(self.step, self.steps):
            if epoch != step // self.steps_an_epoch:
                epoch = step // self.steps_an_epoch
                order = epoch_order(self.samples, epoch, self.rule.seed)
            yield from self._groups_of(step, order)

    def _groups_of(self, step: int, order: Sequence[int]) -> list[Sequence[int]]:
        """The micro-batches of a step, in an order of the samples."""
        size, micro = self.rule.batch_size, self.rule.micro_batch_size
        chosen = order[step % self.steps_an_epoch * size :][:size]
        mine = chosen[self.rank :: self.ranks]
        if not mine:
            raise GracecError(
                f"the last batch of an epoch has {len(chosen)} samples for {self.ranks} ranks",
                fix="choose a batch_size that leaves each rank a sample",
            )
        return [mine[at : at + micro] for at in range(0, len(mine), micro)]

    @torch.no_grad()
    def _taught(self, micro: MicroBatch) -> Outputs | None:
        if self.teacher is None:
            return None
        return self.teacher(micro)

    def _add_over_ranks(self, tensor: Tensor) -> None:
        if self.ranked:
            dist.all_reduce(tensor)

    def _anywhere(self, stops: bool) -> bool:
        """Whether a callback, which one rank alone has, says to stop."""
        if not self.ranked:
            return stops
        said = torch.tensor(float(stops), device=self.student.model.device)
        self._add_over_ranks(said)
        return bool(said)

    def _skip(self) -> None:
        self.skipped_in_a_row += 1
        self.curve.skipped += 1
        if self.skipped_in_a_row < self.rule.max_skipped:
            return
        kept = latest_checkpoint(self.directory) if self.directory is not None else None
        hint = f"; the last good checkpoint is {kept}" if kept is not None else ""
        raise GracecError(
            f"the loss was not finite {self.skipped_in_a_row} steps in a row",
            where=f"optimizer step {self.step + 1}",
            fix=f"lower the learning rate{hint}",
        )

    def _evaluate(self, held_out: Iterable[Batch], log: Log) -> bool:
        """Score the held-out part, and keep the state if it is the best so far."""
        row = {"step": self.step, **self._scores(held_out)}
        self.curve.held_out.append(row)
        stops = bool(log(row))
        self._keep(row[self.curve.chosen_by], self.step, always=self.rule.keep == "last")
        return stops

    def _try(
        self, candidate: Mapping[str, FrozenWeight], held_out: Iterable[Batch], log: Log
    ) -> None:
        """Score the untrained graph with the weights of a candidate, and go on without them."""
        program, began = self.student.program, self.best
        learn = {id(parameter) for parameter in self.originals.values()}
        others = [one for one in tensors_of(program, candidate) if id(one) not in learn]
        with self._in_student():
            before = [one.detach().clone() for one in others]
            write_codes(program, candidate)
        self.curve.candidate = self._scores(held_out)
        log({"step": self.step, "candidate": self.curve.candidate})
        if self.rule.keep == "best":
            self._keep(self.curve.candidate[self.curve.chosen_by], None)
        with self._in_student(), torch.no_grad():
            for one, was in zip(others, before, strict=True):
                one.copy_(was)
        self._load(began)

    @contextmanager
    def _in_student(self) -> Iterator[None]:
        """Have the state in the tensors of the student, where it may be changed."""
        if self.shards is None:
            yield
            return
        self.shards.gather()
        yield
        self.shards.scatter()

    def _load(self, best: Mapping[str, Tensor]) -> None:
        """Take up a state that was kept."""
        load_tensors(best, {name: local(one) for name, one in self.parameters.items()})

    def _scores(self, held_out: Iterable[Batch]) -> dict[str, Any]:
        teacher = self.teacher if self.rule.chooses_by_teacher else None
        self.quantized.refresh()
        return score(self.running, held_out, teacher, everywhere=self.rule.labels == "all").row()

    def _keep(self, figure: float | None, step: int | None, *, always: bool = False) -> None:
        """Keep the state if its score is the best so far."""
        best = self.best_score
        if figure is not None and (best is None or figure < best or always):
            self.best_score, self.curve.best_step = figure, step
            # Beside a GPU, whose memory is for training.
            own = {n: local(p).detach() for n, p in self.parameters.items()}
            self.best = {n: tensor.to("cpu", copy=True) for n, tensor in own.items()}

    def _report(self, row: dict[str, Any], log: Log) -> bool:
        self.curve.rows.append(row)
        if self.directory is not None and self.rank == 0:
            append_metrics(row, self.directory)
        seconds = self.curve.seconds[-1]
        return bool(log({**row, "seconds": seconds.whole, "data_seconds": seconds.data}))

    def _save(self) -> None:
        if self.directory is None or self.fingerprint is None:
            return
        if self.rank and self.shards is None:
            return
        state = optimizer_state(self.optimizer, self.parameters)
        live = {**self.parameters, **self.signs}
        best = ((n, as_shard(rows, self.parameters[n])) for n, rows in self.best.items())
        tensors = at_first_rank(live.items(), self.rank)
        kept = at_first_rank(best, self.rank)
        moments = at_first_rank(state.tensors.items(), self.rank)
        if self.rank:
            return
        if self.shards is not None:
            tensors, kept, moments = map(self.shards.as_held, (tensors, kept, moments))
        checkpoint = Checkpoint(
            step=self.step,
            epoch=self.step // self.steps_an_epoch,
            sample=self.step % self.steps_an_epoch * self.rule.batch_size,
            tensors=tensors,
            best=kept,
            best_score=self.best_score,
            optimizer=state._replace(tensors=moments),
            controller=self.controller.state_dict(),
            rng=rng_state(self.student.model.device),
            skipped_in_a_row=self.skipped_in_a_row,
            skipped_total=self.curve.skipped,
            extra={
                "best_step": self.curve.best_step,
                "candidate": self.curve.candidate,
                "held_out": self.curve.held_out,
                "rows": self.curve.rows,
            },
        )
        save_checkpoint(checkpoint, self.fingerprint, self.directory)

    def resume(self) -> None:
        """Take up the newest checkpoint, if there is one."""
        if self.directory is None or self.fingerprint is None:
            raise GracecError("there is nothing to resume without a directory")
        (self.directory / METRICS).unlink(missing_ok=True)
        path = latest_checkpoint(self.directory)
        if path is None:
            return
        found = load_checkpoint(path, self.fingerprint)
        tensors, kept, moments = found.tensors, found.best, found.optimizer.tensors
        if self.shards is not None:
            tensors, kept, moments = map(self.shards.as_sharded, (tensors, kept, moments))
        load_tensors(tensors, {**self.parameters, **self.signs})
        state = found.optimizer._replace(tensors=moments)
        load_optimizer_state(self.optimizer, self.parameters, state)
        self.controller.load_state_dict(dict(found.controller))
        set_rng_state(found.rng, self.student.model.device)
        self.step, self.skipped_in_a_row = found.step, found.skipped_in_a_row
        self.best = {n: rows_of(tensor, self.parameters[n]).clone() for n, tensor in kept.items()}
        self.best_score = found.best_score
        self.curve = Curve(
            rows=list(found.extra["rows"]),
            held_out=list(found.extra["held_out"]),
            candidate=found.extra.get("candidate"),
            best_step=found.extra["best_step"],
            chosen_by=self.curve.chosen_by,
            skipped=found.skipped_total,
            notes=[f"resumed after optimizer step {found.step}{self._how_equal()}"],
        )
        if self.rank == 0:
            write_metrics(self.curve, self.directory)

    def _how_equal(self) -> str:
        """What a resumed training has to say of one that was never interrupted."""
        device = self.student.model.device.type
        if device == "cpu" or self.rule.deterministic:
            return ""
        return (
            f"; on {device} sums have no fixed order, so that it goes on as without a break up to "
            "rounding, and bit for bit with training.deterministic"
        )


def _batches(batches: Batches, groups: Groups) -> Generator[Batch | EmptyBatch]:
    """The same as a generator, which can be closed."""
    yield from batches(groups)
