"""A gracec artifact or a Hugging Face directory as a model of lmms-eval.

    python -m lmms_eval --model gracec --model_args pretrained=DIR --tasks TASK --batch_size 64

lmms-eval finds `manifest` among the entry points of installed packages. Documents are asked as
`gracec eval` asks questions: same prompts, same checks, greedily, in the order of the task. What
cannot be done is refused, never done in another way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from typing import Any

from PIL import Image
from rich.console import Console

from gracec.compiled import open_model
from gracec.data.pictures import as_loaded
from gracec.errors import GracecError
from gracec.evaluate.ask import answers
from gracec.training.progress import bar

# Without the extra the class can still be read and tested, but not registered.
lmms: Any = object
if find_spec("lmms_eval") is not None:
    lmms = import_module("lmms_eval.api.model").lmms

DEFAULT_BACKEND = "auto"
MAX_NEW_TOKENS = 1024  # of a task that sets none; what lmms-eval's own LLaVA takes
# These choose among sampled tokens, or are a wish to the image processor of the first LLaVA.
IGNORED = {"top_p", "top_k", "image_aspect_ratio"}


def manifest() -> Any:
    """What the entry point `lmms_eval.models` registers: the name `gracec`, and its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="gracec", simple_class_path=f"{__name__}.Gracec")


@dataclass(frozen=True)
class Settings:
    """How an answer ends: after so many tokens, or before the first of some texts."""

    max_new_tokens: int = MAX_NEW_TOKENS
    until: tuple[str, ...] = ()

    @classmethod
    def read(cls, options: Mapping[str, Any], where: str) -> Settings:
        """From the `generation_kwargs` of a task.

        Raises:
            GracecError: if an answer is not to be the greedy one, or an option is unknown.
        """
        # None says "as you like" in lmms-eval.
        given = {name: value for name, value in options.items() if value is not None}
        temperature = given.pop("temperature", 0)
        if given.pop("do_sample", temperature > 0):
            raise GracecError(
                "the task asks for sampled answers, and gracec answers greedily",
                where=where,
                fix="add --gen_kwargs do_sample=false,temperature=0",
            )
        if given.pop("num_beams", 1) != 1:
            raise GracecError(
                "the task asks for beam search, and gracec answers greedily",
                where=where,
                fix="add --gen_kwargs num_beams=1",
            )
        limit = given.pop("max_new_tokens", MAX_NEW_TOKENS)
        if not isinstance(limit, int) or limit < 1:
            raise GracecError(f"max_new_tokens must be at least 1, not {limit!r}", where=where)
        until = given.pop("until", ())
        stops = [until] if isinstance(until, str) else until
        if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) for s in stops):
            raise GracecError(f"until must be a text or a list of texts: {until!r}", where=where)
        unknown = [name for name, value in given.items() if name not in IGNORED and value]
        if unknown:
            raise GracecError(f"generation option {unknown[0]!r} is not supported", where=where)
        return cls(limit, tuple(stop for stop in stops if stop))

    def cut(self, text: str) -> str:
        """A text up to the first of `until`."""
        ends = [text.index(stop) for stop in self.until if stop in text]
        return text[: min(ends)].rstrip() if ends else text


class Gracec(lmms):  # type: ignore[misc]  # untyped
    """Answers the documents of tasks that generate, each about one picture or none.

    Args:
        pretrained: gracec artifact or Hugging Face model: a directory, or "org/name" of the Hub.
        backend: what runs an artifact; see `gracec.load`.
        batch_size: questions a batch, padded on the left.
        device: where it runs, "cpu" or "cuda".
        dtype: what it computes in; by default as it was stored or compiled.
        revision: branch, tag or commit on the Hub.

    Raises:
        GracecError: if there is no such model, or it cannot be run as told.
    """

    is_simple = True  # takes the text and the pictures of a document, not a conversation

    def __init__(
        self,
        pretrained: Any = None,
        backend: str = DEFAULT_BACKEND,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        revision: str | int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise GracecError(
                f"unknown option {next(iter(unknown))!r}",
                where="--model_args",
                fix="known are pretrained, backend, batch_size, device, dtype and revision",
            )
        if pretrained is None:
            raise GracecError(
                "no model is named", where="--model_args", fix="add pretrained=DIRECTORY"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise GracecError("gracec answers in one process", where="WORLD_SIZE")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise GracecError(f"must be a number from 1, not {batch_size!r}", where="--batch_size")
        self.batch_size = int(batch_size)
        # lmms-eval has made numbers of what looks like one.
        at = None if revision is None else str(revision)
        self.model, self.processor = open_model(
            str(pretrained),
            None if backend == DEFAULT_BACKEND else backend,
            revision=at,
            device=device,
            dtype=dtype,
        )

    @property
    def device(self) -> Any:
        """Of the model."""
        return self.model.device

    @property
    def chat_template(self) -> str:
        """Asked for under --apply_chat_template, which would apply the template twice."""
        raise GracecError(
            "every prompt comes from the processor's chat template anyway",
            where="--apply_chat_template",
            fix="leave it out",
        )

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to some requests, in their order.

        Raises:
            GracecError: if a document has more than one picture, if the processor refuses
                it, or if its task wants something else than greedy answers.
        """
        # Read before anything is generated. The order is kept, so that batches are those of
        # `gracec eval`: other neighbours are other padding, which can turn a near-tie.
        settings = [Settings.read(request.args[1], _task(request)) for request in requests]
        found: list[str] = []
        tokens_by_size: dict[tuple[int, int], int] = {}
        console = Console(stderr=True)
        with bar(console, console.is_terminal) as progress:
            task = progress.add_task("gracec", total=len(requests))
            for setting, batch in _batches(requests, settings, self.batch_size):
                texts = answers(
                    self.model,
                    self.processor,
                    [request.args[0] for request in batch],
                    [self._picture(request) for request in batch],
                    names=[_document(request) for request in batch],
                    tokens_by_size=tokens_by_size,
                    max_new_tokens=setting.max_new_tokens,
                )
                found += [setting.cut(text) for text in texts]
                progress.update(task, completed=len(found))
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused."""
        raise _only_generates(requests, "the likelihood of given answers")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused."""
        raise _only_generates(requests, "several rounds")

    def generate_visual_cot(self, requests: Sequence[Any]) -> list[str]:
        """Refused."""
        raise _only_generates(requests, "generated pictures")

    def _picture(self, request: Any) -> Image.Image | None:
        """The one picture of a document, if it has one, as `load_image` would give it."""
        _, _, doc_to_visual, number, task, split = request.args
        where = _document(request)
        visuals = doc_to_visual(self.task_dict[task][split][number]) or []
        if not visuals:
            return None
        if len(visuals) > 1:
            raise GracecError(
                f"gracec asks about one picture, and the document has {len(visuals)}", where=where
            )
        (picture,) = visuals
        if not isinstance(picture, Image.Image):
            raise GracecError(
                f"gracec asks about pictures, and the document has a {type(picture).__name__}, "
                "perhaps a video or a sound",
                where=where,
            )
        return as_loaded(picture, where)


def _batches(
    requests: Sequence[Any], settings: Sequence[Settings], batch_size: int
) -> Iterator[tuple[Settings, list[Any]]]:
    """Neighbours with the same settings, at most `batch_size` of them."""
    pairs = zip(settings, requests, strict=True)
    for setting, group in groupby(pairs, key=lambda pair: pair[0]):
        alike = [request for _, request in group]
        for start in range(0, len(alike), batch_size):
            yield setting, alike[start : start + batch_size]


def _task(request: Any) -> str:
    return f"task {request.args[-2]}"


def _document(request: Any) -> str:
    return f"{_task(request)}, document {request.args[-3]}"


def _only_generates(requests: Sequence[Any], wanted: str) -> GracecError:
    return GracecError(
        f"the task asks for {wanted}, and gracec only answers questions",
        where=_task(requests[0]),
        fix="choose a task with output_type generate_until",
    )
