"""Recipes: what to quantize and how, as data. Built-in ones are YAML files in `gracec/recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gracec.errors import GracecError
from gracec.quant import QuantSpec
from gracec.registry import declared, load_declared, lookup, nearest
from gracec.selectors import HOW_TO, is_selector, part_named
from gracec.yaml_files import read_yaml_mapping

BUILT_IN = Path(__file__).parent / "recipes"

Granularity = Literal["per_group", "per_channel", "per_tensor"]
Part = Literal["decoder", "head", "module", "projector", "vision"]
"""`module` is all of a model that is no vision-language model."""

Selector = Annotated[str, Field(min_length=1, max_length=300)]
Name = Annotated[str, Field(pattern=r"^\w[\w .,+=@()-]{0,63}$")]
"""One short line: it is written into model cards, pages and command lines."""
MOST_STEPS = 10_000_000
MOST_WEIGHT = 1e4
"""Of a term of the objective."""


class _Strict(BaseModel):
    """No unknown fields, no number that is infinite or none, no true or false for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and bool not in (field.annotation, *get_args(field.annotation)):
            raise ValueError(f"{str(value).lower()} does not fit")
        return value


class WeightRule(_Strict):
    """How the weights of one part of the model are quantized."""

    bits: Literal[2, 3, 4, 7, 8] = 4
    group_size: Literal[16, 32, 64, 128, 256] = 128
    granularity: Granularity = "per_group"
    observer: Literal["mse", "min_max", "percentile"] = "mse"
    parametrization: Literal["log", "lsq"] = "log"
    signed: bool = False

    def spec(self) -> QuantSpec:
        return QuantSpec(
            bits=self.bits,
            group_size=self.group_size,
            parametrization=self.parametrization,
            granularity=self.granularity,
            signed=self.signed,
        )


class ActivationRule(_Strict):
    """How the inputs of the quantized linears of one part are quantized, with static scales.

    Attributes:
        percentile: share of the values, in per cent, that the percentile observer keeps in range.
        symmetric: zero point 0; otherwise it is found by calibration.
    """

    bits: Literal[4, 8] = 8
    group_size: Literal[16, 32, 64, 128, 256] = 128
    granularity: Granularity = "per_tensor"
    observer: Literal["mse", "min_max", "moving_average", "percentile"] = "mse"
    percentile: float = Field(99.99, gt=50, le=100)
    symmetric: bool = False


class ScaleSearch(_Strict):
    """The grid of the mean-squared-error search for initial scales."""

    candidates: int = Field(64, ge=1, le=4096)
    lowest: float = Field(0.3, ge=0.01, le=10)
    highest: float = Field(1.2, ge=0.01, le=10)

    @model_validator(mode="after")
    def _check(self) -> ScaleSearch:
        if self.lowest > self.highest:
            raise ValueError(f"lowest {self.lowest} is above highest {self.highest}")
        return self


class Calibration(_Strict):
    """How weights are given scales and codes; see `docs/recipes.md`.

    Attributes:
        method: "weights" looks at the weights alone; "moments" weighs the error of each weight by
            the second moment of what it multiplies, and rounds; "gptq" also hands the error of one
            weight on to those after it, and needs data. "auto" is gptq with data, else moments.
        samples: most samples that are looked at.
        tokens: most tokens of all of them together; the first sample is taken whatever its length.
        damping: share of the mean of the diagonal that is added to it, before it is inverted.
        order: columns are rounded by falling second moment of their inputs, or as they stand.
        asymmetric: share of the correction for what quantization before a linear did to its inputs;
            "auto" tries some at 3 bits and below, and keeps what is best on held-out samples.
        seed: draws the samples, or makes the synthetic ones.
    """

    method: Literal["auto", "weights", "moments", "gptq"] = "auto"
    samples: int = Field(128, ge=1, le=65_536)
    tokens: int = Field(16_384, ge=16, le=1 << 24)
    damping: float = Field(0.01, gt=0, le=1)
    order: Literal["activation", "natural"] = "activation"
    asymmetric: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    seed: int = Field(0, ge=0, le=(1 << 32) - 1)


class OnnxDeploy(_Strict):
    """How ONNX graphs are written; see `docs/onnx.md`.

    Attributes:
        ops: a linear layer with codes is one operator of ONNX Runtime, or two of standard ONNX.
        mode: kernels compute in float32 ("faithful"), or round their inputs to 8 bits ("fast");
            "auto" is fast where that changes nothing that counts.
        head: bits of a head that has no codes of its own; "keep" leaves it as it is, "auto" is 8
            for a large one, where that changes nothing that counts.
        embedding: the token embedding stays as it is.
        cache: what keys and values are kept in.
    """

    ops: Literal["matmulnbits", "qdq"] = "matmulnbits"
    mode: Literal["auto", "fast", "faithful"] = "auto"
    head: Literal["auto", "keep", 8, 4] = "auto"
    embedding: Literal["keep"] = "keep"
    cache: Literal["float32"] = "float32"


class Deploy(_Strict):
    """What the compiled model runs in."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    onnx: OnnxDeploy = OnnxDeploy()


class Distillation(_Strict):
    """The terms that a teacher adds to cross-entropy; see `gracec.objective`.

    Attributes:
        kind: "gdkd" (decoupled), "kl" (classical) or "none".
        gate: weigh positions by the teacher's confidence.
        omega: weight of the relational term at the visual tokens; 0 switches it off.
        omega_warmup: optimizer steps over which omega rises from 0; in short runs at most half of
            the run.
        controller: rule for the weight β of distillation.
        tau: target of the smoothed loss of the `dual-ascent` rule, in nats; "auto" finds it.
        beta: first β of `dual-ascent`; β of `fixed`.
        eta: rate of the rule; not used by tau: auto.
        beta_cap: nats that a full capacity is worth to `epoch-lagrangian`.
    """

    kind: Literal["gdkd", "kl", "none"] = "gdkd"
    temperature: float = Field(2.0, ge=0.01, le=100)
    alpha: float = Field(1.0, ge=0, le=MOST_WEIGHT)
    beta_dkd: float = Field(4.0, ge=0, le=MOST_WEIGHT)
    gate: bool = True
    omega: float = Field(3.0, ge=0, le=MOST_WEIGHT)
    omega_warmup: int = Field(400, ge=0, le=MOST_STEPS)
    controller: Literal["dual-ascent", "epoch-lagrangian", "fixed"] = "dual-ascent"
    tau: Annotated[float, Field(ge=0, le=MOST_WEIGHT)] | Literal["auto"] = 3.0
    eta: float = Field(0.003, gt=0, le=1)
    beta_cap: float = Field(3.0, ge=0, le=MOST_WEIGHT)
    beta: float = Field(0.5, ge=0, le=MOST_WEIGHT)
    beta_min: float = Field(0.1, ge=0, le=MOST_WEIGHT)
    beta_max: float = Field(1.0, gt=0, le=MOST_WEIGHT)
    ema_decay: float = Field(0.99, ge=0, lt=1)

    @property
    def needs_teacher(self) -> bool:
        return self.kind != "none" or self.omega > 0

    @model_validator(mode="after")
    def _check(self) -> Distillation:
        if self.controller == "epoch-lagrangian" and self.eta < 0.01:
            raise ValueError(f"eta {self.eta} is below 0.01, from which epoch-lagrangian is stated")
        if self.controller == "dual-ascent" and not (
            self.beta_min <= self.beta <= self.beta_max and self.beta_min < self.beta_max
        ):
            raise ValueError(
                f"beta {self.beta} is not between beta_min {self.beta_min} and "
                f"beta_max {self.beta_max}, or these are equal"
            )
        return self


class Training(_Strict):
    """Quantization-aware training: AdamW, a linear warm-up and a cosine to zero.

    Attributes:
        steps: optimizer steps; where it is null, `epochs` times the data.
        batch_size: samples of an optimizer step, over all ranks.
        micro_batch_size: samples that are in memory at once, on each rank.
        lr, scale_lr: highest learning rates of weights and of quantization scales.
        weight_decay: of weights; scales have none.
        warmup: share of the steps.
        clip: largest norm of the gradient.
        precision: of the matmuls; weights, scales and their optimizer stay in float32. "auto" is
            bfloat16 where an accelerator has it, and float32 on the CPU.
        frozen: parts that are not trained.
        learns: "all", weights and scales; or "scales": codes stay as they were before training, and
            every weight that is not quantized as it was.
        labels: which positions count: "answers", the tokens of answers; or "all": every position
            of text, which needs no answers. With a teacher the best state is then the one that is
            nearest to it, as nothing is known of what is right.
        answers: whose answers are learned: those of the "data"; or the "teacher" answers every
            question once before anything else, and its answers take their place.
        max_new_tokens: tokens of the teacher's longest answer.
        teacher_cache: a folder where what the teacher says of each sample is kept for later epochs
            and runs, and its decoder runs once; true is one among the user's caches.
        held_out: share of the data that chooses the best checkpoint, where no eval_data is given.
        keep: which state is kept: the best on the held-out part, or the last.
        evaluate_every: optimizer steps between two looks at the held-out part.
        checkpoint_every: optimizer steps between two checkpoints.
        max_skipped: steps in a row whose loss may be NaN or infinite before training stops.
        workers: processes that read samples and make batches ahead, of each rank; "auto" is a few
            where a GPU does the training, and none where the CPU does. No batch depends on it.
        compile: run the graphs through torch.compile.
        activation_checkpointing: share of the activations that may be kept, the others are computed
            again, which needs compile; or "blocks", which keeps what enters each decoder block and
            computes the rest again, without compile.
        strategy: what several processes hold. With "ddp" each has the whole student and teacher;
            with "sharded" its rows of both (FSDP2); "auto" shards what does not fit otherwise.
        deterministic: have an accelerator add up in a fixed order, so that a training that is
            repeated or resumed has equal bits; it takes longer. On the CPU it always does.
    """

    steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    epochs: float = Field(1.0, gt=0, le=10_000)
    batch_size: int = Field(16, ge=1, le=65_536)
    micro_batch_size: int = Field(8, ge=1, le=65_536)
    lr: float = Field(1e-5, ge=0, le=10)
    scale_lr: float = Field(2e-4, ge=0, le=10)
    weight_decay: float = Field(1e-3, ge=0, le=1)
    warmup: float = Field(0.03, ge=0, lt=1)
    clip: float = Field(1.0, gt=0, le=1e6)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    frozen: list[Literal["vision", "projector", "decoder", "head"]] = Field(
        ["vision"], max_length=4
    )
    learns: Literal["all", "scales"] = "all"
    labels: Literal["answers", "all"] = "answers"
    answers: Literal["data", "teacher"] = "data"
    max_new_tokens: int = Field(128, ge=1, le=1 << 16)
    teacher_cache: bool | Annotated[str, Field(min_length=1, max_length=4096)] = False
    seed: int = Field(0, ge=0, le=(1 << 32) - 1)
    max_length: int | None = Field(None, ge=8, le=1 << 20)
    held_out: float = Field(0.1, gt=0, lt=1)
    keep: Literal["best", "last"] = "best"
    evaluate_every: int = Field(50, ge=1, le=MOST_STEPS)
    checkpoint_every: int = Field(100, ge=1, le=MOST_STEPS)
    max_skipped: int = Field(5, ge=1, le=MOST_STEPS)
    workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = "auto"
    compile: bool = False
    activation_checkpointing: Annotated[float, Field(gt=0, le=1)] | Literal["blocks"] | None = None
    strategy: Literal["auto", "ddp", "sharded"] = "auto"
    deterministic: bool = False
    cross_entropy: float = Field(1.0, ge=0, le=MOST_WEIGHT)
    distillation: Distillation = Distillation()

    @property
    def chooses_by_teacher(self) -> bool:
        """Whether the best state is the one nearest to the teacher, not to the labels."""
        return self.labels == "all" and self.distillation.needs_teacher

    @model_validator(mode="after")
    def _check(self) -> Training:
        if self.activation_checkpointing is not None:
            by_block = self.activation_checkpointing == "blocks"
            if by_block and self.compile:
                raise ValueError("activation_checkpointing: blocks needs compile: false")
            if not by_block and not self.compile:
                raise ValueError("activation_checkpointing needs compile: true, or is blocks")
        if self.strategy == "sharded" and self.compile:
            raise ValueError("strategy: sharded needs compile: false")
        if self.cross_entropy == 0 and not self.distillation.needs_teacher:
            raise ValueError("every term of the objective is switched off")
        if self.teacher_cache and not self.distillation.needs_teacher:
            raise ValueError("teacher_cache needs a term that has a teacher")
        return self


class Expectation(_Strict):
    """What a compiled model has to reach on the questions of `eval_data`, or compiling fails.

    Attributes:
        metric: "accuracy", the share of exact answers; or "accuracy_change", that share minus the
            original model's on the same questions.
        at_least: the lowest value that passes: 0.8, or -0.01 for at most one point lost.
        type: only questions of this type count; null means all.
    """

    metric: Literal["accuracy", "accuracy_change"] = "accuracy"
    at_least: float = Field(ge=-1, le=1)
    type: Annotated[str, Field(max_length=200)] | None = None


class Recipe(_Strict):
    """A recipe: fields not given keep their default, unknown fields are refused.

    Attributes:
        weights: part of the model -> rule; parts that are missing or null keep their precision.
        layers: place in the model, or glob on the names of weights -> rule, or null; the last one
            that fits a weight is its rule, instead of that of its part. See `docs/recipes.md`.
        activations: part -> rule for the inputs of its quantized linears, calibrated on the
            training data; missing or null means that they stay floating point.
        calibration: how weights are given scales and codes; one written before there was such a
            section reads with the default.
        training: how to train weights and scales; null means post-training quantization.
        expect: the accuracy gate; null means none.
        passes: further passes with their places, such as "my-pass{depth=2} after
            plan-quantization"; `gracec passes` lists what is known.
    """

    name: Name
    description: str = Field("", max_length=4096)
    weights: dict[Part, WeightRule | None]
    layers: dict[Selector, WeightRule | None] = Field({}, max_length=1000)
    activations: dict[Part, ActivationRule | None] = {}
    scale_search: ScaleSearch = ScaleSearch()
    calibration: Calibration = Calibration()
    training: Training | None = None
    expect: Expectation | None = None
    passes: tuple[Annotated[str, Field(max_length=1000)], ...] = Field((), max_length=100)
    deploy: Deploy = Deploy()

    @classmethod
    def load(cls, source: str | Path | Recipe) -> Recipe:
        """A recipe from a built-in name ("w4a16-ptq") or the path of a YAML file.

        Raises:
            GracecError: for an unknown name, an unreadable file or a field that does not fit; the
                nearest known name is given.
        """
        if isinstance(source, Recipe):
            return source
        path = Path(source)
        if path.suffix not in (".yaml", ".yml"):
            path = lookup(str(source), known_recipes(), "recipe")
        return cls.from_dict({"name": path.stem, **read_yaml_mapping(path)}, where=str(path))

    @classmethod
    def from_dict(cls, fields: dict[str, Any], *, where: str = "recipe") -> Recipe:
        """A recipe from plain data.

        Raises:
            GracecError: naming the first field that does not fit.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            # An unknown key first: a misspelt one is why another seems to be missing.
            first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
            path = [str(part) for part in first["loc"]]
            field = ".".join(path)
            if first["type"] in ("extra_forbidden", "literal_error") and _is_key(first["loc"]):
                path = [part for part in path if part != "[key]"]
                raise GracecError(
                    f"unknown key {'.'.join(path)!r}",
                    where=where,
                    fix=nearest(path[-1], _all_keys()),
                ) from None
            message = first["msg"].removeprefix("Value error, ")
            if path == ["name"] and first["type"] == "string_pattern_mismatch":
                message = "not one line of up to 64 letters, digits, blanks and _.,+=@()-"
            raise GracecError(f"{field}: {message}" if field else message, where=where) from None

    def weight_rule(self, part: str) -> WeightRule | None:
        """How the weights of a part are quantized, if they are and no layer says otherwise."""
        return next((rule for name, rule in self.weights.items() if name == part), None)

    def rules(self) -> tuple[WeightRule, ...]:
        """Every rule by which some weight may get codes."""
        given = (*self.weights.values(), *self.layers.values())
        return tuple(rule for rule in given if rule is not None)

    def with_rules(self, **fields: Any) -> Recipe:
        """The same with these fields in every rule of weights."""
        changed = {
            name: {key: rule and rule.model_copy(update=fields) for key, rule in rules.items()}
            for name, rules in (("weights", self.weights), ("layers", self.layers))
        }
        return self.model_copy(update=changed)

    def activation_rule(self, part: str) -> ActivationRule | None:
        """How the inputs of the linears of a part are quantized, if they are."""
        return next((rule for name, rule in self.activations.items() if name == part), None)

    def with_onnx(self, **options: Any) -> Recipe:
        """The recipe with other fields of `deploy.onnx`; those that are None stay as they are.

        Raises:
            GracecError: naming the first that does not fit.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if not given:
            return self
        fields = self.model_dump(mode="json")
        fields["deploy"]["onnx"] |= given
        return self.from_dict(fields)

    def quantizes(self, part: Part) -> bool:
        """Whether weights of a part may get codes, by a rule that names it."""
        named = (rule for key, rule in self.layers.items() if part_named(key) == part)
        return any(rule is not None for rule in (self.weights.get(part), *named))

    @field_validator("layers")
    @classmethod
    def _are_selectors(cls, layers: dict[str, Any]) -> dict[str, Any]:
        for text in layers:
            if not is_selector(text):
                raise ValueError(f"{text!r} is no place, and no name of a weight: {HOW_TO}")
        return layers

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        scales_learn = self.training is not None and self.training.learns == "scales"
        if scales_learn and not self.rules():
            raise ValueError("training.learns: scales needs weights that are quantized")
        for part, rule in self.activations.items():
            if rule is not None and self.weights.get(part) is None:
                raise ValueError(
                    f"activations.{part} needs weights.{part}: "
                    "only the inputs of quantized weights are quantized"
                )
        if self.deploy.onnx.head in (4, 8) and self.quantizes("head"):
            raise ValueError("deploy.onnx.head: the head has codes already, by weights.head")
        return self

    @property
    def quantizes_activations(self) -> bool:
        """Whether the input of any linear is put on an integer grid, which has to be calibrated."""
        return any(self.activations.values())

    @property
    def calibrates_weights(self) -> bool:
        """Whether scales and codes of weights depend on what the model sees."""
        return bool(self.rules()) and self.calibration.method != "weights"

    @property
    def needs_data(self) -> bool:
        """Whether weights cannot be given codes without data."""
        return bool(self.rules()) and self.calibration.method == "gptq"

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data; without `passes` and `layers` where there are none,
        and without `deploy.onnx` where it is the default."""
        fields = self.model_dump(mode="json")
        if self.deploy.onnx == OnnxDeploy():
            del fields["deploy"]["onnx"]
        return {k: v for k, v in fields.items() if k not in ("passes", "layers") or v}

    def deciding(self) -> dict[str, Any]:
        """What codes and scales follow from, for a fingerprint: without how graphs are written,
        and with layers as pairs, since it sorts the keys of mappings and their order counts."""
        fields = self.to_dict()
        fields["deploy"].pop("onnx", None)
        return {**fields, "layers": list(fields["layers"].items())} if self.layers else fields


def built_in_recipes() -> list[str]:
    """Names of the recipes that come with gracec."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def known_recipes() -> dict[str, Path]:
    """Name -> file of every recipe: those of gracec, and those that other packages declare.

    An entry point `NAME = "package"` of the group `gracec.recipes` stands for `NAME.yaml` in the
    folder of the package.

    Raises:
        GracecError: if two have one name, or a declared one is not there.
    """
    found = {name: BUILT_IN / f"{name}.yaml" for name in built_in_recipes()}
    for entry in declared("gracec.recipes"):
        module = load_declared(entry)
        path = Path(str(module.__file__)).parent / f"{entry.name}.yaml"
        if not path.is_file():
            raise GracecError("no such recipe file", where=str(path), fix=f"see {entry.value}")
        if entry.name in found:
            raise GracecError(
                f"two recipes are called {entry.name!r}: {found[entry.name]} and {path}",
                fix="rename one, or uninstall its package",
            )
        found[entry.name] = path
    return dict(sorted(found.items()))


def _is_key(location: tuple[int | str, ...]) -> bool:
    """Whether pydantic complains about a key, of a model or of a mapping, rather than a value."""
    return location[-1] == "[key]" or location[-1] not in _all_keys()


def _all_keys() -> list[str]:
    models: tuple[type[BaseModel], ...] = (
        *(Recipe, WeightRule, ActivationRule, ScaleSearch, Calibration, Deploy, OnnxDeploy),
        *(Training, Distillation, Expectation),
    )
    keys = [name for model in models for name in model.model_fields]
    return [*keys, *Part.__args__]  # type: ignore[attr-defined]
