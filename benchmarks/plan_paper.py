"""The two settings of the GRACE paper as planned: memory of every kind, and seconds of a step.

    python benchmarks/plan_paper.py        writes benchmarks/results/plan_paper.json

Nothing is trained, and no weight is read: the configurations are those of the published models.
Samples have 1024 tokens, of which a picture takes 800 (Qwen2-VL) or 576 (LLaVA), and 200 are
learned.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import write_result

GB = 10**9
PAIRS: dict[str, dict[str, Any]] = {
    "Qwen2-VL-2B from 7B": {
        "devices": 1,
        "batch_size": 16,
        "picture": (1120, 560),
        "text": 224,
        "rows": {
            "float32, micro-batch 8": {"micro_batch_size": 8},
            "bfloat16, micro-batch 2": {"micro_batch_size": 2, "precision": "bfloat16"},
        },
    },
    "LLaVA-1.5-7B from 13B": {
        "devices": 8,
        "batch_size": 64,
        "picture": (336, 336),
        "text": 448,
        "rows": {
            "bfloat16, micro-batch 1": {
                "micro_batch_size": 1,
                "precision": "bfloat16",
                "strategy": "ddp",
            },
            "sharded, bfloat16, micro-batch 8, blocks again": {
                "micro_batch_size": 8,
                "precision": "bfloat16",
                "checkpointing": True,
                "strategy": "sharded",
            },
        },
    },
}


def qwen2_vl(width: int, inner: int, heads: int, groups: int, words: int, tied: bool) -> Any:
    from transformers import Qwen2VLConfig

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 28,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": words,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": tied,
        "rope_parameters": rope,
    }
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": width}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={**vision, "mlp_ratio": 4, "patch_size": 14, "spatial_merge_size": 2},
        tie_word_embeddings=tied,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )
    config.dtype = "bfloat16"
    return config


def llava(width: int, inner: int, layers: int, heads: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=32064,
            max_position_embeddings=4096,
        ),
        image_token_index=32000,
        image_seq_length=576,
    )
    config.dtype = "float16"
    return config


def models(name: str) -> tuple[Any, Any]:
    """Student and teacher."""
    if name.startswith("Qwen"):
        return (
            qwen2_vl(1536, 8960, 12, 2, 151936, True),
            qwen2_vl(3584, 18944, 28, 4, 152064, False),
        )
    return llava(4096, 11008, 32, 32), llava(5120, 13824, 40, 40)


def planned(name: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each setting of a pair."""
    from gracec.models.hub import find_description
    from gracec.planning import Pair, Planner, Rates, Rehearsals
    from gracec.recipe import Recipe
    from gracec.report.training_plan import KINDS, Setting
    from gracec.training.planned_samples import Stated

    recipe = Recipe.load("w4a16")
    assert recipe.training is not None
    rule = recipe.training.model_copy(
        update={"batch_size": given["batch_size"], "precision": "float32"}
    )
    with tempfile.TemporaryDirectory() as folder:
        places = []
        for which, config in zip(("student", "teacher"), models(name), strict=True):
            config.save_pretrained(Path(folder) / which)
            places.append(find_description(Path(folder) / which))
        pair = Pair.read(*places, recipe, rule, "cuda", None)
        samples = pair.samples(None, Stated(1, given["picture"], given["text"], 200))
    rehearsals = Rehearsals(pair, samples)
    planner = Planner(pair, samples, given["devices"], 80 * GB, Rates.of("cuda"), rehearsals)
    rows = []
    for said, fields in given["rows"].items():
        setting = Setting(**fields)
        found = planner.planned(setting)
        times = planner.bytes_at(setting, -(-planner.share // setting.micro_batch_size))
        in_a_step = max(
            sum(times[name].values()) for name in ("teacher", "micro-batch", "optimizer")
        )
        rows.append(
            {
                "setting": f"{name}, {given['devices']} x 80 GB, {said}",
                "tokens": samples.lengths[0],
                **{kind: round(found.bytes.get(kind, 0) / GB, 1) for kind in KINDS},
                "peak, GB": round(found.peak / GB, 1),
                "of a step, GB": round(in_a_step / GB, 1),
                "fits": "yes" if found.peak <= 80 * GB else "no",
                "highest point": found.peak_at,
                "seconds a step": round(found.seconds, 2),
                "of it teacher, %": round(100 * found.teacher_seconds / found.seconds),
            }
        )
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows = [row for name, given in PAIRS.items() for row in planned(name, given)]
    write_result("plan_paper", "the settings of the GRACE paper as planned, GB", rows, load=load)


if __name__ == "__main__":
    main()
