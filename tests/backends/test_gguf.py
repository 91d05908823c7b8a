"""GGUF: blocks read with arithmetic alone, and what llama.cpp cannot say is refused.

Tensors and metadata of every family were compared with what convert_hf_to_gguf.py of llama.cpp
writes of the same weights; here names are held that it would miss.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gracec.backends.base import parse_formats
from gracec.backends.gguf import Gguf, blocks, tokenizer
from gracec.backends.gguf.entries import Refused
from gracec.errors import GateError, GracecError
from gracec.frozen import Frozen
from gracec.quant import QuantSpec
from gracec.quant.frozen import FrozenWeight
from tests import tiny_families
from tests.backends.artifacts import DECODER, decoder_specs, random_artifact, random_weight
from tests.backends.test_huggingface import decoder_artifact
from tests.tiny import tiny_llava

gguf: Any = pytest.importorskip("gguf")

G32 = QuantSpec(4, 32, signed=True)


@pytest.fixture(scope="module")
def artifact() -> Frozen:
    return random_artifact(decoder_specs(G32))


@pytest.fixture(scope="module")
def written(artifact: Frozen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    Gguf().write(artifact, directory)
    return directory


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def codes_and_scales(raw: np.ndarray[Any, Any], bits: int) -> tuple[Tensor, Tensor]:
    """int codes [N, K] and float64 scales [N, K / 32] of blocks, byte by byte."""
    size = 18 if bits == 4 else 34
    codes, scales = [], []
    for row in raw:
        found: list[int] = []
        factors: list[float] = []
        for start in range(0, len(row), size):
            block = bytes(row[start : start + size])
            factors.append(float(np.frombuffer(block[:2], np.float16)[0]))
            if bits == 4:
                found += [byte % 16 - 8 for byte in block[2:]]
                found += [byte // 16 - 8 for byte in block[2:]]
            else:
                found += [(byte + 128) % 256 - 128 for byte in block[2:]]
        codes.append(found)
        scales.append(factors)
    return torch.tensor(codes), torch.tensor(scales, dtype=torch.float64)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (G32, 4),
        (QuantSpec(3, 64), 4),
        (QuantSpec(2, 128), 4),
        (QuantSpec(8, 32), 8),
        (QuantSpec(4, granularity="per_channel"), 4),
        (QuantSpec(8, granularity="per_tensor"), 8),
    ],
    ids=str,
)
def test_blocks_hold_the_codes_and_repeat_the_scales(spec: QuantSpec, bits: int) -> None:
    weight = random_weight((6, 256), spec, 0)
    assert blocks.refusal(weight) == ""
    codes, scales = codes_and_scales(blocks.pack(blocks.Codes.of(weight)), bits)
    assert torch.equal(codes, weight.codes.long())
    dense = codes.double() * scales.repeat_interleave(32, dim=1)
    assert torch.equal(dense, weight.dequantize().double())


def test_what_blocks_cannot_hold_is_refused() -> None:
    assert "one scale for 32 weights, this has int4/g16" in blocks.refusal(
        random_weight((4, 64), QuantSpec(4, 16), 0)
    )
    channel = random_weight((4, 48), QuantSpec(4, granularity="per_channel"), 0)
    assert "do not divide the 48 columns" in blocks.refusal(channel)
    odd = torch.full((4, 2), 0.1)
    weight = FrozenWeight.from_codes(
        torch.zeros(4, 64, dtype=torch.int8), odd, QuantSpec(4, 32, scale_grid="fp32")
    )
    assert "not exact in float16" in blocks.refusal(weight)


def test_rows_of_queries_and_keys_are_those_of_neighbours(artifact: Frozen, written: Path) -> None:
    """llama.cpp turns the features 2i and 2i + 1 of a head, Llama i and i + half of it."""
    stored = tensors_of(written / "model.gguf")
    for name, letter, heads in (("q_proj", "q", 4), ("k_proj", "k", 2), ("v_proj", "v", 0)):
        weight = artifact.weights[f"{DECODER}.1.self_attn.{name}.weight"]
        codes, _ = codes_and_scales(stored[f"blk.1.attn_{letter}.weight"].data, 4)
        for row in range(len(codes)):
            source = row
            if heads:
                head, place = divmod(row, len(codes) // heads)
                half = len(codes) // heads // 2
                source = head * 2 * half + place // 2 + half * (place % 2)
            assert torch.equal(codes[row], weight.codes[source].long()), (name, row)


def test_everything_else_is_exact_and_metadata_is_said(artifact: Frozen, written: Path) -> None:
    stored = tensors_of(written / "model.gguf")
    embedding = stored["token_embd.weight"]
    dense = gguf.quants.dequantize(embedding.data, embedding.tensor_type)
    source = artifact.others["model.language_model.embed_tokens.weight"]
    assert torch.equal(torch.from_numpy(dense.copy()), source.float())
    assert stored["output_norm.weight"].tensor_type.name == "F32"
    field = gguf.GGUFReader(written / "model.gguf").get_field
    assert field("general.architecture").contents() == "llama"
    assert field("llama.rope.freq_base").contents() == 10000.0
    assert field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert "{% for message" in field("tokenizer.chat_template").contents()
    images = gguf.GGUFReader(written / "mmproj.gguf")
    assert images.get_field("clip.vision.block_count").contents() == 1  # of 2: layer -2
    assert images.get_field("clip.vision.feature_layer").contents() == [1]
    assert images.get_field("clip.use_gelu") is None  # quick GELU
    names = {tensor.name for tensor in images.tensors}
    assert {"v.class_embd", "v.pre_ln.weight", "mm.0.weight", "mm.2.bias"} <= names
    assert not any(name.startswith(("v.blk.1.", "v.post_ln")) for name in names)


def family_model(family: str) -> PreTrainedModel:
    """As small as llama.cpp takes it."""
    if family == "qwen2_5_vl":
        config: Any = tiny_families.qwen2_5_vl()
        config.vision_config.window_size = 112
    elif family == "gemma3":
        config = tiny_families.gemma3()
        config.text_config.num_hidden_layers = 6
        config.text_config.layer_types = ["sliding_attention"] * 5 + ["full_attention"]
    else:
        return tiny_families.tiny_model(family)
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_families.CONFIGS, family, lambda: config)
        return tiny_families.tiny_model(family)


EXPECTED = {
    "qwen2_vl": ("qwen2vl", {"v.patch_embd.weight.1", "v.blk.0.attn_q.bias", "mm.2.weight"}),
    "qwen2_5_vl": ("qwen2vl", {"v.blk.1.ffn_gate.weight", "v.post_ln.weight"}),
    "qwen3_vl": ("qwen3vl", {"v.blk.0.attn_qkv.weight", "v.deepstack.1.fc2.bias"}),
    "gemma3": ("gemma3", {"mm.input_projection.weight", "mm.soft_emb_norm.weight"}),
    "smolvlm": ("llama", {"mm.model.fc.weight", "v.post_ln.bias"}),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_families_are_written_and_read_back(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = tiny_families.tiny_processor(family)
    if family.startswith("qwen"):  # the rule of a whole vocabulary
        ids = str(processor.tokenizer.encode(tokenizer.PROBE)).encode()
        monkeypatch.setitem(tokenizer.RULES, hashlib.sha256(ids).hexdigest(), "qwen2")
    artifact = replace(decoder_artifact(family_model(family)), processor=processor)
    Gguf().write(artifact, tmp_path)
    read = Gguf().read_weights(tmp_path)
    assert set(artifact.weights) <= set(read)
    architecture, names = EXPECTED[family]
    model = gguf.GGUFReader(tmp_path / "model.gguf")
    assert model.get_field("general.architecture").contents() == architecture
    assert names <= set(tensors_of(tmp_path / "mmproj.gguf"))
    stored = {tensor.name: tensor for tensor in model.tensors}
    weight = next(fqn for fqn in artifact.weights if fqn.endswith("layers.1.mlp.down_proj.weight"))
    codes, _ = codes_and_scales(stored["blk.1.ffn_down.weight"].data, 4)
    assert torch.equal(codes, artifact.weights[weight].codes.long())
    if family == "gemma3":
        norm = artifact.others["model.language_model.norm.weight"].float() + 1
        assert torch.equal(torch.from_numpy(stored["output_norm.weight"].data.copy()), norm)


def test_another_code_is_an_error(artifact: Frozen, written: Path, tmp_path: Path) -> None:
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensor = tensors_of(written / "model.gguf")["blk.0.ffn_up.weight"]
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    content[tensor.data_offset + 2] ^= 1
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(GateError, match=r"0\.mlp\.up_proj\.weight reads back other than codes"):
        Gguf().check_stored_weights(artifact, tmp_path)


def test_what_llama_cpp_cannot_say_is_refused_in_a_line(
    artifact: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(**overrides: Any) -> str:
        model = tiny_llava(**overrides)
        return Gguf().refusal(random_artifact(decoder_specs(G32), model=model))

    assert reason() == ""
    assert "computes silu in llama" in reason(hidden_act="gelu")
    assert "as 'default' does" in reason(vision_feature_select_strategy="full")
    assert "layers [-2, -1]" in reason(vision_feature_layer=[-2, -1])
    other = decoder_artifact(tiny_families.tiny_model("paligemma"))
    assert "GGUF is written for gemma3, idefics3, llava" in Gguf().refusal(other)
    unknown = replace(artifact, processor=tiny_families.tiny_processor("qwen2_vl"))
    assert "no rule by which this tokenizer cuts" in Gguf().refusal(unknown)
    assert "no tokenizer" in Gguf().refusal(replace(artifact, processor=None))
    assert [form.name for form in parse_formats("gguf")] == ["gguf"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GracecError, match=r"format gguf: .*pip install 'gracec\[gguf\]'"):
        Gguf().check(artifact)


def vocabulary(model: dict[str, Any], **fields: Any) -> tokenizer.Vocabulary:
    """Of a tokenizer.json, for an embedding of 12 rows."""
    added = [{"id": 0, "content": "<unk>", "special": True}]
    whole = {"model": model, "added_tokens": added, "normalizer": None, "pre_tokenizer": None}

    class Backend:
        def to_str(self) -> str:
            return json.dumps(whole | fields)

    class Fast:
        backend_tokenizer = Backend()

    return tokenizer.vocabulary(Fast(), 12)


def test_pieces_have_scores_in_the_order_of_the_merges() -> None:
    tokens = ["<unk>", "<0x0A>", "a", "b", "c", "ab", "abc", "bc"]
    model: dict[str, Any] = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>"}
    model["vocab"] = {token: number for number, token in enumerate(tokens)}
    model["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"], ["a", "bc"]]
    normalizer = {"type": "Prepend", "prepend": "\u2581"}
    found = vocabulary(model, normalizer=normalizer)
    assert found.model == "llama" and found.flags == (("add_space_prefix", True),)
    assert found.tokens[8] == "[PAD8]" and found.types[8] == tokenizer.UNUSED
    assert found.types[:3] == [tokenizer.UNKNOWN, tokenizer.BYTE, tokenizer.NORMAL]
    assert found.scores is not None
    assert found.scores[7] > found.scores[5] > found.scores[6] > found.scores[2]
    model["merges"] = [["ab", "c"], ["b", "c"], ["a", "bc"]]
    with pytest.raises(Refused, match="in no order of"):
        vocabulary(model)


def test_words_are_words_of_bert() -> None:
    model = {"type": "WordLevel", "vocab": {"<unk>": 0, "cat": 1}, "unk_token": "<unk>"}
    steps = [{"type": "Lowercase"}, {"type": "Replace"}]
    normalizer = {"type": "Sequence", "normalizers": steps}
    found = vocabulary(model, normalizer=normalizer, pre_tokenizer={"type": "Whitespace"})
    assert found.model == "bert" and found.tokens[:2] == ["<unk>", "\u2581cat"]
    assert ("normalizer.lowercase", True) in found.flags
    assert found.notes == ("llama.cpp does not do what the tokenizer does first: Replace",)
    with pytest.raises(Refused, match="as ByteLevel does"):
        vocabulary(model, pre_tokenizer={"type": "ByteLevel"})
    with pytest.raises(Refused, match="no tokenizer of type Unigram"):
        vocabulary({"type": "Unigram", "vocab": {}})


@pytest.mark.slow
def test_llama_cpp_computes_the_logits_of_the_codes(artifact: Frozen, written: Path) -> None:
    """It rounds the inputs of quantized layers to 8 bits, so not the same bits."""
    llama_cpp: Any = pytest.importorskip("llama_cpp")
    from gracec.frozen import dense_twin

    model = llama_cpp.Llama(str(written / "model.gguf"), logits_all=True, verbose=False)
    ids = list(range(8, 40))
    model.eval(ids)
    found = torch.from_numpy(model.scores[: len(ids)].copy())
    with torch.no_grad():
        expected = dense_twin(artifact, torch.float32)(input_ids=torch.tensor([ids])).logits[0]
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.999
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
