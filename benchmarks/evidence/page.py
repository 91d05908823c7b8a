"""Write docs/results.md and its pictures from benchmarks/results/evidence.

    python benchmarks/evidence/page.py

Every number on that page is computed here from the answers that are committed: nothing is typed in.
A row whose runs are missing is left out, and the page says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import task
from compare import Estimate, estimate, numbered
from conditions import ALL_SCENES, conditions
from run import FOLDER, unpack
from torch import Tensor

from gracec.objective.controllers import AUTO_WINDOW, FALL

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results.md"
PICTURES = ROOT / "docs" / "results"
SPLIT = "test"


@dataclass(frozen=True)
class Runs:
    """The results of one condition, by seed.

    Attributes:
        found: seed -> what benchmarks/evidence/run.py wrote.
    """

    name: str
    found: Mapping[int, dict[str, Any]]

    def hits(self, split: str, kind: str | None = None) -> dict[int, Tensor]:
        """Seed -> right answers, bool [n], of one type or of all."""
        answers = {seed: unpack(run["answers"][split]) for seed, run in self.found.items()}
        column = slice(None) if kind is None else [task.TYPES.index(kind)]
        return {seed: right[:, column].flatten() for seed, right in answers.items()}


class Evidence:
    """All results that there are.

    Args:
        folder: of the files that `run.py` writes.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.runs: dict[str, Runs] = {}
        for path in sorted(folder.glob("*.json")):
            name, _, seed = path.stem.rpartition("-")
            found = dict(self.runs[name].found) if name in self.runs else {}
            found[int(seed)] = json.loads(path.read_text(encoding="utf-8"))
            self.runs[name] = Runs(name, found)

    @cached_property
    def subjects(self) -> dict[str, list[list[str]]]:
        """What each question is about, by split."""
        return {split: task.clusters(split) for split in ("validation", "test")}

    def clusters(self, split: str, kind: str | None = None) -> Tensor:
        """Number of the concept of each question, int64 [n]."""
        column = None if kind is None else task.TYPES.index(kind)
        names = [
            f"{name}" if task.TYPES[number] != "count" else f"all of {name}"
            for row in self.subjects[split]
            for number, name in enumerate(row)
            if column in (None, number)
        ]
        return numbered(names)

    def accuracy(self, name: str, kind: str | None = None, split: str = SPLIT) -> Estimate | None:
        """Accuracy of a condition; None where it has not been run."""
        if name not in self.runs:
            return None
        hits = list(self.runs[name].hits(split, kind).values())
        return estimate(hits, self.clusters(split, kind))

    def difference(
        self, name: str, other: str, kind: str | None = None, split: str = SPLIT
    ) -> Estimate | None:
        """How much more accurate one condition is than another, on the seeds that both have."""
        if name not in self.runs or other not in self.runs:
            return None
        mine, theirs = (self.runs[n].hits(split, kind) for n in (name, other))
        if len(theirs) == 1 or set(theirs) == {0}:
            return estimate(list(mine.values()), self.clusters(split, kind), [theirs[0]])
        seeds = sorted(set(mine) & set(theirs))
        if not seeds:
            return None
        pairs = [[hits[seed] for seed in seeds] for hits in (mine, theirs)]
        return estimate(pairs[0], self.clusters(split, kind), pairs[1])

    def change(self, runs: Runs, kind: str | None) -> Estimate:
        """How much more accurate some runs are than the student, on the validation split."""
        hits, student = (
            list(one.hits("validation", kind).values()) for one in (runs, self.runs["student"])
        )
        return estimate(hits, self.clusters("validation", kind), student)

    def control(self, kind: str | None) -> tuple[float, float]:
        """The student without the image, and the commonest answer of each type."""
        blind = unpack(self.runs["student"].found[0]["answers"][f"{SPLIT} blind"]).double()
        kinds = task.TYPES if kind is None else (kind,)
        most = [_majority(SPLIT, one) for one in kinds]
        columns = [task.TYPES.index(one) for one in kinds]
        return blind[:, columns].mean().item(), sum(most) / len(most)


def _majority(split: str, kind: str) -> float:
    column = task.TYPES.index(kind)
    answers = [
        task.evaluation_questions(split, index)[column].answer for index in range(task.SCENES)
    ]
    return max(answers.count(answer) for answer in set(answers)) / len(answers)


# Tables ---------------------------------------------------------------------------------------


def percent(found: Estimate | None) -> str:
    return "-" if found is None else f"{100 * found.value:.1f} ±{100 * found.error:.1f}"


def points(found: Estimate | None) -> str:
    return "-" if found is None else f"{100 * found.value:+.1f} ±{100 * found.error:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy_table(evidence: Evidence, rows: Mapping[str, str]) -> str:
    """One row a condition: accuracy by type and overall, and the change from the student."""
    head = ["", "seeds", *task.TYPES, "all", "against the student"]
    lines = []
    for name, words in rows.items():
        found = evidence.accuracy(name)
        if found is None:
            continue
        cells = [percent(evidence.accuracy(name, kind)) for kind in task.TYPES]
        change = "" if name == "student" else points(evidence.difference(name, "student"))
        trained = any(run.get("held_out") for run in evidence.runs[name].found.values())
        seeds = str(found.seeds) if trained else ""
        lines.append([words, seeds, *cells, f"**{percent(found)}**", change])
    return table(head, lines)


def remedy_table(evidence: Evidence) -> str:
    """Changes from the student on the validation split, by type, of the first seed."""
    lines = []
    for name, words in REMEDIES.items():
        if name in evidence.runs and 0 in evidence.runs[name].found:
            first = Runs(name, {0: evidence.runs[name].found[0]})
            kinds: list[str | None] = [*task.TYPES, None]
            cells = [points(evidence.change(first, kind)) for kind in kinds]
            lines.append([words, *cells])
    return table(["points against the student", *task.TYPES, "all"], lines)


def control_rows(evidence: Evidence) -> str:
    kinds = [*task.TYPES, None]
    controls = [evidence.control(kind) for kind in kinds]
    return "\n".join(
        f"| {words} | | {' | '.join(f'{100 * control[place]:.1f}' for control in controls)} | |"
        for place, words in enumerate(("student, image zeroed", "commonest answer of the type"))
    )


def comparison_table(evidence: Evidence, rows: Sequence[tuple[str, str, str]]) -> str:
    """Differences of pairs of conditions with their 95 % interval, on both splits."""
    lines = []
    for words, name, other in rows:
        cells = []
        for split in ("validation", "test"):
            found = evidence.difference(name, other, split=split)
            if found is None:
                break
            cells += [points(found), f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"]
        else:
            lines.append([words, *cells])
    head = ["points, paired", "validation", "95 %", "test", "95 %"]
    return table(head, lines)


WORDS = {
    "teacher": "teacher, float32 (6.8M parameters)",
    "student": "student, float32 (1.7M parameters)",
    "bf16-sft": "`bf16-sft`: trained on, no teacher, not quantized",
    "bf16-grace": "`bf16-grace`: trained on by GRACE, not quantized",
    "w4a16-ptq": "`w4a16-ptq`: INT4, no training",
    "peer-gptq-g128": "GPTQ of llm-compressor, INT4, same weights and groups",
    "peer-awq-g128": "AWQ of llm-compressor, INT4, same weights and groups",
    "w4a16-qat": "`w4a16-qat`: INT4, trained by cross-entropy",
    "w4a16-kl": "INT4, cross-entropy and plain KL distillation",
    "w4a16": "`w4a16`: INT4, trained by GRACE",
}


@dataclass(frozen=True)
class Target:
    """What was to be shown, and what decides whether it was."""

    words: str
    name: str
    other: str
    reached: Any
    """Estimate -> bool."""
    split: str = SPLIT

    def row(self, evidence: Evidence) -> list[str]:
        found = evidence.difference(self.name, self.other, split=self.split)
        if found is None:
            return [self.words, "-", "not run"]
        figure = f"{points(found)} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
        return [self.words, figure, "reached" if self.reached(found) else "**missed**"]


def at_least(points_: float) -> Any:
    return lambda found: found.low > points_ / 100


def above(found: Estimate) -> bool:
    return found.value > 2 * found.error


def within(points_: float) -> Any:
    return lambda found: found.value >= -points_ / 100


TEACHERS = (("self", "frozen original as teacher"), ("teacher", "bigger teacher"))
TARGETS = [
    *(
        Target(
            f"{bits} bits, calibrated, no training: within {points_} points, on validation",
            f"w{bits}-calibrated",
            "student",
            within(points_),
            "validation",
        )
        for bits, points_ in ((3, 0.8), (2, 4.0))
    ),
    Target(
        "INT4 g128 GRACE not below the float32 student (lower end > -0.5)",
        "w4a16",
        "student",
        at_least(-0.5),
    ),
    Target("INT4 g64 GRACE, likewise", "g64-grace", "student", at_least(-0.5)),
    Target("INT4 g32 GRACE, likewise", "g32-grace", "student", at_least(-0.5)),
    Target("INT4 g128 GRACE above the float32 student by 2 SE", "w4a16", "student", above),
    Target("2 bits: GRACE above cross-entropy QAT by 2 SE", "w2-grace", "w2-qat", above),
    Target("2 bits: GRACE within 2 points of float32", "w2-grace", "student", within(2)),
    *(
        Target(
            f"{scenes} scenes, 2 bits: {words} above cross-entropy QAT by 2 SE",
            f"w2-{scenes}-{name}",
            f"w2-{scenes}-qat",
            above,
        )
        for scenes in (100, 300, 1000)
        for name, words in TEACHERS
    ),
    *(
        Target(
            f"{scenes} scenes, 2 bits: {words} not below its own PTQ (lower end > 0)",
            f"w2-{scenes}-{name}",
            "w2-ptq",
            at_least(0),
        )
        for scenes in (100, 300, 1000)
        for name, words in TEACHERS
    ),
    Target(
        "100 scenes, INT4, last state: frozen original as teacher, likewise (lower end > -0.5)",
        "w4-100-self",
        "w4a16-ptq",
        at_least(-0.5),
    ),
    Target("3 bits: GRACE within 2 points of float32", "w3-grace", "student", within(2)),
    Target("3 bits: GRACE above cross-entropy QAT by 2 SE", "w3-grace", "w3-qat", above),
    Target(
        "100 scenes, INT4, last state: frozen original as teacher above QAT by 2 SE",
        "w4-100-self",
        "w4-100-qat",
        above,
    ),
    Target("INT4: GRACE above plain KL by 2 SE", "w4a16", "w4a16-kl", above),
    Target(
        "1,000 steps, INT4 g128: GRACE not below the float32 student (lower end > -0.5)",
        "w4a16-1000",
        "student",
        at_least(-0.5),
    ),
    Target(
        "1,000 steps, INT4 g128: GRACE above the float32 student by 2 SE",
        "w4a16-1000",
        "student",
        above,
    ),
    Target(
        "1,000 steps, INT4: GRACE above cross-entropy QAT by 2 SE",
        "w4a16-1000",
        "w4a16-qat-1000",
        above,
    ),
    Target(
        "1,000 steps, 2 bits: GRACE above cross-entropy QAT by 2 SE",
        "w2-grace-1000",
        "w2-qat-1000",
        above,
    ),
    Target(
        "1,000 steps, 2 bits: GRACE within 2 points of float32",
        "w2-grace-1000",
        "student",
        within(2),
    ),
    Target("2 bits: GRACE above plain KL by 2 SE", "w2-grace", "w2-kl", above),
    Target(
        "1,000 steps, 2 bits: GRACE above plain KL by 2 SE", "w2-grace-1000", "w2-kl-1000", above
    ),
    *(
        Target(
            f"100 scenes, 2 bits: {words}, GRACE above plain KL by 2 SE",
            f"w2-100-{name}",
            f"w2-100-{name}-kl",
            above,
        )
        for name, words in TEACHERS
    ),
]


# Pictures -------------------------------------------------------------------------------------

BLUE, ORANGE, PURPLE, GREEN, QUIET = "#1f7a8c", "#b8741a", "#6a4c9c", "#2e8b57", "#888888"


def draw(path: Path, figure: Any) -> None:
    """As SVG that is equal for equal results."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gracec"}):
        figure.savefig(path, metadata={"Date": None})


def curves(evidence: Evidence) -> Any:
    """Terms of the loss, β with its moving average, and held-out scores of one GRACE run."""
    from matplotlib.figure import Figure

    run = evidence.runs["w4a16"].found[0]
    rows, held = run["curve"], run["held_out"]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    terms, control, scores = figure.subplots(1, 3)
    for name, words, colour in (
        ("ce", "cross-entropy", BLUE),
        ("distillation", "GDKD", PURPLE),
        ("rcka", "RCKA", GREEN),
    ):
        terms.plot(steps, [row[name] for row in rows], color=colour, label=words, lw=1)
    terms.set(
        yscale="log", xlabel="optimizer step", title="terms of the loss, nats (RCKA: no unit)"
    )
    _below(terms)
    control.plot(steps, [row["beta"] for row in rows], color=ORANGE, label="β")
    control.plot(steps, [row.get("ema") for row in rows], color=QUIET, label="EMA of GDKD")
    control.set(xlabel="optimizer step", title="the controller", ylim=(0, None))
    _below(control)
    at = [row["step"] for row in held]
    scores.plot(at, [row["held_out_loss"] for row in held], "o-", color=BLUE)
    if run["best_step"] is not None:
        scores.axvline(run["best_step"], color=QUIET, lw=1, ls=":")
    if run.get("candidate") is not None:
        scores.axhline(run["candidate"]["held_out_loss"], color=ORANGE, lw=1, ls="--")
    scores.set(xlabel="optimizer step", title="cross-entropy on validation questions")
    return figure


def _below(axes: Any) -> None:
    """A legend that hides no line."""
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17)}
    axes.legend(**place, ncols=3, frameon=False, fontsize=8)


def bits(evidence: Evidence) -> Any:
    """Accuracy against the width of the codes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for words, names, colour in (
        ("no training", {4: "w4p-ptq", 3: "w3-ptq", 2: "w2-ptq"}, QUIET),
        ("cross-entropy QAT", {3: "w3-qat", 2: "w2-qat"}, ORANGE),
        ("GRACE", {3: "w3-grace", 2: "w2-grace"}, BLUE),
    ):
        found = {bit: evidence.accuracy(name) for bit, name in names.items()}
        points_ = {bit: one for bit, one in found.items() if one is not None}
        axes.errorbar(
            list(points_),
            [100 * one.value for one in points_.values()],
            [100 * one.error for one in points_.values()],
            fmt="o-",
            color=colour,
            label=words,
            capsize=3,
        )
    for name, words in (("student", "student, float32"), ("teacher", "teacher, float32")):
        found_ = evidence.accuracy(name)
        assert found_ is not None
        axes.axhline(100 * found_.value, color=QUIET, ls="--" if name == "student" else ":", lw=1)
        axes.text(4.05, 100 * found_.value, words, va="bottom", ha="right", fontsize=8)
    axes.set(xlabel="bits, decoder and projector, g128", ylabel="% right, test", xticks=[2, 3, 4])
    axes.legend(frameon=False)
    return figure


def noise(evidence: Evidence) -> Any:
    """Signal to quantization noise of every weight before and after training."""
    from matplotlib.figure import Figure

    before = evidence.runs["w4a16-ptq"].found[0]["sqnr_db"]
    after = evidence.runs["w4a16"].found[0]["sqnr_db"]
    names = list(before)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    axes.plot(places, [before[name] for name in names], "o", color=QUIET, label="before training")
    axes.plot(places, [after[name] for name in names], "o", color=BLUE, label="after GRACE", ms=4)
    short = [".".join(name.split(".")[-4:-1]).replace("self_attn.", "") for name in names]
    axes.set_xticks(list(places), short, rotation=90, fontsize=7)
    axes.set(ylabel="SQNR, dB")
    axes.legend(frameon=False)
    return figure


def mended_and_broken(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Test questions that GRACE answers with every seed at 2 bits and PTQ does not; and the other
    way round. Both bool [scenes, types]."""
    ptq = evidence.runs["w2-ptq"].hits(SPLIT)[0].view(-1, len(task.TYPES))
    seeds = [hits.view_as(ptq) for hits in evidence.runs["w2-grace"].hits(SPLIT).values()]
    return ~ptq & _all(seeds), ptq & _all([~hits for hits in seeds])


def examples(evidence: Evidence) -> Any:
    """The first question of each type that GRACE answers and PTQ does not."""
    from matplotlib.figure import Figure

    mended, _ = mended_and_broken(evidence)
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    for column, axes in enumerate(figure.subplots(1, len(task.TYPES))):
        index = int(mended[:, column].nonzero()[0])
        scene = task.compose(SPLIT, index)
        question = task.evaluation_questions(SPLIT, index)[column]
        axes.imshow(task.render(SPLIT, index, scene), interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(f"{question.text}\n{question.answer}", fontsize=8)
    return figure


def _all(parts: Sequence[Tensor]) -> Tensor:
    result = parts[0]
    for part in parts[1:]:
        result = result & part
    return result


# The page -------------------------------------------------------------------------------------


def missing(evidence: Evidence) -> list[str]:
    """Runs that have no result."""
    return [
        f"{condition.name}-{seed}"
        for condition in conditions()
        for seed in condition.seeds
        if condition.name not in evidence.runs or seed not in evidence.runs[condition.name].found
    ]


CALIBRATED = [
    *(
        (f"{bits} bits, {words}", name, "student")
        for bits, plain in ((4, "w4p-ptq"), (3, "w3-ptq"), (2, "w2-ptq"))
        for words, name in (
            ("weights alone", plain),
            ("no data", f"w{bits}-no-data"),
            ("calibrated", f"w{bits}-calibrated"),
            ("calibrated, then scales trained", f"w{bits}-scales"),
        )
    ),
    ("2 bits, trained by cross-entropy, from weights alone", "w2-qat", "student"),
    ("2 bits, trained by cross-entropy, from calibrated scales", "w2-qat-calibrated", "student"),
    ("2 bits, trained by GRACE, from weights alone", "w2-grace", "student"),
    ("2 bits, trained by GRACE, from calibrated scales", "w2-grace-calibrated", "student"),
]
PEERS = [
    (f"{bits} bits, {words}", name, "student")
    for bits, label in ((4, "g128"), (3, "w3d"), (2, "w2d"))
    for words, name in (
        ("llm-compressor, RTN", f"peer-rtn-{label}"),
        ("llm-compressor, GPTQ", f"peer-gptq-{label}"),
        ("llm-compressor, AWQ", f"peer-awq-{label}"),
        ("gracec, calibrated", f"w{bits}d-calibrated"),
    )
]


def render(evidence: Evidence) -> str:
    """The page."""
    everything = [
        "student",
        "bf16-sft",
        "bf16-grace",
        "w4a16-ptq",
        "peer-gptq-g128",
        "peer-awq-g128",
        "w4a16-qat",
        "w4a16-kl",
        "w4a16",
        "teacher",
    ]
    main = accuracy_table(evidence, {n: WORDS[n] for n in everything if n in evidence.runs})
    counts = zip(("mended", "broken"), mended_and_broken(evidence), strict=True)
    by_name = {condition.name: condition for condition in conditions()}
    steps = {part: by_name[name].steps for part, name in _STEPS.items()}
    left = missing(evidence)
    parts = [
        INTRODUCTION.format(
            steps=steps["all"], scenes=f"{ALL_SCENES:,}", questions=f"{5 * ALL_SCENES:,}"
        ),
        "## All the data, INT4\n",
        main + "\n" + control_rows(evidence),
        "\n### What adds what\n",
        comparison_table(evidence, COMPARISONS),
        "\n" + _picture("curves", "Loss terms, β and held-out loss of the first GRACE run"),
        _picture("noise", "SQNR of every quantized weight before and after training"),
        READING_TEXT.format(**beta_of(evidence)),
        "\n## More steps\n",
        LONG_TEXT.format(
            steps=steps["long"],
            **{
                split: points(evidence.difference("w4a16-1000", "student", split=split))
                for split in ("validation", "test")
            },
        ),
        accuracy_table(evidence, _words(evidence, LONG_ROWS)),
        "\n## Two bits\n",
        STRESS_TEXT.format(
            steps=steps["stress"],
            both=points(evidence.difference("w2-ptq", "student")),
            decoder=points(evidence.difference("w2d-ptq", "student")),
            **{n: int(c.sum()) for n, c in counts},
        ),
        accuracy_table(evidence, _words(evidence, STRESS_ROWS)),
        "\n" + _picture("bits", "Accuracy against bits"),
        _picture(
            "examples", "Questions that GRACE answers and post-training quantization does not"
        ),
        "\n### The parts of the objective\n",
        ABLATION_TEXT.format(steps=steps["ablations"]),
        comparison_table(evidence, ABLATIONS),
        "\n## Without training, and from there\n",
        CALIBRATED_TEXT.format(scenes=by_name["w2-calibrated"].scenes),
        comparison_table(evidence, CALIBRATED),
        "\n" + PEERS_TEXT,
        comparison_table(evidence, PEERS),
        "\n## Little data\n",
        LITTLE_TEXT.format(steps=steps["little"]),
        accuracy_table(evidence, _words(evidence, LITTLE_ROWS)),
        "\n" + LAST_TEXT,
        accuracy_table(evidence, _words(evidence, LAST_ROWS)),
        "\n## Group sizes\n",
        accuracy_table(evidence, _words(evidence, GROUP_ROWS)),
        "\n## What else was tried\n",
        REMEDY_TEXT.format(
            plain=_held_out_loss(evidence, "w4a16-1000"),
            restyled=_held_out_loss(evidence, "try-restyled-long"),
        ),
        remedy_table(evidence),
        "\n## Targets\n",
        "Points on the test split, with the 95 % interval.\n",
        table(["target", "found", ""], [target.row(evidence) for target in TARGETS]),
    ]
    if left:
        parts.append(f"\nNot run yet, and left out above: {', '.join(left)}.")
    return "\n".join(parts) + "\n"


_STEPS = {
    "all": "w4a16",
    "long": "w4a16-1000",
    "stress": "w2-grace",
    "little": "w2-100-self",
    "ablations": "w2-base",
}


def beta_of(evidence: Evidence) -> dict[str, float]:
    """How β and the average of the distillation loss went in the first GRACE run."""
    rows = [row for row in evidence.runs["w4a16"].found[0]["curve"] if "ema" in row]
    return {
        "first": rows[0]["ema"],
        "last": rows[-1]["ema"],
        "low": rows[0]["beta"],
        "high": rows[-1]["beta"],
        "tau": next(row["ema"] for row in rows if row["step"] > AUTO_WINDOW) / FALL**0.5,
    }


def _held_out_loss(evidence: Evidence, name: str) -> str:
    """Of the state that the first run kept, in nats."""
    if name not in evidence.runs:
        return "-"
    run = evidence.runs[name].found[0]
    rows = [{**(run.get("candidate") or {}), "step": None}, *run["held_out"]]
    (found,) = (row for row in rows if row["step"] == run["best_step"])
    return f"{found['held_out_loss']:.3f}"


def _words(evidence: Evidence, rows: Mapping[str, str]) -> dict[str, str]:
    return {name: words for name, words in rows.items() if name in evidence.runs}


def _picture(name: str, words: str) -> str:
    return f"![{words}](results/evidence_{name}.svg)\n"


INTRODUCTION = """# Results

Does the method keep, or raise, what a model can do? This page is written by
`python benchmarks/evidence/page.py` from the answers in `benchmarks/results/evidence`, and
`make evidence` makes those again: it trains what is missing, a few minutes a run on one core.

The task is the shipped [EmojiVQA](../examples/emojivqa/README.md): five types of questions about
scenes of emoji, whose test artwork (Twemoji) no model has seen. Emoji are drawings, and the student
has 1.7 million parameters: the figures say how methods compare on this task, not what they do to a
model of seven billion.

- Every trained row starts from the shipped student and gets the same data in the same order:
  {questions} questions about {scenes} new scenes, {steps} optimizer steps of 16 questions, learning
  rate 1e-4 for weights and 1e-3 for scales. Seeds change the scenes and their order.
- Learning rate and kept state were chosen on the validation split, whose artwork is another
  (FxEmojis); the number of steps by what two cores do in an hour or two. The test split was read
  once for each run, and nothing was chosen by it.
- 4,000 questions a split, 800 of each type. Standard errors count questions about the same concept
  as one draw, and add the variance over seeds (`benchmarks/evidence/compare.py`). Differences are
  paired: the same questions, the same seeds.
- Quantized rows are scored as codes times scales in float32 arithmetic, the values that every
  backend reads back, by the same evaluator as everything else.
"""

READING_TEXT = """
What this says:

- Four bits cost this student next to nothing, by any method, the peer's included. Where nothing is
  lost, nothing can be won back.
- Training gains on `count` and loses on `name` in every trained row. It sees the training artwork
  alone, and the image tower, which decides what an emoji is, is frozen by default. The teacher's
  lead is largest in naming, so most of it has no way into the student's decoder.
- `tau: auto` expects the distillation loss to fall to a fourth. Here its average goes from
  {first:.1f} to {last:.1f} nats and stays above τ = {tau:.2f}, so that β climbs from {low:.2f} to
  {high:.2f} by the largest step that the rule takes: a ramp rather than a balance.
"""

LONG_TEXT = """{steps:,} steps instead, on the same scenes and with the same rates. On the
validation split this was the only remedy (below) that helped INT4, by {validation} points; the test
artwork, which is another style again, shows {test}.
"""
STRESS_TEXT = """At four bits this student loses nothing, so methods cannot differ much. Two bits in
the decoder and the projector (g128) hurt it: {both} points without training, {decoder} with the
decoder alone, so that the projector carries most of the error. {steps} steps, otherwise as above.
Post-training quantization fails {mended} test questions that GRACE answers with every seed; the
other way round there are {broken}.
"""
CALIBRATED_TEXT = """Post-training quantization of decoder and projector (g128), in points against
the float32 student. "weights alone" searches scales of least squared error of the weights, which is
what every other row of this page starts from; "no data" weighs that search by random words and
noise pictures; "calibrated" corrects codes on 128 of the questions about {scenes} training scenes,
seconds of work. In the last two, scales may be negative. "then scales trained" is 120 steps of
`w4a16-scales` on the same questions, without their answers: codes stay, scales learn what the
original would say. The trained rows are those of "Two bits" with the calibrated scales to start
from.
"""
PEERS_TEXT = """Beside another tool, with the decoder alone quantized (g128). Its GPTQ and AWQ
calibrate on 512 of the training questions, drawn by the seed; where data is used there are several
seeds.
"""
ABLATION_TEXT = """The same two bits, 100 scenes (so that there are epochs), the bigger teacher,
{steps} steps of which the last state is kept, two seeds. Each row changes one thing in GRACE; a
positive figure means that GRACE as it is does better.
"""
LITTLE_TEXT = """What users have is often a few hundred pictures. Two bits in decoder and projector
again, {steps} steps, five questions a scene. Here a tenth of the same little data chooses the state
that is kept, as it does for a user, and the state before training is a candidate.
"""
LAST_TEXT = """The same with INT4 in the decoder, 100 scenes and `keep: last`, which switches that
safety off: what training on little data does to a model that quantization had left intact.
"""
REMEDY_TEXT = """Of the teacher's lead little comes through in so few steps. These are single runs
of INT4 GRACE, read on the validation split alone; ± leaves the seed out. "Other styles" means that
each question has a picture of its own, whose cells are bent, recoloured, relit, sharpened or
blurred ([augment.py](../examples/emojivqa/emojivqa/augment.py)): the teacher learned from such
pictures, the student did not. They lower the loss on the validation questions ({plain} to
{restyled} nats in runs of 1,000 steps) and not the number of wrong answers. A tower that learns
first forgets: in its three runs of 200 steps in other styles that loss never fell below that before
training, which is the state that was kept and that their rows show.
"""
REMEDIES = {
    "w4a16": "as above, first seed",
    "try-rate-3e-4": "learning rate 3e-4",
    "try-tower": "the image tower learns too, learning rate 3e-5",
    "try-beta-2": "β = 2, fixed",
    "try-teacher-alone": "no cross-entropy, the teacher alone",
    "w4a16-1000": "1,000 steps",
    "try-restyled": "pictures in other styles",
    "try-restyled-long": "pictures in other styles, 1,000 steps",
    **{
        f"try-restyled-tower-{rate}": "pictures in other styles, the image tower learns too, "
        f"learning rate {rate}"
        for rate in ("1e-4", "3e-4", "1e-3")
    },
    "try-restyled-tower-long": "pictures in other styles, 1,000 steps, the image tower learns too, "
    "learning rate 3e-5",
}
LONG_ROWS = {
    "student": WORDS["student"],
    "w4a16-qat-1000": "INT4, cross-entropy QAT",
    "w4a16-1000": "INT4, GRACE",
    "w2-qat-1000": "2 bits in decoder and projector, cross-entropy QAT",
    "w2-kl-1000": "2 bits in decoder and projector, cross-entropy and plain KL",
    "w2-grace-1000": "2 bits in decoder and projector, GRACE",
    "teacher": WORDS["teacher"],
}
STRESS_ROWS = {
    "student": WORDS["student"],
    "w4p-ptq": "4 bits, no training",
    "w3-ptq": "3 bits, no training",
    "w3-qat": "3 bits, cross-entropy QAT",
    "w3-grace": "3 bits, GRACE",
    "w2-ptq": "2 bits, no training",
    "w2-qat": "2 bits, cross-entropy QAT",
    "w2-kl": "2 bits, cross-entropy and plain KL",
    "w2-grace": "2 bits, GRACE",
    "w2d-ptq": "2 bits, decoder alone, no training",
    "peer-gptq-w2d": "2 bits, decoder alone, GPTQ of llm-compressor",
    "w2d-grace": "2 bits, decoder alone, GRACE",
}
LITTLE_ROWS = {
    "w2-ptq": "no training",
    **{
        f"w2-{scenes}-{name}": f"{scenes} scenes, {words}"
        for scenes in (100, 300, 1000)
        for name, words in (
            ("qat", "cross-entropy QAT"),
            ("self-kl", "plain KL, frozen original as teacher"),
            ("self", "GRACE, frozen original as teacher"),
            ("teacher-kl", "plain KL, bigger teacher"),
            ("teacher", "GRACE, bigger teacher"),
        )
    },
}
LAST_ROWS = {
    "w4a16-ptq": "no training",
    "w4-100-qat": "100 scenes, cross-entropy QAT",
    "w4-100-self": "100 scenes, GRACE, frozen original as teacher",
}
GROUP_ROWS = {
    **{f"g{size}-ptq": f"g{size}, no training" for size in (32, 64)},
    "w4a16-ptq": "g128, no training",
    **{f"peer-gptq-g{size}": f"g{size}, GPTQ" for size in (32, 64, 128)},
    **{f"g{size}-grace": f"g{size}, GRACE" for size in (32, 64)},
    "w4a16": "g128, GRACE",
}
COMPARISONS = [
    ("INT4 without training - student", "w4a16-ptq", "student"),
    ("GPTQ of the peer - student", "peer-gptq-g128", "student"),
    ("more training (`bf16-sft`) - student", "bf16-sft", "student"),
    ("GRACE without quantization - `bf16-sft`: the teacher", "bf16-grace", "bf16-sft"),
    ("GRACE INT4 - GRACE without quantization: INT4", "w4a16", "bf16-grace"),
    ("GRACE INT4 - cross-entropy QAT", "w4a16", "w4a16-qat"),
    ("GRACE INT4 - plain KL", "w4a16", "w4a16-kl"),
    ("GRACE INT4 - INT4 without training", "w4a16", "w4a16-ptq"),
    ("GRACE INT4 - student", "w4a16", "student"),
    ("teacher - GRACE INT4: what is left", "teacher", "w4a16"),
]
ABLATIONS = [
    ("confidence gate", "w2-base", "w2-no-gate"),
    ("decoupling (against KL with all the rest)", "w2-base", "w2-no-decoupling"),
    ("relational alignment", "w2-base", "w2-no-rcka"),
    ("adaptive β (against β = 0.5)", "w2-base", "w2-fixed-beta"),
    ("`dual-ascent` (against `epoch-lagrangian`)", "w2-base", "w2-epoch-rule"),
    ("`tau: auto` (against the published 3.0)", "w2-base", "w2-published-tau"),
    ("log of the scale (against LSQ)", "w2-base", "w2-lsq"),
    ("all of it (against plain KL, 200 steps)", "w2-grace", "w2-kl"),
]


def main() -> None:
    evidence = Evidence()
    PICTURES.mkdir(parents=True, exist_ok=True)
    draw(PICTURES / "evidence_curves.svg", curves(evidence))
    draw(PICTURES / "evidence_bits.svg", bits(evidence))
    draw(PICTURES / "evidence_noise.svg", noise(evidence))
    draw(PICTURES / "evidence_examples.svg", examples(evidence))
    PAGE.write_text(render(evidence), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
