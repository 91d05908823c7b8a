"""Which mode graphs are written in: fast where that changes nothing that counts, else faithful.

Both modes run the same graphs with the same codes. With MatMulNBits the mode is an attribute of
each node, with standard operators an option of the session; so another mode is a matter of
milliseconds, and both are measured on what was written.

    fast    KL of the logits from the codes in float32 at most twice that of dense bfloat16 weights
            and 1e-3; no greedy answer differs but at a near-tie; and whoever asks further
            questions accepts the answers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.backends.onnx import gates
from gracec.backends.onnx.session import SessionConfig, session_options
from gracec.capture.eager import eager_logits
from gracec.capture.families import family_of
from gracec.capture.greedy import Step, embed_prompt, greedy, next_positions, prompt_logits
from gracec.capture.serving import Serving, ServingRuntime
from gracec.errors import GateError
from gracec.file_hashes import file_sha256
from gracec.frozen import Frozen, dense_twin
from gracec.gates import LogitAgreement, logit_agreement, lowered_is_as_good_as_dense
from gracec.kernels.onnxruntime import ACCURACY_LEVEL, FAITHFUL, FAST, MATMUL_NBITS

GATE_TOKENS = 16
KL_FACTOR, KL_NOISE, KL_NOISE_16_BITS = 2, 1e-3, 1e-2
"""What rounding may cost that nobody asked for: so many times the KL of dense bfloat16 weights, and
so many nats; more where the reference is rounded to 16 bits itself."""


class Answering(Protocol):
    """Graphs as they run: an `OnnxModel`."""

    def __call__(self, **batch: Tensor) -> Any: ...

    def generate(self, **batch: Any) -> Tensor: ...


@dataclass(frozen=True)
class Trial:
    """How far graphs are from the codes in float32, in one mode.

    Attributes:
        logits: of the example prompts.
        own: the same, from the codes of the graphs themselves, an added head included.
        compiled: from the logits that were compiled, where they are known.
        greedy: answers of `GATE_TOKENS` tokens.
    """

    logits: LogitAgreement
    own: LogitAgreement
    compiled: LogitAgreement | None
    greedy: gates.TokenAgreement

    def figures(self) -> dict[str, Any]:
        """JSON-able."""
        found = {"logits": asdict(self.logits), "greedy": asdict(self.greedy)}
        if self.compiled is not None:
            found["logits_compiled"] = asdict(self.compiled)
        return found


class Expected:
    """What the codes compute in float32, and how far dense bfloat16 weights are from it.

    Attributes:
        dense: of the example prompts.
        dense_compiled: from the logits that were compiled, where they are known.
        head_logits: of the codes with a head that was added to them; without one, `logits`.
        adds_head: whether there is one.
    """

    def __init__(self, serving: Serving, model: PreTrainedModel, frozen: Frozen) -> None:
        """
        Args:
            serving: graphs with codes.
            model: gives example inputs; its weights are not used.
        """
        family = family_of(model)
        self.reference = frozen.reference
        self.batch = family.example_batch(model)
        self.inputs = family.prepare(model, self.batch)
        self.mask = self.inputs["attention_mask"]
        runtime = ServingRuntime(serving, model.config)
        dense: Any = dense_twin(frozen, torch.bfloat16)
        with torch.no_grad():
            self.logits = self.head_logits = prompt_logits(runtime, self.inputs)
            self.steps: list[Step] = list(greedy(runtime, self.inputs, max_new_tokens=GATE_TOKENS))
            logits = dense(**family.model_inputs(dense, self.batch), use_cache=False).logits
        self.dense = logit_agreement(self.logits, logits, self.mask)
        self.dense_compiled: LogitAgreement | None = None
        if self.reference is not None:
            self.dense_compiled = self._compiled(eager_logits(dense, self.reference.batch))
        self.adds_head = False

    def measure(self, found: Answering) -> Trial:
        """Run graphs on the example prompts."""
        logits = found(**self.batch).logits
        answered = found.generate(**self.batch, max_new_tokens=GATE_TOKENS)
        reference = self.reference
        return Trial(
            logit_agreement(self.logits, logits, self.mask),
            logit_agreement(self.head_logits, logits, self.mask),
            None if reference is None else self._compiled(found(**reference.batch).logits),
            gates.answers_agree(self.steps, answered[:, self.mask.shape[1] :]),
        )

    def hold(self, found: Trial, mode: str) -> None:
        """Gate of a mode that was asked for.

        Faithful kernels are as good as dense weights in bfloat16, fast ones are off by what 8-bit
        activations cost.

        Raises:
            GateError: if they are not.
        """
        if mode == FAST:
            gates.rounding_is_small(found.logits)
        else:
            lowered_is_as_good_as_dense(found.own, self.dense)
        if found.compiled is not None:
            assert self.reference is not None and self.dense_compiled is not None
            if mode == FAST or self.adds_head:
                fix = "use mode faithful" if mode == FAST else "use head: keep"
                gates.rounding_is_small(found.compiled, fix)
            else:
                dtype = self.reference.logits.dtype
                lowered_is_as_good_as_dense(found.compiled, self.dense_compiled, dtype)
        if mode == FAITHFUL and found.greedy.different:
            raise GateError(
                f"{found.greedy.different} greedy answers differ from those of the codes"
            )

    def cost(self, found: Trial) -> str:
        """Why rounding that nobody asked for costs too much (half a sentence), or ""."""
        pairs = [(found.logits, self.dense, self.logits.dtype)]
        if found.compiled is not None:
            assert self.reference is not None and self.dense_compiled is not None
            pairs.append((found.compiled, self.dense_compiled, self.reference.logits.dtype))
        for lowered, dense, dtype in pairs:
            if reason := too_far(lowered, dense, dtype):
                return reason
        return _differing(found.greedy)

    def add_head(self, serving: Serving, model: PreTrainedModel) -> tuple[LogitAgreement, str]:
        """Look at graphs with a head in codes, whose other codes are the same.

        The tokens that the codes choose are given to them, so that one step of all tells where an
        answer would first be another.

        Returns:
            How far the logits are, and why that is too far, or "".
        """
        runtime, inputs = ServingRuntime(serving, model.config), self.inputs
        tokens = torch.stack([step.tokens for step in self.steps], dim=1)
        positions = inputs.get("position_ids")
        if positions is None:
            positions = runtime.family.positions(self.mask)
        with torch.no_grad():
            prompt, past = runtime.decode(embed_prompt(runtime, inputs), self.mask, positions, 0)
            further = []
            for _ in range(GATE_TOKENS - 1):
                positions = next_positions(positions)
                further.append(positions)
            mask = torch.cat([self.mask, torch.ones_like(tokens[:, 1:])], dim=1)
            embeds = runtime.embed(tokens[:, :-1])
            rest, _ = runtime.decode(embeds, mask, torch.cat(further, dim=-1), 0, past)
        self.head_logits, self.adds_head = prompt, True
        chosen = torch.cat([prompt[:, -1:], rest], dim=1).argmax(-1)
        agreement = logit_agreement(self.logits, prompt, self.mask)
        reason = too_far(agreement, self.dense, self.logits.dtype)
        return agreement, reason or _differing(gates.answers_agree(self.steps, chosen))

    def without_head(self) -> None:
        """Forget a head that is not added after all."""
        self.head_logits, self.adds_head = self.logits, False

    def _compiled(self, logits: Tensor) -> LogitAgreement:
        assert self.reference is not None
        tail = self.reference.tail
        mask = tail(self.reference.batch["attention_mask"])
        return logit_agreement(self.reference.logits, tail(logits), mask)


def hold_fused(
    found: Any, serving: Serving, model: PreTrainedModel, dense: LogitAgreement, mode: str
) -> dict[str, Any]:
    """Gates on the fused decoder as it runs, one prompt at a time, with the bounds of the mode.

    Args:
        found: graphs with one, as they run.
        serving: graphs with the same codes.
        dense: how far dense bfloat16 weights are.

    Returns:
        Its figures, JSON-able.

    Raises:
        GateError: if it computes something else, or does not take the prompt.
    """
    family = family_of(model)
    batch = family.example_batch(model, batch=1, images=1)
    inputs = family.prepare(model, batch)
    mask = inputs["attention_mask"]
    runtime = ServingRuntime(serving, model.config)
    with torch.no_grad():
        logits = prompt_logits(runtime, inputs)
        steps = list(greedy(runtime, inputs, max_new_tokens=GATE_TOKENS))
    agreement = logit_agreement(logits, found(**batch).logits, mask)
    if mode == FAST:
        gates.rounding_is_small(agreement)
    else:
        lowered_is_as_good_as_dense(agreement, dense)
    answered = found.generate(**batch, max_new_tokens=GATE_TOKENS)[:, mask.shape[1] :]
    tokens = gates.answers_agree(steps, answered)
    if mode == FAITHFUL and tokens.different:
        raise GateError(f"{tokens.different} greedy answers differ from those of the codes")
    if not found.runs_fused_only:
        raise GateError("the prompt of the gate is not one that it takes", where="fused_decoder")
    return {"logits": asdict(agreement), "greedy": asdict(tokens)}


def too_far(found: LogitAgreement, dense: LogitAgreement, reference: torch.dtype) -> str:
    """Why logits are further from a reference than rounding may bring them, or ""."""
    noise = KL_NOISE if reference == torch.float32 else KL_NOISE_16_BITS
    bound = KL_FACTOR * dense.kl + noise
    if found.kl <= bound:  # NaN passes no comparison
        return ""
    return f"KL {found.kl:.2g} from the codes in float32, {bound:.2g} passes"


def _differing(found: gates.TokenAgreement) -> str:
    if not found.different:
        return ""
    count = found.same + found.ambiguous + found.different
    return f"{found.different} of {count} greedy answers differ from those of the codes"


def set_mode(folder: Path, config: SessionConfig, mode: str) -> SessionConfig:
    """Have the kernels of all graphs in a folder compute as a mode says; no tensor is touched.

    Returns:
        How they are run then; it is not written.
    """
    if config.ops == "matmulnbits":
        for path in sorted(folder.glob("*.onnx")):
            graph = onnx.load(str(path), load_external_data=False)
            nodes = [node for node in graph.graph.node if node.op_type == MATMUL_NBITS]
            levels = [a for node in nodes for a in node.attribute if a.name == "accuracy_level"]
            for level in levels:
                level.i = ACCURACY_LEVEL[mode]
            if levels:
                path.write_bytes(graph.SerializeToString(deterministic=True))
    hashes = {file: file_sha256(folder / file) for file in config.graphs.values()}
    return config.model_copy(
        update={
            "mode": mode,
            "options": session_options(config.ops, mode),
            "sha256": {**config.sha256, **hashes},
        }
    )


@dataclass(frozen=True)
class Choice:
    """What became of mode auto.

    Attributes:
        config: how the graphs are run now.
        figures: of the mode that was taken, and of both.
        note: which, and why.
    """

    config: SessionConfig
    figures: Mapping[str, Any]
    note: str


def fast_if_as_good(
    folder: Path,
    config: SessionConfig,
    faithful: Mapping[str, Any],
    expected: Expected,
    matmul_error: Callable[[], float],
    opened: Callable[[SessionConfig], Any],
    accept: Callable[[Any], str] | None = None,
) -> Choice:
    """Try fast mode on graphs that are written, checked and run in faithful mode.

    Args:
        folder: of the graphs; they are in the mode that was taken afterwards.
        faithful: figures of that mode.
        matmul_error: error of the fast kernels, or a `GateError`.
        opened: runs the graphs.
        accept: what else a model is asked; why it is not taken, or "".
    """
    tried = set_mode(folder, config, FAST)
    fast: dict[str, Any] = {}
    try:
        fast["matmul_error"] = matmul_error()
        model = opened(tried)
        trial = expected.measure(model)
        fast |= trial.figures()
        reason = expected.cost(trial)
        if not reason and accept is not None:
            reason = accept(model)
    except GateError as error:
        reason = str(error)
    modes = {FAITHFUL: dict(faithful), FAST: fast}
    if reason:
        taken, note = set_mode(folder, config, FAITHFUL), f"mode faithful: in fast mode {reason}"
        return Choice(taken, {**faithful, "modes": modes, "not_fast": reason}, note)
    note = f"mode fast: 8-bit inputs change nothing that counts, KL {trial.logits.kl:.2g}"
    return Choice(tried, {**fast, "modes": modes}, note)
