"""Write the parts of these pages that repeat what the code or a results file says.

    python docs/make_pages.py       rewrites the text between <!-- NAME: begin --> and its end mark

Passes, gates, the scale grid, recipes and their fields are read from the code, measurements from
`benchmarks/results/`, whole files from `examples/extension/`; a test compares.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gracec import gates, quant, reload
from gracec.capture.capture import GATE_SHAPES
from gracec.passes import Pass, all_passes
from gracec.passes.options import options_of
from gracec.recipe import (
    ActivationRule,
    Calibration,
    Deploy,
    Distillation,
    Expectation,
    OnnxDeploy,
    Recipe,
    ScaleSearch,
    Training,
    WeightRule,
    built_in_recipes,
)
from gracec.report.training_plan import KINDS
from gracec.stages.peft import MERGED_BOUND

sys.path += [
    str(Path(__file__).resolve().parents[1] / "benchmarks" / name) for name in ("ptq", "gpu")
]
import gpu_page
import tables as ptq

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks/results"
EXTENSION = DOCS.parent / "examples/extension"

MEANING = {
    "name": "shown in reports and reasons; a file without it is called by the file's name",
    "description": "one or two sentences for the reader",
    "weights": "part of the model -> rule; a part that is missing or null keeps its precision",
    "layers": "place in the model, or glob on names of weights -> rule: [see below](#layers)",
    "activations": "part -> rule for the inputs of its quantized linears; needs data to calibrate "
    "on, and a rule in `weights` for the part",
    "weights.PART.bits": "width of the signed codes; 7 are stored in 8",
    "weights.PART.group_size": "consecutive input features that share one scale, if per_group",
    "weights.PART.granularity": "what has a scale of its own",
    "weights.PART.observer": "how the first scales are found",
    "weights.PART.parametrization": "what is trained: the logarithm of a scale, or the scale with "
    "the gradient scale of LSQ, which takes a smaller `scale_lr`",
    "weights.PART.signed": "whether a scale may be negative, so that either side of a group can "
    "have the one code more; a format or a target that takes no negative scales gets positive ones",
    "activations.PART.bits": "width of the signed codes",
    "activations.PART.group_size": "consecutive features that share one scale, if per_group",
    "activations.PART.granularity": "what has a scale of its own",
    "activations.PART.observer": "how the range is found from the calibration samples",
    "activations.PART.percentile": "share of the values, in per cent, that `percentile` keeps",
    "activations.PART.symmetric": "zero point 0; otherwise it is found with the range",
    "scale_search.candidates": "points of the grid that `mse` tries for each scale",
    "scale_search.lowest": "first point, in multiples of max abs(w) / q_max",
    "scale_search.highest": "last point, likewise",
    "calibration.method": "`weights`: scales from the weights alone; `moments`: weighed by what "
    "they multiply, and rounded; `gptq`: errors are handed on as well; `auto`: gptq with data, "
    "moments without",
    "calibration.samples": "most samples that are looked at",
    "calibration.tokens": "most tokens of all of them; the first sample is taken in any case",
    "calibration.damping": "share of the mean second moment that is added before inverting",
    "calibration.order": "columns are rounded by falling second moment, or as they stand",
    "calibration.asymmetric": "share of the correction for a quantized prefix; `auto` tries some "
    "at 3 bits and below, and keeps the best on held-out samples",
    "calibration.seed": "draws the samples, or makes the synthetic ones",
    "passes": "further passes with their places: `my-pass{depth=2} after plan-quantization`",
    "expect": "the accuracy gate; null: none",
    "expect.metric": "share of exact answers on `eval_data`, or that less the original model's",
    "expect.at_least": "lowest value that passes: `0.8`; `-0.01` for one point lost",
    "expect.type": "only questions of this type; null: all",
    "deploy.dtype": "what the compiled model runs in",
    "deploy.onnx.ops": "operators of ONNX graphs: one of ONNX Runtime, or standard ones "
    "([page](onnx.md#operators-and-modes))",
    "deploy.onnx.mode": "their kernels compute in float32 (`faithful`) or with 8-bit inputs "
    "(`fast`); `auto`: fast where that changes nothing that counts",
    "deploy.onnx.head": "bits of a head that has no codes; `auto`: 8 for a large one, where that "
    "changes nothing that counts",
    "deploy.onnx.embedding": "the token embedding stays as it is",
    "deploy.onnx.cache": "what keys and values are kept in",
    "training": "how weights and scales are trained; null or missing: post-training quantization",
    "training.steps": "optimizer steps; null: `epochs` times the data",
    "training.epochs": "how often the data is gone through, where `steps` is null",
    "training.batch_size": "samples of an optimizer step, over all ranks",
    "training.micro_batch_size": "samples in memory at once, on each rank",
    "training.lr": "highest learning rate of weights",
    "training.scale_lr": "highest learning rate of quantization scales",
    "training.weight_decay": "of matrices; vectors and scales have none",
    "training.warmup": "share of the steps in which the rates rise; then a cosine to zero",
    "training.clip": "largest norm of the gradient",
    "training.precision": "of the matmuls; `auto` is bfloat16 where an accelerator has it, else "
    "float32; weights, scales and optimizer stay in float32",
    "training.frozen": "parts that are not trained",
    "training.learns": "weights and scales, or scales alone: codes stay as they were before",
    "training.labels": "what counts: the tokens of answers, or every token of text, which needs no "
    "answers and chooses the best state by its distance from the teacher",
    "training.answers": "those of the data, or the `teacher` answers every question once",
    "training.max_new_tokens": "tokens of the teacher's longest answer",
    "training.seed": "of the data order and the held-out part",
    "training.max_length": "tokens of the longest sample; null: as long as they are",
    "training.teacher_cache": "a folder that keeps what the teacher says of each sample for later "
    "epochs and runs ([page](training.md#a-teacher-that-runs-once)); `true`: one among the user's "
    "caches",
    "training.held_out": "share of the data that chooses the best state, without `eval_data`",
    "training.keep": "which state is kept: the best on the held-out part, or the last",
    "training.evaluate_every": "optimizer steps between two looks at the held-out part",
    "training.checkpoint_every": "optimizer steps between two checkpoints",
    "training.max_skipped": "steps in a row whose loss may be NaN or infinite",
    "training.workers": "processes that make batches ahead, on each rank; no batch depends on it",
    "training.compile": "run the student through torch.compile",
    "training.activation_checkpointing": "share of the activations that is kept, with "
    "`compile`; or `blocks`: what enters each decoder block is kept, without `compile`",
    "training.strategy": "what each of several processes holds: all (`ddp`), or its rows of "
    "student, optimizer and teacher (`sharded`); `auto` shards what does not fit",
    "training.deterministic": "an accelerator adds up in a fixed order, so that what is repeated "
    "or resumed has equal bits; takes longer. The CPU always does",
    "training.cross_entropy": "weight of the labels",
    "training.distillation.kind": "decoupled, classical, or off",
    "training.distillation.temperature": "T of distillation",
    "training.distillation.alpha": "weight of the target class in `gdkd`",
    "training.distillation.beta_dkd": "weight of the other classes in `gdkd`",
    "training.distillation.gate": "weigh positions by the teacher's confidence",
    "training.distillation.omega": "weight of the relational term at the visual tokens; 0: off",
    "training.distillation.omega_warmup": "steps in which it rises; at most half of the run",
    "training.distillation.controller": "rule for β, the weight of distillation",
    "training.distillation.tau": "target of the smoothed loss in nats; `auto` finds it",
    "training.distillation.eta": "rate of the rule; not used by `tau: auto`",
    "training.distillation.beta_cap": "nats that a full capacity is worth to `epoch-lagrangian`",
    "training.distillation.beta": "first β of `dual-ascent`, and β of `fixed`",
    "training.distillation.beta_min": "lower bound of β",
    "training.distillation.beta_max": "upper bound of β",
    "training.distillation.ema_decay": "how slowly the smoothed loss follows",
}
"""Field of a recipe -> what it means. A field that is not here stops this script."""


def passes_table() -> str:
    """Name, rewrite, promise and options of every pass."""
    rows = []
    for name, cls in all_passes().items():
        if not cls.__module__.startswith("gracec."):
            continue  # somebody's own pass, imported beside this script
        what = first_paragraph(sys.modules[cls.__module__].__doc__).removeprefix(f"{name}: ")
        keeps = "yes" if cls.keeps_numerics else "no"
        rows.append([f"`{name}`", what, keeps, ", ".join(options(cls)) or "none"])
    return table(["pass", "what it does", "keeps the numerics", "options and defaults"], rows)


def options(cls: type[Pass]) -> Iterator[str]:
    """Options as they are written in a pipeline; those without a text form are marked."""
    for option in options_of(cls).values():
        if option.has_text_form:
            yield f"`{option.name}={option.write_default()}`"
        else:
            yield f"`{option.name}` (from Python only)"


def packages_table() -> str:
    """A line for every package and module at the top level, in the order of the layers."""
    settings = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    layers, *_ = settings["tool"]["importlinter"]["contracts"]
    rows = []
    for layer in layers["layers"]:
        for name in layer.split(" | "):
            module = importlib.import_module(f"gracec.{name}")
            folder = hasattr(module, "__path__")
            rows.append([f"`{name}{'/' if folder else ''}`", first_paragraph(module.__doc__)])
    return table(["package", "what it holds"], rows)


def gates_table() -> str:
    """Every gate of `compile`, by its key in the report, with the bound that the code holds."""
    bounds = {str(dtype).removeprefix("torch."): b for dtype, b in gates.MATMUL_BOUND.items()}
    by_bound: dict[float, list[str]] = {}
    for dtype, bound in bounds.items():
        by_bound.setdefault(bound, []).append(dtype)
    matmul = "; ".join(f"{bound:.0e} in {', '.join(d)}" for bound, d in by_bound.items())
    kernels = "; ".join(f"{b:.0e} in {str(d)[6:]}" for d, b in gates.KERNEL_BOUND.items())
    merged = "; ".join(f"{b:.0e} in {str(d)[6:]}" for d, b in MERGED_BOUND.items())
    rows = [
        [
            "`adapters_merged`",
            "logits with adapters merged and of the `PeftModel`, relative to the largest",
            merged,
        ],
        [
            "`source_equals_original`",
            "logits of the model that is compiled, tied, untied or merged as it is by then, and of "
            "the one that was given",
            "equal bits",
        ],
        [
            "`captured_equals_eager`",
            "logits of the captured graph and of the model; on a GPU by one kernel for attention",
            "equal bits",
        ],
        [
            "`default_kernels_agree`",
            "on a GPU: the same by the kernels that it chooses, relative to the largest",
            kernels,
        ],
        [
            "`blocks_equal_hidden_states`",
            "what each decoder block but the last returns, and the model's hidden states",
            "equal bits",
        ],
        [
            "`output_error`",
            "where codes are corrected: the error of the output of each weight, as a share of that "
            "of rounding to nearest with the scale of the largest weight, on held-out inputs; the "
            "worst",
            "1",
        ],
        [
            "`rounded_logits`, `corrected_logits`",
            "where codes are corrected: KL divergence from the original on held-out samples, of "
            "rounding to nearest and of the corrected codes, before any training",
            "the second at most the first; beyond it an error in strict mode and a note otherwise",
        ],
        [
            "`frozen_equals_fake_quantized`",
            "every output of the frozen and of the fake-quantized graph",
            "equal bits",
        ],
        [
            "`matmul_error`",
            "each packed linear and codes times scales in float64, relative to the largest output",
            matmul,
        ],
        ["`int4_kernels`", "INT4 kernels that ran in one forward and those planned", "equal"],
        [
            "`lowered_equals_generating`",
            "logits of the lowered graph and of the modules that `generate` runs",
            "equal bits",
        ],
        [
            "`logits`, `logits_dense`",
            "KL divergence from the frozen graph, of the lowered model and of dense weights with "
            "the same values in the same dtype",
            f"the first at most {gates.KL_FACTOR} times the second plus {KL_SLACK:.0e} nats, the "
            f"second at most {gates.ROUNDING_KL} nats",
        ],
    ]
    again = "; ".join(f"{b:.0e} in {str(d)[6:]}" for d, b in reload.BOUND.items())
    rows.append(
        [
            "`reloaded_equals_compiled`",
            "logits of what was saved, loaded in a fresh process, and of the model in memory, "
            "relative to the largest",
            again,
        ]
    )
    shapes = ", ".join(f"({b}, {i}, {t})" for b, i, t in GATE_SHAPES)
    return (
        table(["in the report", "compares", "bound"], rows)
        + f"\n\nThe gates on a capture run on {len(GATE_SHAPES)} batches built from the "
        f"configuration. Their (prompts, images, text tokens) are {shapes}: one prompt alone, "
        "several images in one prompt, and left padding. `top1` in the report is the share of "
        "positions with the same most likely token. `top1_clear` leaves out near-ties: positions "
        f"where the two largest logits of the reference are within {gates.NEAR_TIE:.0%} of their "
        "spread, so that rounding may decide."
    )


KL_SLACK = 1e-4
"""Of `gates.lowered_is_as_good_as_dense`, which a test holds them against."""


def scale_grid() -> str:
    """The ends of the grid, and how many values lie between."""
    exponent = int(torch.log2(torch.tensor(quant.SCALE_MIN)))
    return (
        f"The grid reaches from 2^{exponent} to {quant.SCALE_MAX:.0f}. Its values are those of "
        "bfloat16, which have a significand of 8 bits."
    )


def recipes_table() -> str:
    """The built-in recipes."""
    rows = []
    for name in built_in_recipes():
        recipe = Recipe.load(name)
        weights = [
            f"{part}: {rule.spec()}" for part, rule in recipe.weights.items() if rule is not None
        ]
        activations = [
            f"{part}: int{rule.bits}, {rule.granularity}, {rule.observer}"
            for part, rule in recipe.activations.items()
            if rule is not None
        ]
        cells = ["<br>".join(weights) or "kept", "<br>".join(activations) or "floating point"]
        rows.append([f"`{name}`", recipe.description, *cells, recipe.deploy.dtype])
    return table(["recipe", "what it is", "weights", "activations", "runs in"], rows)


def fields_table() -> str:
    """Every field of a recipe."""
    models = {
        "": Recipe,
        "weights.PART.": WeightRule,
        "activations.PART.": ActivationRule,
        "scale_search.": ScaleSearch,
        "calibration.": Calibration,
        "training.": Training,
        "training.distillation.": Distillation,
        "expect.": Expectation,
        "deploy.": Deploy,
        "deploy.onnx.": OnnxDeploy,
    }
    rows = []
    for prefix, model in models.items():
        schema = model.model_json_schema()
        for name, field in schema["properties"].items():
            if f"{prefix}{name}" in MEANING or "$ref" not in str(field):
                default = str(field.get("default", ""))
                default = default.lower() if field.get("type") == "boolean" else default
                default = "null" if default == "None" else default
                default = f"`{default}`" if default else "none"
                default = "needed" if name in schema.get("required", ()) else default
                cells = [allowed(field), default, MEANING[f"{prefix}{name}"]]
                rows.append([f"`{prefix}{name}`", *cells])
    return table(["field", "values", "default", "meaning"], rows)


def allowed(field: dict[str, Any]) -> str:
    """The values a field takes, in words."""
    if "anyOf" in field:
        choices = [choice for choice in field["anyOf"] if choice.get("type") != "null"]
        null = [] if len(choices) == len(field["anyOf"]) else ["`null`"]
        return " or ".join([*(allowed(choice) for choice in choices), *null])
    if "$ref" in field:
        return "a mapping of the fields below"
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        return f"a list of {allowed(field['items'])}"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field["type"] == "object":
        key = "PART" if "enum" in field.get("propertyNames", {}) else "SELECTOR"
        return f"`{key}: rule` or `{key}: null`"
    words = {"integer": "a whole number", "number": "a number", "boolean": "`true` or `false`"}
    text = words.get(field["type"], "text")
    low, above = field.get("minimum"), field.get("exclusiveMinimum")
    text += f" from {low}" if low is not None else f" above {above:g}" if above is not None else ""
    high, below = field.get("maximum"), field.get("exclusiveMaximum")
    if high is not None:
        return f"{text} to {high:,.10g}"
    return text if below is None else f"{text} and below {below:,.10g}"


Row = dict[str, Any]


def measured(
    result: str,
    only: str,
    columns: dict[str, str | Callable[[Row], object]],
    names: Collection[str] = (),
) -> str:
    """A table of the rows of a results file that have a field `only`.

    Args:
        columns: header -> field, or what to write of a row.
        names: what the first column says of the rows that are wanted; all if there are none.
    """
    found = json.loads((RESULTS / f"{result}.json").read_text(encoding="utf-8"))["rows"]
    lines = [
        [str(row[cell] if isinstance(cell, str) else cell(row)) for cell in columns.values()]
        for row in found
        if only in row
    ]
    return table(list(columns), [line for line in lines if not names or line[0] in names])


def answers_table() -> str:
    return measured(
        "onnx_answers",
        "head",
        {
            "head": "head",
            "backend": "backend",
            "right, %": "percent_right",
            "against the original, points": lambda row: (
                f"{row['change_points']:+} ±{row['standard_error']}"
            ),
            "other answers than its codes": "other_answers_than_its_codes",
            "KL, nats": lambda row: "" if row["kl_nats"] is None else f"{row['kl_nats']:.1e}",
        },
    )


def activations_table() -> str:
    return measured(
        "activations",
        "model",
        {
            "model": "model",
            "right, %": lambda row: f"{row['percent_right']:.1f} ±{row['standard_error']:.1f}",
            "other answers than float32": "other_answers",
            "KL from float32, nats": "kl_nats",
        },
    )


def vision_speed_table() -> str:
    return measured(
        "activations",
        "vision_encoder",
        {
            "vision encoder": "vision_encoder",
            "weights": "weights",
            "median, ms": "milliseconds_median",
            "times float32 (middle half of the rounds)": lambda row: (
                f"{row['times_float32']} ({row['middle_half']})"
            ),
        },
    )


def decode_table(result: str, model: str, variants: Collection[str] = ()) -> str:
    return measured(
        result,
        "decode_tokens_per_s",
        {
            model: "variant",
            "tokens/s of an answer": "decode_tokens_per_s",
            "times torch bfloat16": "x_torch_bf16",
            "tokens/s of a prompt": "prefill_tokens_per_s",
            "weights, MiB": "weights_mib",
        },
        variants,
    )


DATA = {"none": "nothing", "foreign": "other text", "same": "the same text"}
"""Protocols of benchmarks/ptq, in words."""


def ptq_table(model: str, bits: int | None = None, group_size: int | None = None) -> str:
    """What rounding costs a language model with real weights, by gracec and by others.

    Args:
        model: of `benchmarks/ptq/cells.py`.
        bits, group_size: only these; all if None.
    """
    columns: dict[str, Callable[[Row], str]] = {
        "weights": lambda row: row["weights"],
        "calibrated on": lambda row: DATA[row["calibration"]],
        "bits": lambda row: str(row["bits"]),
        "group": lambda row: str(row["group_size"]),
        "bits a weight": lambda row: f"{row['bits_per_weight']:.2f}",
        "perplexity": lambda row: f"{row['perplexity']:.2f}",
        "loss above the original, nats": lambda row: (
            f"{row['loss_change_nats']:+.3f} ±{row['standard_error']:.3f}"
        ),
        "KL, nats": lambda row: f"{row['kl_nats']:.3f}",
        "same top-1, %": lambda row: f"{100 * row['top1']:.1f}",
        "peak, MiB": lambda row: f"{row['peak_mib']:,}",
    }
    rows = [
        [cell(row) for cell in columns.values()]
        for row in ptq.rows(model)
        if bits in (None, row["bits"]) and group_size in (None, row["group_size"])
    ]
    return table(list(columns), rows)


def which_recipe_table(model: str) -> str:
    """What gracec's own recipes cost a language model, by bits, group and data."""
    columns: dict[str, Callable[[Row], str]] = {
        "bits": lambda row: str(row["bits"]),
        "group": lambda row: str(row["group_size"]),
        "bits a weight": lambda row: f"{row['bits_per_weight']:.2f}",
        "data": lambda row: DATA[row["calibration"]],
        "loss, nats": lambda row: f"{row['loss_change_nats']:+.3f} ±{row['standard_error']:.3f}",
        "KL, nats": lambda row: f"{row['kl_nats']:.3f}",
        "same top-1, %": lambda row: f"{100 * row['top1']:.1f}",
        "seconds": lambda row: f"{row['cpu_seconds']:.0f}",
    }
    rows = [
        [cell(row) for cell in columns.values()]
        for row in ptq.rows(model)
        if row["weights"] == ptq.NAMES["gracec", "auto"]
    ]
    return table(list(columns), rows)


def edge_speed_table() -> str:
    return measured(
        "edge",
        "client",
        {
            "client": "client",
            "runs on": "provider",
            "start, s": "start_s",
            "first token, ms": "first_token_ms",
            "tokens/s": "tokens_per_s",
            "tokens as in Python": "tokens_as_in_python",
            "with pictures to resize": "with_resized_pictures",
        },
    )


def edge_sizes_table() -> str:
    return measured(
        "edge",
        "part",
        {
            "part": lambda row: f"`{row['part']}`",
            "read by": "read_by",
            "KiB": lambda row: f"{row['kib']:,}",
        },
    )


def mutations_table() -> str:
    return measured(
        "mutations",
        "mutation",
        {
            "taken away": "mutation",
            "from": lambda row: f"`{row['file']}`",
            "first missed by": lambda row: (
                f"`{row['killed_by'].split('[')[0]}`" if row["killed_by"] else "**nothing**"
            ),
        },
    )


def families_table() -> str:
    found = json.loads((DOCS / "results/families.json").read_text(encoding="utf-8"))["families"]
    columns = list(dict.fromkeys(column for cells in found.values() for column in cells))
    rows = [
        [f"`{family}`", *(cells.get(column, "not run") for column in columns)]
        for family, cells in sorted(found.items())
    ]
    return table(["family", *columns], rows)


def doctor_examples() -> str:
    found = json.loads((DOCS / "results/families.json").read_text(encoding="utf-8"))["doctor"]
    return "\n\n".join(
        f"{example['what']}\n\n```\n$ gracec doctor {name}\n"
        + "\n".join(example["lines"])
        + "\n```"
        for name, example in found.items()
    )


def versions_table() -> str:
    """What the sessions of noxfile.py ran with, and what came out."""
    text = (DOCS / "results/versions.json").read_text(encoding="utf-8")
    found: dict[str, Row] = dict(sorted(json.loads(text).items()))
    lines: dict[str, Callable[[Row], str]] = {
        "Python": lambda run: str(run["python"]),
        "tests": lambda run: str(run["tests"]),
        "passed": lambda run: str(run["passed"]),
        "failed": lambda run: str(run["failed"]),
        "skipped": lambda run: str(run["skipped"]),
    }
    rows = [[what, *map(cell, found.values())] for what, cell in lines.items()]
    for package in sorted({name for run in found.values() for name in run["packages"]}):
        rows.append([package, *(run["packages"].get(package, "-") for run in found.values())])
    return table(["", *found], rows)


def plan_table() -> str:
    return measured(
        "plan",
        "shape",
        {
            "student": "shape",
            "parameters": lambda row: f"{row['parameters']:,}",
            "tokens": "tokens of the longest",
            "planned, MiB": lambda row: f"{row['planned_mib']:,}",
            "measured, MiB": lambda row: f"{row['measured_mib']:,}",
            "planned / measured": "memory, planned over measured",
            "with what malloc keeps, MiB": lambda row: (
                f"{row['with what malloc keeps back_mib']:,}"
            ),
            "planned, s": "planned seconds",
            "measured, s": "measured seconds",
            "planned / measured ": "seconds, planned over measured",
        },
    )


def plan_paper_table() -> str:
    """The settings of the paper side by side, a kind of memory a line."""
    rows = json.loads((RESULTS / "plan_paper.json").read_text(encoding="utf-8"))["rows"]
    kinds = {kind: f"`{kind}`: {what}" for kind, what in KINDS.items()}
    fields = {
        **kinds,
        "peak, GB": "**at the highest point**",
        "of a step, GB": "of a step",
        "fits": "fits 80 GB",
    }
    fields |= {name: name for name in ("highest point", "seconds a step", "of it teacher, %")}
    lines = [
        [said, *(str(row[name]) for row in rows)]
        for name, said in fields.items()
        if any(row[name] for row in rows)
    ]
    return table(["GB of one device", *(row["setting"] for row in rows)], lines)


FIRST_PAGE = (
    "torch bfloat16",
    "torchao int4 g64 bfloat16",
    "llama.cpp Q4",
    "onnxruntime-genai builder int4 g32",
    "gracec faithful qdq g64 head fp32",
    "gracec fast qdq g64 head fp32",
    "gracec fast qdq g64 head int4",
    "gracec fast matmulnbits g64 head int4",
)
"""Rows of the large decoder on the first page."""


def source(path: str) -> str:
    """A whole file of the example of an extension."""
    language = {"py": "python"}.get(path.rpartition(".")[2], path.rpartition(".")[2])
    return f"```{language}\n{(EXTENSION / path).read_text(encoding='utf-8')}```"


def sources(*paths: str) -> dict[str, Callable[[], str]]:
    return {path: partial(source, path) for path in paths}


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "architecture.md": {
        "packages": packages_table,
        "passes": passes_table,
        "gates": gates_table,
        "grid": scale_grid,
    },
    "edge.md": {"speed": edge_speed_table, "sizes": edge_sizes_table},
    "evaluation.md": {
        "ptq smollm2": partial(ptq_table, "smollm2"),
        "ptq gemma3": partial(ptq_table, "gemma3"),
    },
    "gpu.md": {"results": gpu_page.page},
    "extending.md": sources(
        "pyproject.toml",
        "gracec_example/protect_fragile.py",
        "gracec_example/vipllava.py",
        "gracec_example/w4a16-protected.yaml",
        "gracec_example/dense.py",
        "gracec_example/eager.py",
    ),
    "families.md": {"families": families_table, "doctor": doctor_examples},
    "mutations.md": {"mutations": mutations_table},
    "onnx.md": {
        "activations": activations_table,
        "vision speed": vision_speed_table,
        "answers": answers_table,
        "decode": partial(decode_table, "decode_smollm2", "SmolLM2-135M"),
        "decode 1b": partial(decode_table, "decode_1b", "1.1 billion random weights"),
    },
    "../README.md": {
        "quality": partial(ptq_table, "smollm2", 4, 128),
        "speed": partial(decode_table, "decode_1b", "1.1 billion random weights", FIRST_PAGE),
    },
    "plan.md": {"plan": plan_table, "paper": plan_paper_table},
    "recipes.md": {"recipes": recipes_table, "fields": fields_table},
    "versions.md": {"versions": versions_table},
    "which-recipe.md": {
        "smollm2": partial(which_recipe_table, "smollm2"),
        "gemma3": partial(which_recipe_table, "gemma3"),
    },
    "write-your-own-pass.md": sources("gracec_example/protect_fragile.py"),
}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a bar in a cell would end it."""
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def first_paragraph(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split())


def rendered(page: str) -> str:
    """A page with its generated blocks as they should be."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, block in BLOCKS[page].items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        new = f"{begin}\n{block()}\n{end}"
        text, count = pattern.subn(lambda _, new=new: new, text)
        if count != 1:
            raise SystemExit(f"{page} has {count} blocks named {name}, one is needed")
    return text


def main() -> None:
    for page in BLOCKS:
        (DOCS / page).write_text(rendered(page), encoding="utf-8")


if __name__ == "__main__":
    main()
