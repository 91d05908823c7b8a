"""Names that users import stay where they are, however the files behind them move."""

import importlib

import pytest

PUBLIC = {
    "gracec": ["CompiledModel", "Recipe", "compile", "load", "plan"],
    "gracec.capture": [
        "GENERIC",
        "Family",
        "capture",
        "capture_serving",
        "captured_equals_eager",
        "families",
        "family_of",
    ],
    "gracec.capture.families": ["GENERIC", "Family", "Generic", "families", "family_of"],
    "gracec.compiler": ["CompiledModel", "compile", "load"],
    "gracec.demo": ["TRAINING_QUESTIONS", "run_demo", "write_questions"],
    "gracec.doctor": ["Check", "Diagnosis", "diagnose"],
    "gracec.errors": ["GateError", "GracecError", "GracecWarning", "PassError"],
    "gracec.evaluate": [
        "Prediction",
        "VqaReport",
        "VqaSample",
        "VqaScore",
        "accuracy_rows",
        "answer",
        "answers",
        "evaluate_vqa",
        "format_table",
        "load_image",
        "load_samples",
        "paired_difference",
    ],
    "gracec.gates": ["LogitAgreement", "logit_agreement"],
    "gracec.ir": ["diff", "format"],
    "gracec.models": ["load_config", "load_model", "load_processor"],
    "gracec.module": [
        "capture_module",
        "export_module",
        "freeze_module",
        "prepare_module",
        "quantize_module",
    ],
    "gracec.objective": [
        "DualAscentController",
        "EpochLagrangianController",
        "FixedController",
        "GraceObjective",
        "gdkd_loss",
        "rcka_loss",
    ],
    "gracec.observers": ["OBSERVERS", "ActivationSpec", "weight_scales"],
    "gracec.ops": ["dequantize", "fake_quantize", "fake_quantize_activation"],
    "gracec.passes": ["Pass", "PassResult", "all_passes", "parse_pipeline", "run_passes"],
    "gracec.passes.freeze": ["Freeze", "frozen_activations", "frozen_weights"],
    "gracec.passes.plan_quantization": ["Plan", "PlanQuantization", "plan_of"],
    "gracec.program": ["Program", "annotate", "annotation"],
    "gracec.quant": [
        "QuantSpec",
        "dequantize",
        "fake_quantize",
        "quantize",
        "search_scales",
        "signal_to_noise_db",
    ],
    "gracec.recipe": ["Recipe", "Training", "built_in_recipes"],
    "gracec.report": ["Report", "weight_bytes"],
    "gracec.serve": ["Server"],
    "gracec.store": ["file_sha256", "read_manifest", "read_store", "write_directory"],
    "gracec.training.data": ["epoch_order", "open_train_data"],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_names_that_users_import_stay(module: str) -> None:
    found = importlib.import_module(module)
    missing = [name for name in PUBLIC[module] if not hasattr(found, name)]
    assert not missing, f"{module} has lost {', '.join(missing)}"


def test_the_same_thing_is_there_under_both_names() -> None:
    for public, own, name in (
        ("gracec.program", "gracec.ir", "Program"),
        ("gracec.ops", "gracec.quant.ops", "fake_quantize"),
        ("gracec.observers", "gracec.quant.observers", "weight_scales"),
        ("gracec.quant", "gracec.quant.codes", "quantize"),
        ("gracec.training.data", "gracec.data.conversations", "open_train_data"),
    ):
        modules = (importlib.import_module(module) for module in (public, own))
        one, other = (getattr(module, name) for module in modules)
        assert one is other
