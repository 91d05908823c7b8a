"""The vocabulary in the words of llama.cpp.

gpt2   byte-level BPE, with the name of the rule by which a text is cut: llama.cpp has each in its
       code, and knows a tokenizer by the tokens that one long text is made into
llama  BPE with bytes to fall back on, made from SentencePiece: a score for each token
bert   a list of words

"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from gracec.backends.gguf.entries import Refused

SPACE = "\u2581"
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d"
    "\U0001f32b\ufe0f (multiple emojis concatenated) \u2705 \U0001f999\U0001f999 3 33 333 333"
    "3 33333 333333 3333333 33333333 3.3 3..3 3...3 \u1780\u17b6\u1793\u17cb\u178f\u17c2"
    "\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785\U0001f601 ?\u6211\u60f3\u5728apple"
    "\u5de5\u4f5c1314151\u5929\uff5e ------======= \u043d\u0435\u0449\u043e \u043d\u0430 "
    "\u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438 ''''''```````\"\"\"\"......!!!!"
    "!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like"
    " some tea? We'Ve a'lL"
)
"""What llama.cpp knows a tokenizer by: the SHA-256 of the tokens that this becomes."""
RULES = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # Llama 3
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",  # Qwen 1.5 to 2.5
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",  # Qwen 3
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",  # SmolLM
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",  # Mistral Nemo
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
}
"""SHA-256 -> name of the rule, of what the decoders of supported families have."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
LOOK_SPECIAL = re.compile(r"<pad>|<mask>|<\|.*\|>|<unused.*>")
"""Tokens that some tokenizers do not mark as special, and that no text means."""


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of a tokenizer.

    Attributes:
        model: gpt2, llama or bert.
        rule: by which a text is cut.
        tokens, types: of every id.
        scores: of every id, for llama.
        merges: for gpt2.
        flags: further keys under `tokenizer.ggml.`.
        notes: what llama.cpp does otherwise.
    """

    model: str
    rule: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    flags: tuple[tuple[str, bool], ...] = ()
    notes: tuple[str, ...] = ()


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Of a tokenizer of transformers.

    Args:
        size: rows of the embedding; ids that the tokenizer has not are marked as unused.

    Raises:
        Refused: for one that llama.cpp cannot be told.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Refused("the tokenizer has no tokenizer.json, which is what is read")
    fields = json.loads(backend.to_str())
    model = fields["model"]
    tokens, types = _tokens(fields, size)
    if model["type"] == "WordLevel":
        return _words(fields, tokens, types)
    if model["type"] != "BPE":
        raise Refused(f"llama.cpp has no tokenizer of type {model['type']}")
    merges = [one.split(" ", 1) if isinstance(one, str) else one for one in model["merges"]]
    if model.get("byte_fallback"):
        return _pieces(fields, tokens, types, merges)
    ids = tokenizer.encode(PROBE)
    rule = RULES.get(hashlib.sha256(str(ids).encode()).hexdigest())
    if rule is None:
        raise Refused("llama.cpp knows no rule by which this tokenizer cuts a text")
    return Vocabulary(
        "gpt2", rule, tokens, types, merges=[f"{left} {right}" for left, right in merges]
    )


def _tokens(fields: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for token, number in fields["model"]["vocab"].items():
        _check_id(number, size)
        tokens[number], types[number] = token, NORMAL
    for added in fields["added_tokens"]:
        number, token = added["id"], added["content"]
        _check_id(number, size)
        special = added["special"] or LOOK_SPECIAL.fullmatch(token)
        types[number] = CONTROL if special else USER_DEFINED
        tokens[number] = token if special else token.replace(SPACE, " ")
    return tokens, types


def _check_id(number: int, size: int) -> None:
    if number >= size:
        raise Refused(f"the tokenizer has a token {number}, the embedding {size} rows")


def _pieces(
    fields: dict[str, Any], tokens: list[str], types: list[int], merges: list[list[str]]
) -> Vocabulary:
    """Scores in the order of the merges: llama.cpp makes those pieces first that score most.

    Merges are in the order of what they make, in a tokenizer that was made from SentencePiece.
    """
    made = [piece for piece, _ in groupby(left + right for left, right in merges)]
    if len(made) != len(set(made)):
        raise Refused(
            "the merges of the tokenizer are in no order of pieces, as SentencePiece's are"
        )
    ranks = {piece: float(-rank) for rank, piece in enumerate(made)}
    unknown = fields["model"].get("unk_token")
    for number, token in enumerate(tokens):
        if types[number] == NORMAL and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[number] = BYTE
        elif token == unknown:
            types[number] = UNKNOWN
    scores = [ranks.get(token, -1e4) for token in tokens]
    described = json.dumps([fields["normalizer"], fields["pre_tokenizer"]])
    prepends = '"Prepend"' in described or re.search(
        r'"prepend_scheme": "(first|always)"', described
    )
    flags = (("add_space_prefix", bool(prepends)),)
    return Vocabulary("llama", "default", tokens, types, scores=scores, flags=flags)


def _words(fields: dict[str, Any], tokens: list[str], types: list[int]) -> Vocabulary:
    """As the words of BERT, none of which has parts."""
    cut = (fields["pre_tokenizer"] or {}).get("type")
    if cut != "Whitespace":
        raise Refused(f"llama.cpp cuts no text into words as {cut} does")
    normalizer = fields["normalizer"]
    steps = (normalizer or {}).get("normalizers") or ([normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    unsaid = sorted(set(kinds) - {"Lowercase"})
    notes = (
        (f"llama.cpp does not do what the tokenizer does first: {', '.join(unsaid)}",)
        if unsaid
        else ()
    )
    tokens = [
        SPACE + token if kind == NORMAL else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    flags = (("normalizer.lowercase", "Lowercase" in kinds), ("normalizer.strip_accents", False))
    return Vocabulary("bert", "default", tokens, types, flags=flags, notes=notes)


def write(writer: Any, found: Vocabulary, tokenizer: Any, template: str | None) -> None:
    """Into the metadata of a decoder.

    Args:
        writer: a `gguf.GGUFWriter`.
        template: of a conversation, if there is one.
    """
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.rule)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    for key, value in found.flags:
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    numbers = {
        kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")
    }
    if found.model == "bert":  # whose own numbers would be tokens of this vocabulary
        numbers |= {"sep": numbers["eos"], "mask": numbers["unk"]}
    for kind, number in numbers.items():
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == numbers["bos"])
    writer.add_add_eos_token(bool(ids) and ids[-1] == numbers["eos"])
    if found.model == "bert":
        writer.add_add_sep_token(False)
    if template:
        writer.add_chat_template(template)
