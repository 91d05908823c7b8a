"""Make what `run.py` measures: decoders, compiled models, exports, and the files of the peers.

    python benchmarks/decode/prepare.py --model smollm2
    python benchmarks/decode/prepare.py --model smollm2 --again 'onnx-*'    make these again

What is there is not made again, so that an interrupted command goes on. What cannot be made is
reported in one line, and its rows are missing from the scoreboard.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engines import cached_loop
from models import as_llava, load_decoder, processor, random_decoder
from transformers import LlamaForCausalLM
from variants import (
    ARTIFACTS,
    DENSE,
    FLOAT32,
    GENAI,
    GGUF,
    MODELS,
    PEERS,
    QUANTIZER,
    QUANTIZER_GROUP,
    VARIANTS,
    WORK,
    Artifact,
)
from worker import COMPARED, CONTEXT, prompt, word_range

import gracec
from gracec.backends.onnx import graphs
from gracec.backends.onnx.format import FILES
from gracec.backends.onnx.session import MINIMUM_RUNTIME, SessionConfig
from gracec.capture import capture_serving
from gracec.capture.serving_graph import DECODER
from gracec.models.loading import load_config
from gracec.passes import run_passes
from gracec.passes.fuse_decoder import FuseDecoder
from gracec.recipe import Recipe
from gracec.store import file_sha256, read_store, write_directory

HERE = Path(__file__).resolve().parent


class Workshop:
    """The folder of a model, and `made.json` in it: what is there, and why something is not."""

    def __init__(self, name: str, folder: Path, peers: Path, again: str) -> None:
        self.name, self.folder, self.peers = name, folder, peers
        folder.mkdir(parents=True, exist_ok=True)
        self.record = folder / "made.json"
        self.made: dict[str, Any] = {"files": {}, "greedy": {}}
        if self.record.is_file():
            self.made = json.loads(self.record.read_text(encoding="utf-8"))
        for file in [name for name in self.made["files"] if fnmatch.fnmatch(name, again)]:
            path = folder / file
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            del self.made["files"][file]
            self.made["greedy"].pop(file, None)

    def make(self, name: str, build: Callable[[Path], None]) -> bool:
        """Have a file or folder built, if it is not there; whether it is there now."""
        path = self.folder / name
        if path.exists():
            if "mib" not in self.made["files"].get(name, {}):
                self.made["files"][name] = {"seconds": None, "mib": size_mib(path)}
            return True
        partial = path.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
        start = time.perf_counter()
        try:
            build(partial)
        except Exception as error:  # of a peer or of a part that is not there yet
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            self.made["files"][name] = {"error": reason}
            print(f"{name}: failed: {reason}", flush=True)
        else:
            seconds = time.perf_counter() - start
            partial.rename(path)
            self.made["files"][name] = {"seconds": round(seconds, 1), "mib": size_mib(path)}
            print(f"{name}: {seconds:.1f} s", flush=True)
        self.write()
        return path.exists()

    def write(self) -> None:
        self.record.write_text(json.dumps(self.made, indent=1) + "\n", encoding="utf-8")

    def peer(self, *arguments: str | Path) -> None:
        """Run a script in the environment of the peers."""
        command = [str(argument) for argument in (self.peers, *arguments)]
        if not self.peers.is_file():
            raise RuntimeError(f"no environment of the peers: {self.peers} is missing")
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["failed"])[-1])


def size_mib(path: Path) -> float:
    """Size of what decoding needs: the vision encoder, which is a tiny stand-in, is not."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    counted = (f.stat().st_size for f in files if not f.name.startswith("vision_encoder"))
    return round(sum(counted) / 2**20, 1)


def make_peers(folder: Path) -> None:
    """The environment of the peers; llama.cpp is built, which takes some minutes."""
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    lines = ["--no-deps", "-r", str(HERE / "peer_requirements.txt")]
    subprocess.run([*pip, *lines], check=True)


def make_decoder(shop: Workshop) -> bool:
    """The Hugging Face decoder in float32, and its GGUF file."""
    peer = HERE / "peer.py"
    if shop.name == "smollm2":
        shop.make(GGUF, lambda path: shop.peer(peer, "smollm2-gguf", path))
        made = shop.make(DENSE, lambda path: shop.peer(peer, "smollm2", path))
    else:
        made = shop.make(DENSE, lambda path: write_random(shop.name, path))
        shop.make(GGUF, lambda path: shop.peer(peer, "gguf", shop.folder / DENSE, path))
    if made and DENSE not in shop.made["greedy"]:
        decoder = load_decoder(shop.folder / DENSE)
        shop.made["words"] = decoder.config.vocab_size
        shop.made["greedy"][DENSE] = greedy_tokens(decoder)
        shop.write()
    return made


def write_random(name: str, target: Path) -> None:
    """A random decoder; the builder of onnxruntime-genai wants a tokenizer beside it."""
    model = random_decoder(name)
    model.save_pretrained(target)
    processor(model.config.vocab_size).tokenizer.save_pretrained(target)


def compile_artifact(source: Path, artifact: Artifact, target: Path) -> None:
    model = as_llava(load_decoder(source))
    recipe = Recipe.model_validate(artifact.recipe)
    words = processor(model.config.text_config.vocab_size)
    compiled = gracec.compile(model, recipe, processor=words, inplace=True)
    compiled.save_pretrained(target, formats=())


def decoder_of(directory: Path) -> LlamaForCausalLM:
    """The decoder of an artifact in float32: every quantized weight is its codes times scales."""
    store = read_store(directory)
    tensors = {name: tensor.float() for name, tensor in store.others.items()}
    tensors |= {fqn: weight.dequantize() for fqn, weight in store.weights.items()}
    prefix = "model.language_model."
    own = {
        f"model.{name.removeprefix(prefix)}": tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    own["lm_head.weight"] = tensors.get("lm_head.weight", own["model.embed_tokens.weight"])
    config = load_config(directory).get_text_config()
    config.tie_word_embeddings, config.dtype = False, torch.float32
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(own, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not saved
    return model.eval()


def greedy_tokens(decoder: Any) -> list[int]:
    """What a decoder answers in float32 to the prompt of the benchmark."""
    words = word_range(decoder.config.vocab_size)
    return list(cached_loop(decoder)(prompt(CONTEXT, words), COMPARED))


def export_float32(source: Path, directory: Path) -> None:
    """The serving graphs of the decoder as it is, written as gracec writes those with codes."""
    model = as_llava(load_decoder(source))
    folder = directory / "onnx"

    def fill(target: Path) -> None:
        (target / folder.name).mkdir()
        model.config.save_pretrained(target)
        serving = capture_serving(model)
        fused = run_passes(serving[DECODER].program, [FuseDecoder()]).program
        serving[DECODER] = replace(serving[DECODER], program=fused)
        files = {
            name: graphs.write_model(
                graphs.to_onnx(graph, name), target / folder.name / f"{FILES[name]}.onnx"
            )
            for name, graph in serving.items()
        }
        write_session(target / folder.name, files)

    write_directory(directory, fill)


def write_session(folder: Path, files: dict[str, list[Path]]) -> None:
    """Have the runner take graphs that are not of `export_onnx`."""
    SessionConfig(
        family="llava",
        ops="",
        mode="",
        graphs={name: paths[0].name for name, paths in files.items()},
        sha256={path.name: file_sha256(path) for paths in files.values() for path in paths},
        kernels={},
        options={},
        gates={},
        minimum_runtime=MINIMUM_RUNTIME,
    ).write(folder)


def quantize_by_runtime(source: Path, directory: Path) -> None:
    """The quantizer of ONNX Runtime on the float32 decoder; accuracy level 4."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    shutil.copytree(source, directory)
    folder = directory / "onnx"
    decoder = folder / f"{FILES[DECODER]}.onnx"
    quantizer = MatMulNBitsQuantizer(
        str(decoder), block_size=QUANTIZER_GROUP, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    for file in folder.glob(f"{decoder.name}*"):
        file.unlink()
    quantizer.model.save_model_to_file(str(decoder), use_external_data_format=True)
    files = {
        name: [folder / f"{stem}.onnx", *folder.glob(f"{stem}.onnx?data")]
        for name, stem in FILES.items()
    }
    write_session(folder, files)


def build_genai(shop: Workshop, path: Path) -> None:
    """The model builder of onnxruntime-genai, with its default group and algorithm."""
    command = ["-m", "onnxruntime_genai.models.builder", "-m", shop.folder / DENSE, "-o", path]
    options = ["--extra_options", "int4_accuracy_level=4"]
    cache = path.with_name(".genai-cache")
    shop.peer(*command, "-p", "int4", "-e", "cpu", "-c", cache, *options)
    shutil.rmtree(cache, ignore_errors=True)


def prepare(shop: Workshop) -> None:
    if not make_decoder(shop):
        return
    dense = shop.folder / DENSE
    for artifact in ARTIFACTS:

        def build(path: Path, artifact: Artifact = artifact) -> None:
            compile_artifact(dense, artifact, path)

        if not shop.make(artifact.folder, build):
            continue
        if artifact.folder not in shop.made["greedy"]:
            tokens = greedy_tokens(decoder_of(shop.folder / artifact.folder))
            shop.made["greedy"][artifact.folder] = tokens
            shop.write()
        compiled = None
        for variant in VARIANTS:
            if variant.weights != artifact.folder or not variant.ops:
                continue
            if not (shop.folder / variant.path).exists():
                compiled = compiled or _with_its_head(shop.folder / artifact.folder)
            ops, mode, of = variant.ops, variant.mode, compiled

            def export(path: Path, of: Any = of, ops: str = ops, mode: str = mode) -> None:
                of.export_onnx(path, ops=ops, mode=mode)

            shop.make(variant.path, export)
    if shop.make(FLOAT32, lambda path: export_float32(dense, path)):
        shop.make(QUANTIZER, lambda path: quantize_by_runtime(shop.folder / FLOAT32, path))
    shop.make(GENAI, lambda path: build_genai(shop, path))


def _with_its_head(artifact: Path) -> Any:
    """A compiled model whose graphs have the head that its recipe gave it."""
    compiled = gracec.load(artifact, "torchao")
    onnx = compiled.frozen.onnx.model_copy(update={"head": "keep"})
    compiled.frozen = replace(compiled.frozen, onnx=onnx)
    return compiled


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--peers", type=Path, help=f"an environment that has {PEERS}")
    parser.add_argument("--again", default="", help="make files with such names again")
    options = parser.parse_args(arguments)
    environment = options.peers or options.work / "peers"
    if not environment.exists() and options.model != "tiny":
        make_peers(environment)
    python = environment / "bin" / "python"
    shop = Workshop(options.model, options.work / options.model, python, options.again)
    prepare(shop)
    failed = [name for name, facts in shop.made["files"].items() if "error" in facts]
    shop.write()
    sys.exit(f"{len(failed)} could not be made: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
