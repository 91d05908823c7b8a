"""What must not be switched off without a test that fails: every call of a gate, every note on its
way into a report, and what each pass ensures.

A gate is tested beside its code. These are the places that call it: each entry takes one away.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    """One edit of one file that has to fail a test.

    Attributes:
        name: says what is taken away.
        file: of the repository.
        text: that occurs once in it.
        replacement: what stands there instead.
        tests: files or ids of tests, one of which has to fail.
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]


def mutations(root: Path = ROOT) -> tuple[Mutation, ...]:
    """All of them: those that the passes of a tree have by themselves, and those written here."""
    return (*switched_off(root), *WIRING)


def switched_off(root: Path) -> Iterator[Mutation]:
    """`ensures` of each pass, with nothing in it; a test of the pass has to miss it."""
    for path in sorted((root / "gracec/passes").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        for cls in ast.walk(ast.parse(source)):
            name = _name_of_pass(cls)
            for method in cls.body if isinstance(cls, ast.ClassDef) and name else ():
                if isinstance(method, ast.FunctionDef) and method.name == "ensures":
                    lines = source.splitlines(keepends=True)
                    start, body = method.lineno - 1, method.body[0].lineno - 1
                    head = "".join(lines[start:body])
                    yield Mutation(
                        f"ensures of {name}",
                        path.relative_to(root).as_posix(),
                        "".join(lines[start : method.end_lineno]),
                        f"{head}        return\n",
                        (f"tests/passes/test_{path.stem}.py",),
                    )


def _name_of_pass(cls: ast.AST) -> str:
    """What a class says it is called, or ""."""
    for line in cls.body if isinstance(cls, ast.ClassDef) else ():
        if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == "name":
            return str(ast.literal_eval(line.value)) if line.value else ""
    return ""


FORMAT, WRITE = "gracec/backends/onnx/format.py", "gracec/backends/onnx/write.py"
MODE = "gracec/backends/onnx/mode.py"
FUSED, ON_FUSED = "gracec/backends/onnx/fused", "tests/backends/onnx/fused"
GENAI, SERVING = "gracec/backends/onnx/genai.py", "gracec/capture/serving.py"
COMPILER, MODULE = "gracec/compiler.py", "gracec/module.py"
PREPARE, FREEZE, LOWER = (f"gracec/stages/{name}.py" for name in ("prepare", "freeze", "lower"))
PUBLISH, EXAMINE, TRAIN = (f"gracec/stages/{name}.py" for name in ("publish", "examine", "train"))
FORMAT_BASE = "gracec/backends/base.py"
PACKED, TORCHAO = "gracec/backends/packed.py", "gracec/targets/torchao.py"

COMPILE, BASE, MODULES = (
    "tests/test_compiler.py",
    "tests/backends/test_base.py",
    "tests/test_module.py",
)
ONNX, BYTES = "tests/backends/onnx/test_format.py", "tests/report/test_report.py"
ON_MODE = "tests/backends/onnx/test_mode.py"
ANSWERS = (f"{ON_MODE}::test_graphs_that_answer_otherwise_than_the_codes_are_an_error",)
TOLD = (f"{ONNX}::test_everything_that_was_noted_is_told",)
BOUNDS = (f"{MODULES}::test_what_is_off_by_more_than_the_bound_is_not_written",)
READ_BACK = (f"{BASE}::test_what_reads_back_otherwise_is_an_error",)
ON_PREPARE, ON_FREEZE, ON_LOWER, ON_PUBLISH, ON_EXAMINE, ON_TRAIN = (
    (f"tests/stages/test_{name}.py",)
    for name in ("prepare", "freeze", "lower", "write_artifact", "examine", "train")
)
RELOAD = "tests/test_reload.py::test_the_figure_is_in_both_reports"
ROWS, GPTQ = "gracec/ir/matmul_rows.py", "gracec/quant/gptq.py"
CORRECT, ON_CORRECT = "gracec/passes/correct_codes.py", "tests/passes/test_correct_codes.py"
ON_GPTQ = f"{ON_CORRECT}::test_codes_are_those_of_gptq_on_what_the_quantized_layers_feed"
ON_ROWS = "tests/ir/test_matmul_rows.py"
ON_CALIBRATION_RUN = "tests/training/test_calibration_run.py"
ON_WRITE = ("tests/backends/onnx/test_write.py",)
ON_GENAI = ("tests/backends/onnx/test_genai.py::test_every_header_is_looked_at",)

WIRING: tuple[Mutation, ...] = (
    # How a pass is run.
    Mutation(
        "what a pass requires is not asked",
        "gracec/passes/base.py",
        "        self.requires(program)\n",
        "",
        ("tests/passes/test_base.py",),
    ),
    Mutation(
        "what a pass ensures is not asked",
        "gracec/passes/base.py",
        "        self.ensures(program, result.program)\n",
        "",
        ("tests/passes/test_base.py",),
    ),
    Mutation(
        "read-back check in lower-torchao",
        "gracec/passes/lower_torchao.py",
        "        if difference:\n",
        "        if False:\n",
        ("tests/passes/test_lower_torchao.py",),
    ),
    # source
    Mutation(
        "finite weights of a model that is given",
        "gracec/stages/source.py",
        "        check_finite(own)\n",
        "",
        ("tests/test_bad_input.py::test_a_model_object_is_checked_too",),
    ),
    Mutation(
        "finite weights of a model that is loaded",
        "gracec/models/loading.py",
        "    check_finite(model, where=str(directory))\n",
        "",
        ("tests/models/test_loading.py::test_a_weight_that_is_not_finite_is_named",),
    ),
    # what was saved
    Mutation(
        "what was saved is checked",
        PUBLISH,
        '            journal.figures["reloaded_equals_compiled"] = check(target)\n',
        "",
        ON_PUBLISH,
    ),
    Mutation(
        "what was saved is loaded in a fresh process",
        COMPILER,
        "            if check_reload and not unknown\n",
        "            if False\n",
        (RELOAD,),
    ),
    Mutation(
        "tensors are those that were written",
        "gracec/store.py",
        "    check_files(directory, {TENSORS: manifest.files.get(TENSORS, manifest.sha256)})\n",
        "",
        ("tests/test_store.py::test_a_changed_or_truncated_file_is_named",),
    ),
    Mutation(
        "configuration and processor are those that were written",
        "gracec/store.py",
        "        check_configuration(directory, manifest.files)\n",
        "        pass\n",
        ON_PUBLISH,
    ),
    Mutation(
        "tensors are what their specs can mean",
        "gracec/store.py",
        "        check_frozen(weight, fqn, where=str(self._path))\n",
        "",
        ("tests/test_store.py::test_a_tensor_that_its_spec_cannot_mean_is_named",),
    ),
    Mutation(
        "tensors are those of the model",
        PUBLISH,
        "    _check_tensors(model, store, directory / TENSORS)\n",
        "",
        ON_PUBLISH,
    ),
    Mutation(
        "files of an ONNX directory are those that were written",
        "gracec/backends/onnx/session.py",
        "        config._check_files(folder)\n",
        "",
        ("tests/backends/onnx/test_session.py",),
    ),
    Mutation(
        "configuration beside ONNX graphs is the one that was written",
        "gracec/backends/onnx/runner.py",
        "        session_config.check_model(directory)\n",
        "",
        ("tests/backends/onnx/test_session.py",),
    ),
    # source
    Mutation(
        "what is compiled is what was given",
        "gracec/stages/source.py",
        "    gates.logits_are_those_of("
        '"the model that was given", expected, found, 0.0, type(own).__name__)\n',
        "    pass\n",
        ("tests/models/test_ties.py::test_a_source_that_computes_something_else_is_an_error",),
    ),
    Mutation(
        "merged adapters are those of PEFT",
        "gracec/stages/peft.py",
        'gates.logits_are_those_of("PEFT", expected, eager_logits(merged, batch), bound, where)',
        "0.0",
        ("tests/models/test_lora.py::test_a_merge_that_computes_something_else_is_found",),
    ),
    # prepare
    Mutation(
        "captured equals eager",
        PREPARE,
        "equal = captured_equals_eager(program, model)",
        "equal = 3",
        ON_PREPARE,
    ),
    Mutation(
        "a GPU computes the same by the kernels that it chooses",
        PREPARE,
        "gates.default_kernels_agree(program, model), gates",
        "0.0, gates",
        ("tests/models/test_devices.py",),
    ),
    Mutation(
        "blocks are those of the model",
        PREPARE,
        "    blocks = blocks_equal_hidden_states(run_passes(program, ANALYSIS).program, model)\n",
        "    blocks = 1\n",
        ON_PREPARE,
    ),
    Mutation(
        "notes of preparing",
        PREPARE,
        "    journal.extend(result.notes)\n",
        "",
        ON_PREPARE,
    ),
    Mutation(
        "notes of calibration",
        PREPARE,
        '    journal.note("calibration", *notes())\n',
        "",
        ("tests/test_activations.py::test_a_sample_that_does_not_calibrate_is_reported",),
    ),
    Mutation(
        "corrected logits are held beside rounded ones",
        PREPARE,
        "    _compare(program, result.program, observed, request, journal)\n",
        "",
        (f"{ON_PREPARE[0]}::test_what_data_has_corrected_is_in_the_report",),
    ),
    Mutation(
        "corrected logits that are worse are an error in strict mode",
        PREPARE,
        "        if request.strict:\n            raise GateError(what",
        "        if False:\n            raise GateError(what",
        (
            f"{ON_PREPARE[0]}::test_logits_that_are_worse_than_rounded_ones_are_told_and_an_error_in_strict_mode",
        ),
    ),
    Mutation(
        "formats are asked before a training",
        PREPARE,
        "        check_formats(request.formats, planned)\n",
        "        pass\n",
        ON_PREPARE,
    ),
    Mutation(
        "the target is asked before a training",
        PREPARE,
        "        request.target.check(planned, strict=request.strict)\n",
        "        pass\n",
        ON_PREPARE,
    ),
    Mutation(
        "the target is asked whether it would run dense",
        PREPARE,
        "request.target.check(planned, strict=request.strict)",
        "request.target.check(planned)",
        ON_PREPARE,
    ),
    Mutation(
        "compile accepts the plan first",
        COMPILER,
        "    accept(prepared, request)\n",
        "",
        (
            "tests/stages/test_publish.py::test_a_format_that_cannot_hold_the_plan_is_refused_before_training",
        ),
    ),
    # train
    Mutation(
        "the teacher fits the student",
        TRAIN,
        "        check_teacher(prepared.model, shape)\n",
        "",
        ON_TRAIN,
    ),
    Mutation(
        "the tokenizers are the same",
        TRAIN,
        "        check_tokenizers(source.processor, load_processor(path))\n",
        "",
        ON_TRAIN,
    ),
    Mutation(
        "note of processes that compile and hold everything",
        TRAIN,
        '    journal.note("training", *_always_ddp(rule, strict=request.strict))\n',
        "",
        ON_TRAIN,
    ),
    Mutation(
        "note of a student whose logits stay whole",
        TRAIN,
        '    journal.note("training", *_whole_logits("student", result))\n',
        "",
        ON_TRAIN,
    ),
    Mutation(
        "note of a teacher whose logits stay whole",
        TRAIN,
        '    journal.note("training", *_whole_logits("teacher", result))\n',
        "",
        ON_TRAIN,
    ),
    Mutation(
        "note of what a teacher cache had and was given",
        TRAIN,
        '        journal.note("training", *cached.notes)\n',
        "",
        ("tests/training/test_teacher_cache.py::test_a_training_with_it_is_the_training_without",),
    ),
    Mutation(
        "notes of the training",
        TRAIN,
        '    journal.note("training", *said, *curve.notes)\n',
        "",
        ON_TRAIN,
    ),
    Mutation(
        "an interrupted training is not overwritten",
        COMPILER,
        '        journal.note("", *open_run(request.training_dir, resume=request.resume))\n',
        "        pass\n",
        (f"{ON_CALIBRATION_RUN}::test_an_interrupted_calibration_resumes_to_the_same_codes",),
    ),
    # freeze
    Mutation(
        "frozen equals fake-quantized",
        FREEZE,
        "    gates.frozen_equals_fake_quantized(fake_quantized, result.program, inputs)\n",
        "",
        ON_FREEZE,
    ),
    Mutation(
        "notes of freezing",
        FREEZE,
        "        journal.extend(result.notes)\n",
        "",
        ON_FREEZE,
    ),
    Mutation(
        "bytes of scales",
        "gracec/report/report.py",
        "    scales = sum(weight.scales.numel() * 2 for weight in weights)\n",
        "    scales = 0\n",
        (f"{BYTES}::test_codes_and_scales_are_counted",),
    ),
    Mutation(
        "bytes of codes",
        "gracec/report/report.py",
        "    codes = sum(weight.shape.numel() * weight.spec.storage_bits // 8 "
        "for weight in weights)\n",
        "    codes = 0\n",
        (f"{BYTES}::test_codes_and_scales_are_counted",),
    ),
    Mutation(
        "what a training came to is kept",
        COMPILER,
        "        keep(frozen, request, journal)\n",
        "        pass\n",
        ("tests/stages/test_publish.py::test_a_late_failure_costs_no_training",),
    ),
    # lower
    Mutation("notes of lowering", LOWER, "    journal.extend(notes)\n", "", ON_LOWER),
    Mutation(
        "the gates of the target",
        LOWER,
        "    journal.figures.update(target.gates(runtime, frozen))\n",
        "",
        ON_LOWER,
    ),
    Mutation(
        "the logits are held to the frozen ones",
        LOWER,
        "        _agree(runtime, frozen, target, journal)\n",
        "        pass\n",
        ON_LOWER,
    ),
    Mutation(
        "lowered is as good as dense",
        LOWER,
        "bound = target.agrees(runtime, found, beside, reference.dtype)",
        "bound = 1.0",
        ON_LOWER,
    ),
    Mutation(
        "no INT4 kernel runs in the dense twin",
        LOWER,
        "    if kernels.count:\n",
        "    if False:\n",
        ON_LOWER,
    ),
    Mutation(
        "strict reaches the target",
        LOWER,
        "target.lower(frozen, strict=strict)",
        "target.lower(frozen)",
        ON_LOWER,
    ),
    Mutation(
        "error of the INT4 matmuls",
        TORCHAO,
        "error = gates.matmul_error(packed, frozen.weights)",
        "error = 0.0",
        ON_LOWER,
    ),
    Mutation(
        "count of INT4 kernels",
        TORCHAO,
        "kernels = gates.int4_kernels_run(program, inputs, model, own_inputs)",
        "kernels = len(packed)",
        ON_LOWER,
    ),
    Mutation(
        "count of INT4 kernels in the generating model",
        TORCHAO,
        "gates.int4_kernels_run(program, inputs, model, own_inputs)",
        "gates.int4_kernels_run(program, inputs)",
        ON_LOWER,
    ),
    Mutation(
        "lowered equals generating",
        TORCHAO,
        "Equal(captured_equals_eager(program, model), ",
        "Equal(3, ",
        ON_LOWER,
    ),
    Mutation(
        "notes of the target onnxruntime",
        "gracec/targets/onnxruntime.py",
        "[Note(Onnx.name, note) for note in notes]",
        "[]",
        ("tests/targets/test_onnxruntime.py::test_what_the_format_says_is_a_note",),
    ),
    # examine
    Mutation(
        "the accuracy is as expected",
        EXAMINE,
        "            gates.accuracy_is_as_expected(accuracy, request.recipe.expect)\n",
        "            pass\n",
        ON_EXAMINE,
    ),
    Mutation(
        "a low accuracy is kept in mind",
        EXAMINE,
        "            failure = error\n",
        "            pass\n",
        ON_EXAMINE,
    ),
    Mutation(
        "a low accuracy is an error",
        COMPILER,
        "    if exam.failure is not None:\n",
        "    if False:\n",
        (f"{COMPILE}::test_a_model_that_answers_too_badly_is_not_handed_over",),
    ),
    # publish
    Mutation(
        "formats are asked before they write",
        PUBLISH,
        "    check_formats(formats, frozen)\n    saved: list[Report] = []\n",
        "    saved: list[Report] = []\n",
        ON_PUBLISH,
    ),
    Mutation(
        "notes of formats reach the caller",
        PUBLISH,
        "        notes.extend(_write_formats(frozen, formats, target))\n",
        "        _write_formats(frozen, formats, target)\n",
        ON_PUBLISH,
    ),
    Mutation(
        "notes of formats reach the report",
        PUBLISH,
        "            journal.extend(notes)\n",
        "",
        ON_PUBLISH,
    ),
    Mutation(
        "sha256 of the codes",
        "gracec/file_hashes.py",
        "        if file_sha256(path) != expected:\n",
        "        if False:\n",
        ("tests/test_store.py::test_a_changed_or_truncated_file_is_named",),
    ),
    # Formats that pack.
    Mutation(
        "stored weights are read back",
        PACKED,
        "        self.check_stored_weights(frozen, directory)\n",
        "",
        READ_BACK,
    ),
    Mutation(
        "stored weights are codes times scales",
        FORMAT_BASE,
        "            if found.dtype != expected.dtype or not torch.equal(found, expected):\n",
        "            if False:\n",
        READ_BACK,
    ),
    Mutation(
        "every quantized weight is stored",
        FORMAT_BASE,
        "        if missing:\n            raise",
        "        if False:\n            raise",
        (f"{BASE}::test_a_weight_that_does_not_read_back_is_an_error",),
    ),
    Mutation(
        "a packed model is whole",
        PACKED,
        "        check_whole({*frozen.weights, *frozen.others}, model)\n",
        "",
        (f"{BASE}::test_an_artifact_must_be_whole",),
    ),
    Mutation(
        "notes of a format that packs",
        PACKED,
        "notes, generation = [*self.notes(frozen)], frozen.generation_config",
        "notes, generation = [], frozen.generation_config",
        ("tests/backends/test_compressed_tensors.py::test_narrow_codes_are_named_in_the_notes",),
    ),
    # ONNX: from one graph of training to three that serve.
    Mutation(
        "shapes of serving graphs",
        SERVING,
        "    _check_shapes(name, serving)\n",
        "",
        ("tests/capture/test_serving.py::test_a_dimension_that_came_out_fixed_is_an_error",),
    ),
    Mutation(
        "every weight is in a serving graph",
        SERVING,
        "        if fqn not in found:\n",
        "        if False:\n",
        ("tests/capture/test_serving.py::test_codes_are_held_to_the_names_and_hashes_of_the_plan",),
    ),
    Mutation(
        "no weight is in two serving graphs",
        SERVING,
        "            if fqn in found:\n",
        "            if False:\n",
        ("tests/capture/test_serving.py::test_codes_are_held_to_the_names_and_hashes_of_the_plan",),
    ),
    Mutation(
        "hashes of codes in serving graphs",
        SERVING,
        "        if found[fqn] != code_hash(weight):\n",
        "        if False:\n",
        ("tests/capture/test_serving.py::test_codes_that_come_out_otherwise_are_an_error",),
    ),
    Mutation(
        "serving graphs together equal training",
        FORMAT,
        "composed_equals_training(serving, training, model)\n",
        "0.0\n",
        (f"{ONNX}::test_graphs_that_compute_something_else_than_training_are_not_written",),
    ),
    Mutation(
        "every weight of a graph is lowered",
        FORMAT,
        "            if lowered.keys() != planned:\n",
        "            if False:\n",
        (f"{ONNX}::test_a_weight_that_is_not_lowered_is_an_error",),
    ),
    Mutation(
        "error of the matmuls in ONNX",
        FORMAT,
        "gates.matmul_error(emitted, self.ops, self.mode)",
        "0.0",
        (f"{ONNX}::test_a_kernel_that_is_off_by_more_than_the_bound_is_an_error",),
    ),
    Mutation(
        "graphs compute what was compiled",
        MODE,
        "                lowered_is_as_good_as_dense(found.compiled, self.dense_compiled, dtype)\n",
        "                pass\n",
        (f"{ON_MODE}::test_graphs_of_another_model_than_was_compiled_are_an_error",),
    ),
    Mutation(
        "faithful graphs are as good as dense",
        MODE,
        "            lowered_is_as_good_as_dense(found.own, self.dense)\n",
        "            pass\n",
        ANSWERS,
    ),
    Mutation(
        "rounding of fast graphs is small",
        MODE,
        "            gates.rounding_is_small(found.logits)\n",
        "            pass\n",
        ANSWERS,
    ),
    Mutation(
        "greedy answers are the same",
        MODE,
        "        if mode == FAITHFUL and found.greedy.different:\n",
        "        if False:\n",
        ANSWERS,
    ),
    Mutation(
        "notes of ONNX passes",
        FORMAT,
        "        return (*notes, *said, *genai.notes(frozen))\n",
        "        return (*said, *genai.notes(frozen))\n",
        TOLD,
    ),
    Mutation(
        "summary of the ONNX gates",
        FORMAT,
        "        said = (*fused, _summary(figures), *head.notes, *chosen)\n",
        "        said = (*fused, *head.notes, *chosen)\n",
        TOLD,
    ),
    Mutation(
        "what onnxruntime-genai would do otherwise",
        FORMAT,
        "        return (*notes, *said, *genai.notes(frozen))\n",
        "        return (*notes, *said)\n",
        TOLD,
    ),
    Mutation("an ONNX file is valid", WRITE, "    gates.file_is_valid(file)\n", "", ON_WRITE),
    Mutation(
        "kernels of a session",
        WRITE,
        "kernels = gates.kernels_in_session(file, ops, mode, planned)",
        "kernels = sum(planned.values())",
        ON_WRITE,
    ),
    Mutation(
        "stored weights of a graph are exact",
        WRITE,
        "exact = gates.stored_weights_are_exact(file, frozen)",
        "exact = len(lowered)",
        ON_WRITE,
    ),
    Mutation(
        "stored weights of a graph are all there",
        WRITE,
        "    if exact < len(lowered):\n",
        "    if False:\n",
        ON_WRITE,
    ),
    Mutation(
        "parts of joined weights are exact",
        f"{FUSED}/decoder.py",
        "    _parts_are_exact(path, joined, weights)\n",
        "",
        (f"{ON_FUSED}/test_decoder.py",),
    ),
    Mutation(
        "the mask that is left out is the causal one",
        f"{FUSED}/attention.py",
        "        _check_causal(mask, compute, positions)\n",
        "        pass\n",
        (f"{ON_FUSED}/test_decoder.py",),
    ),
    Mutation(
        "tensors that are joined are adjacent",
        f"{FUSED}/linears.py",
        "(one.offset or 0) + one.nbytes == next_.offset",
        "True",
        (f"{ON_FUSED}/test_linears.py",),
    ),
    Mutation(
        "what is padded does not go to the fused decoder",
        f"{FUSED}/session.py",
        " and bool(mask.all())",
        "",
        (f"{ON_FUSED}/test_session.py",),
    ),
    Mutation(
        "logits and tokens of the fused decoder",
        FORMAT,
        "hold_fused(runner, serving, model, expected.dense, config.mode)",
        "{}",
        (f"{ONNX}::test_the_figures_of_the_gates",),
    ),
    Mutation(
        "sha256 of graphs",
        "gracec/backends/onnx/session.py",
        "        check_files(folder, self.sha256, fix=AGAIN)\n",
        "        pass\n",
        ("tests/backends/onnx/test_session.py::test_an_edited_graph",),
    ),
    Mutation(
        "headers of genai are valid",
        GENAI,
        "        gates.file_is_valid(written[name])\n",
        "",
        ON_GENAI,
    ),
    Mutation(
        "headers of genai are run",
        GENAI,
        "    _check(model, files, written, options)\n",
        "",
        ON_GENAI,
    ),
    Mutation(
        "headers of genai compute the same",
        GENAI,
        "        if not torch.equal(run(headers[name], feed), expected):\n",
        "        if False:\n",
        ON_GENAI,
    ),
    # What codes and scales are calibrated on.
    Mutation(
        "each group of a convolution multiplies rows of its own",
        ROWS,
        "yield group, rows[:, group]",
        "yield group, rows[:, 0]",
        (ON_ROWS,),
    ),
    Mutation(
        "each expert multiplies rows of its own",
        ROWS,
        "yield expert, x[rows]",
        "yield expert, x",
        (ON_ROWS,),
    ),
    Mutation(
        "values are let go of when nobody looks at them",
        "gracec/ir/stream.py",
        "        self._watched.discard(node)\n",
        "",
        (f"{ON_CORRECT}::test_nothing_is_left_in_the_streams",),
    ),
    Mutation(
        "both signs of a scale are tried",
        "gracec/quant/scale_search.py",
        "scales = torch.cat([scales, -scales])",
        "scales = torch.cat([scales, scales])",
        ("tests/quant/test_scale_search.py",),
    ),
    Mutation(
        "columns are corrected in the order of falling moments",
        GPTQ,
        "descending=True",
        "descending=False",
        ("tests/quant/test_gptq.py",),
    ),
    Mutation(
        "a feature that is always 0 does not keep a matrix from being factored",
        GPTQ,
        "torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal))",
        "diagonal",
        (f"{ON_CORRECT}::test_inputs_that_are_always_0_are_no_error",),
    ),
    Mutation(
        "what is observed weighs the search of scales",
        "gracec/passes/insert_fake_quant.py",
        "            if observer.moments.seen:\n",
        "            if False:\n",
        ("tests/passes/test_observe_second_moments.py",),
    ),
    Mutation(
        "what is held out is not calibrated on",
        CORRECT,
        "self.calibrating = range(len(samples))",
        "self.calibrating = range(count)",
        (ON_GPTQ,),
    ),
    Mutation(
        "what is before a layer is quantized when it is calibrated",
        CORRECT,
        "until, self._quantized(found))",
        "until, self._quantized({}))",
        (ON_GPTQ,),
    ),
    Mutation(
        "a text says nothing about the inputs of a tower",
        "gracec/passes/insert_observers.py",
        'return not (text_alone and annotation(activation).get("modality") == "vision")',
        "return True",
        (f"{ON_CORRECT}::test_a_text_corrects_no_weight_of_the_tower",),
    ),
    Mutation(
        "the divergence decides how much of the asymmetric correction is taken",
        CORRECT,
        "if not found or divergence < least:",
        "if not found:",
        (f"{ON_CORRECT}::test_shares_are_tried_at_few_bits_and_the_divergence_decides",),
    ),
    Mutation(
        "codes that are worse than plain rounding are not taken",
        CORRECT,
        "if not errors[chosen] <= errors[0]:",
        "if False:",
        (f"{ON_CORRECT}::test_where_correcting_is_worse_on_held_out_inputs_the_weight_is_rounded",),
    ),
    # Modules that are no vision-language models.
    Mutation(
        "outputs of a module that are worse than rounded ones are an error in strict mode",
        MODULE,
        "if strict and not errors[0] <= errors[1]:",
        "if False:",
        (f"{MODULES}::test_outputs_that_are_worse_than_rounded_ones_are_an_error_in_strict_mode",),
    ),
    Mutation(
        "a captured module computes the same",
        "gracec/capture/module.py",
        "            _check_equal(program, module, inputs)\n",
        "            pass\n",
        (f"{MODULES}::test_what_is_refused",),
    ),
    Mutation(
        "a captured module is run on larger inputs",
        "gracec/capture/module.py",
        "    yield larger\n",
        "",
        (f"{MODULES}::test_a_graph_that_is_right_at_the_example_alone_is_an_error",),
    ),
    Mutation(
        "outputs of a module in ONNX Runtime",
        MODULE,
        "_output_error(program, session, mode)\n        del",
        "0.0\n        del",
        BOUNDS,
    ),
    Mutation(
        "error of the matmuls of a module",
        MODULE,
        "onnx_gates.matmul_error(written.lowered, ops, mode)",
        "0.0",
        BOUNDS,
    ),
    Mutation(
        "notes of preparing a module",
        MODULE,
        "    result.program.notes = result.notes\n",
        "",
        (f"{MODULES}::test_what_the_passes_say_is_in_the_notes",),
    ),
    Mutation(
        "notes of freezing a module",
        MODULE,
        "    result.program.notes = (*program.notes, *result.notes)\n",
        "    result.program.notes = program.notes\n",
        (f"{MODULES}::test_what_the_passes_say_is_in_the_notes",),
    ),
    # What looks at a model without compiling it.
    Mutation(
        "the doctor compares the graph with the model",
        "gracec/doctor.py",
        "count = captured_equals_eager(program, model)",
        "count = 3",
        ("tests/test_doctor.py::test_a_graph_that_computes_something_else_blocks",),
    ),
    Mutation(
        "the doctor compares on the processor's batch",
        "gracec/doctor.py",
        "count += captured_equals_eager(program, model, [self.batch])",
        "count += 1",
        ("tests/test_doctor.py::test_a_graph_that_is_wrong_for_the_batch_of_the_processor_blocks",),
    ),
)
"""Written by hand, in the order in which a compilation comes to them."""
