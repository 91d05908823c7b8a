from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

import gracec
from gracec.backends.onnx.runner import OnnxModel
from gracec.backends.onnx.session import SessionConfig
from gracec.compiled import CompiledModel
from gracec.errors import GracecError
from gracec.evaluate import answer
from gracec.models.cache_argument import CACHE_ARGUMENT
from gracec.models.loading import load_config
from tests.backends.artifacts import tokens_of
from tests.goldens import INSTALLED
from tests.test_cli import gracec as command
from tests.tiny import tiny_batch, tiny_image, tiny_processor


def test_logits_and_tokens_are_those_of_the_codes(
    model: OnnxModel, reference: Any, batch: dict[str, Tensor]
) -> None:
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = reference(**batch).logits[mask]
    torch.testing.assert_close(model(**batch).logits[mask], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(**batch, max_new_tokens=6), tokens_of(reference, batch))


@pytest.mark.parametrize(
    ("seconds", "expected"), [({4: 3, 2: 2, 1: 1}, 1), ({4: 3, 2: 2, 1: 4}, 2), ({4: 1, 2: 2}, 4)]
)
def test_threads_are_halved_while_tokens_get_faster(
    exported: Path, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, int], expected: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)

    def token_seconds(model: OnnxModel) -> float:
        options = model._sessions["decoder"].get_session_options()
        return seconds[options.intra_op_num_threads]

    monkeypatch.setattr(OnnxModel, "_token_seconds", token_seconds)
    model = OnnxModel.load(exported)
    assert model.threads == expected
    assert token_seconds(model) == seconds[expected]
    assert OnnxModel.load(exported, threads=3).threads == 3
    monkeypatch.setattr("gracec.backends.onnx.runner.LARGE_DECODER", 0)
    assert OnnxModel.load(exported).threads == 4


def test_a_token_takes_time(model: OnnxModel) -> None:
    assert 0 < model._token_seconds() < 10


def pictures_in_parts() -> None:
    if INSTALLED < (5, 23):
        pytest.skip("transformers reads no prompts with pictures in parts before 5.23")


def test_padding_batch_and_chunks_change_nothing(model: OnnxModel) -> None:
    pictures_in_parts()
    prompts = ("what is this ?", "where is the small red circle in the picture ?")
    together = model.generate(**tiny_batch(None, prompts), max_new_tokens=6)[:, -6:]
    chunked = model.generate(**tiny_batch(None, prompts), max_new_tokens=6, prefill_chunk_size=5)
    assert torch.equal(chunked[:, -6:], together)
    for number, prompt in enumerate(prompts):
        alone = model.generate(**tiny_batch(None, (prompt,), seed=number), max_new_tokens=6)
        assert torch.equal(alone[:, -6:], together[number : number + 1])


SETTINGS: dict[str, dict[str, Any]] = {
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "penalty": {"repetition_penalty": 5.0},
    "ngrams": {"no_repeat_ngram_size": 1},
    "processor": {
        "logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor([9, 15])])
    },
    "stopped": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(30)])},
    "config": {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=5)},
    "forced": {"forced_eos_token_id": 2},
    "guided": {"guidance_scale": 1.5},
    "in parts": {"prefill_chunk_size": 5},
    "beams in parts": {"prefill_chunk_size": 7, "num_beams": 2},
    "without a cache": {"use_cache": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_generates_as_transformers_does(
    name: str, model: OnnxModel, reference: Any, batch: dict[str, Tensor]
) -> None:
    given = SETTINGS[name]
    if "prefill_chunk_size" in given:
        pictures_in_parts()
    settings = {**({} if "generation_config" in given else {"max_new_tokens": 6}), **given}
    if name == "guided":  # of transformers' own model only without images, and one at a time
        batch = {"input_ids": torch.tensor([[1, 9, 12, 15]])}
    found = [
        torch.manual_seed(3) and one.generate(**batch, **settings) for one in (model, reference)
    ]
    assert torch.equal(*found)


def test_drafts_are_taken_back(model: OnnxModel, reference: Any, batch: dict[str, Tensor]) -> None:
    """What an assistant, or the prompt itself, proposes changes no token of an answer."""
    one = {"input_ids": torch.tensor([[1, 9, 12, 15, 9, 12, 15, 9]])}
    expected = reference.generate(**one, max_new_tokens=12, do_sample=False)
    for draft in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": reference}):
        found = model.generate(**one, max_new_tokens=12, do_sample=False, **draft)
        assert torch.equal(found, expected)


def test_an_answer_goes_on_from_its_cache(model: OnnxModel, batch: dict[str, Tensor]) -> None:
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    whole = model.generate(**batch, max_new_tokens=6, **options)
    first = model.generate(**batch, max_new_tokens=3, **options)
    mask = batch["attention_mask"]
    longer = {
        **batch,
        "input_ids": first.sequences,
        "attention_mask": torch.cat([mask, mask.new_ones(len(mask), 3)], 1),
    }
    length, cache = first.sequences.shape[1] - 1, first[CACHE_ARGUMENT]
    assert (cache.get_seq_length(), cache.batch_size, len(cache)) == (length, 2, 2)
    rest = model.generate(**longer, max_new_tokens=3, past_key_values=cache, **options)
    assert torch.equal(rest.sequences, whole.sequences)
    torch.testing.assert_close(rest.logits[-1], whole.logits[-1], rtol=1e-4, atol=1e-4)
    with pytest.raises(GracecError, match="a DynamicCache is no cache of the ONNX runner"):
        model.generate(**batch, past_key_values=DynamicCache())
    with pytest.raises(GracecError, match="cache_implementation 'static': the cache is in ONNX"):
        model.generate(**batch, max_new_tokens=1, cache_implementation="static")


def test_tokens_come_one_by_one(model: OnnxModel, batch: dict[str, Tensor]) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []
            self.ended = False

        def put(self, tokens: Tensor) -> None:
            self.seen.append(tokens)

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    tokens = model.generate(**batch, max_new_tokens=4, streamer=streamer)
    new = tokens[:, batch["input_ids"].shape[1] :]
    assert streamer.ended
    assert torch.equal(streamer.seen[0], batch["input_ids"])
    assert torch.equal(torch.stack(streamer.seen[1:], 1), new)


def test_it_is_where_it_is(model: OnnxModel) -> None:
    assert model.to("cpu").eval() is model is model.to(torch.float32)
    assert model.can_generate()
    with pytest.raises(
        GracecError, match="runs on the CPU, not on cuda; compile for target torchao"
    ):
        model.to("cuda")
    with pytest.raises(GracecError, match="compute in float32, not in torch.bfloat16"):
        model.to(dtype=torch.bfloat16)


def test_an_answer_ends_and_is_padded(model: OnnxModel, batch: dict[str, Tensor]) -> None:
    free = model.generate(**batch, max_new_tokens=6)[:, -6:]
    end = int(free[0, 2])
    first = [row.tolist().index(end) if end in row else 6 for row in free]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [end]
    try:
        stopped = model.generate(**batch, max_new_tokens=6)[:, batch["input_ids"].shape[1] :]
    finally:
        model.generation_config.eos_token_id = before
    assert stopped.shape[1] == min(6, max(first) + 1)
    assert stopped[0, : first[0] + 1].tolist() == free[0, : first[0] + 1].tolist()
    assert not stopped[0, first[0] + 1 :].any()  # padding is token 0


def test_a_prompt_without_an_image(model: OnnxModel, reference: Any) -> None:
    ids = torch.tensor([[1, 9, 12, 15]])
    found = model.generate(input_ids=ids, max_new_tokens=3)
    expected = reference.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, expected)


def test_what_nothing_reads_is_refused(model: OnnxModel, batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"not used by the model: \['temprature'\]"):
        model.generate(**batch, temprature=1.0)
    with pytest.raises(GracecError, match="does not take 'pixels'"):
        model(**batch, pixels=batch["pixel_values"])


def test_images_and_placeholders_are_counted(model: OnnxModel, batch: dict[str, Tensor]) -> None:
    with pytest.raises(GracecError, match="places for 32 visual tokens, the 1 images"):
        model.generate(**{**batch, "pixel_values": batch["pixel_values"][:1]})


def test_what_it_cannot_prepare(model: OnnxModel, batch: dict[str, Tensor]) -> None:
    with pytest.raises(GracecError, match="input_ids is missing; use the processor"):
        model.generate(pixel_values=batch["pixel_values"])
    with pytest.raises(GracecError, match="pixel_values is missing"):
        model.generate(input_ids=batch["input_ids"])
    mask = batch["attention_mask"].flip(1)
    with pytest.raises(GracecError, match="padded on the right; pad on the left"):
        model.generate(**{**batch, "attention_mask": mask})


def test_it_answers_questions(model: OnnxModel, compiled: CompiledModel) -> None:
    image = tiny_image(3)
    found = answer(model, tiny_processor(), image, "what is this ?", max_new_tokens=4)
    assert found
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.processor.image_token == "<image>"


def test_the_commands_run_it(exported: Path, tmp_path: Path) -> None:
    tiny_image(0).save(tmp_path / "0.png")
    question = ("--image", tmp_path / "0.png", "--prompt", "what is this ?")
    done = command("run", exported, *question, "--max-new-tokens", 4, "--backend", "onnx")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    (tmp_path / "samples.jsonl").write_text(
        '{"image": "0.png", "question": "what is this ?", "answer": "red"}\n'
    )
    done = command("eval", exported, "--data", tmp_path, "--backend", "onnx", "--json")
    assert done.returncode == 0, done.stderr
    wrong = command("run", exported, *question, "--backend", "onxx")
    assert (wrong.returncode, wrong.stderr.strip()) == (
        2,
        "gracec: unknown target 'onxx'; did you mean 'onnx'?",
    )


def test_plain_transformers_reads_the_configuration(exported: Path) -> None:
    config = AutoModelForImageTextToText.from_config(gracec.load(exported, "onnx").config).config
    assert config.model_type == "llava"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vision_encoder": None}, "there is no graph 'vision_encoder'"),
        ({"vision_encoder": "decoder"}, "the graph 'vision_encoder' is another one"),
        ({"fused_decoder": "embed_tokens"}, "the graph 'fused_decoder' is another one"),
        ({"fused_decoder": None, "decoder": "fused_decoder"}, "the graph 'decoder' is another one"),
    ],
)
def test_graphs_of_other_names_are_refused(
    bundle: Path, changed: dict[str, str | None], message: str
) -> None:
    read = SessionConfig.read(bundle / "onnx")
    graphs = {**read.graphs, **{n: read.graphs[o] for n, o in changed.items() if o}}
    graphs = {n: file for n, file in graphs.items() if changed.get(n, "") is not None}
    config = read.model_copy(update={"graphs": graphs})
    with pytest.raises(GracecError, match=message):
        OnnxModel(bundle / "onnx", load_config(bundle), session_config=config, threads=1)
