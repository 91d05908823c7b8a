"""Models, artifacts and datasets by the names that the Hugging Face Hub has for them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects

import gracec
from gracec.data.conversations import open_train_data
from gracec.errors import GracecError
from gracec.models import hub
from gracec.models.hub import (
    Place,
    find_artifact,
    find_description,
    find_model,
    is_hub_name,
)
from gracec.models.loading import load_model
from gracec.store import read_manifest
from tests.hub import cache_dataset, cache_repository, offline
from tests.test_cli import gracec as command
from tests.tiny import tiny_batch, tiny_image, tiny_llava, tiny_processor

MODEL, CODES = "acme/tiny-llava", "acme/tiny-llava-int4"


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    return offline(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one block in its decoder, and its processor."""
    directory = tmp_path_factory.mktemp("block")
    tiny_llava(tie=True, num_hidden_layers=1).save_pretrained(directory)
    tiny_processor().save_pretrained(directory)
    return directory


def test_a_model_is_compiled_published_and_loaded_by_name(
    block: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    commit = cache_repository(tmp_path, MODEL, block, "main")
    compiled = gracec.compile(MODEL, "w4a16-ptq", output_dir=tmp_path / "out", revision="main")
    assert (compiled.source, compiled.frozen.revision) == (MODEL, commit)
    said = f"the model is {MODEL} at revision {commit}"
    assert said in map(str, compiled.report.notes)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.source, manifest.revision) == (MODEL, commit)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"base_model: {MODEL}\n" in card and f"gracec compile {MODEL} --revision {commit} " in card
    )

    published = cache_repository(tmp_path, CODES, tmp_path / "out", "main", "v1")
    again = gracec.load(CODES, revision="v1")
    assert (again.source, again.frozen.revision) == (MODEL, commit)
    batch, options = tiny_batch(), {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(**batch, **options), compiled.generate(**batch, **options))

    tiny_image().save(tmp_path / "it.png")
    asked = ("--image", "it.png", "--prompt", "what is this ?", "--max-new-tokens", 2, "--json")
    answers = [command("run", name, *asked) for name in (MODEL, CODES)]
    assert [json.loads(done.stdout)["model"] for done in answers] == [MODEL, CODES]
    page = command("report", CODES)
    assert page.returncode == 2 and "cache of the Hugging Face Hub" in page.stderr
    page = command("report", CODES, "--out", "page.html")
    assert page.returncode == 0 and CODES in (tmp_path / "page.html").read_text()

    done = subprocess.run(
        [sys.executable, "-m", "gracec.cli", "inspect", CODES, "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=True,
    )
    assert said in json.dumps(json.loads(done.stdout)["report"])
    assert published in str(find_artifact(CODES).path)


def test_a_command_compiles_by_name_and_a_teacher_has_one(
    block: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    commit = cache_repository(tmp_path, MODEL, block, "v1")
    records = [{"question": f"what is {word} ?", "answer": word} for word in ("red", "blue") * 4]
    cache_dataset(tmp_path, "acme/words", records, "train")
    (tmp_path / "short.yaml").write_text(
        "name: short\nweights: {decoder: {group_size: 32}}\n"
        "training: {steps: 1, batch_size: 2, held_out: 0.5, distillation: {omega: 0}}\n"
    )
    named = (MODEL, "--revision", "v1", "--teacher", MODEL, "--teacher-revision", "v1")
    data = ("--data", "acme/words:train", "--recipe", "short.yaml", "--format", "none")
    done = command("compile", *named, *data, "--out", "out", "--json")
    assert done.returncode == 0, done.stderr
    notes = [note["text"] for note in json.loads(done.stdout)["report"]["notes"]]
    assert f"the model is {MODEL} at revision {commit}" in notes
    assert f"the teacher is {MODEL} at revision {commit}" in notes
    looked = command("doctor", MODEL, "--revision", commit, "--json")
    assert json.loads(looked.stdout)["compiles"], looked.stdout


def test_a_revision_is_a_branch_a_tag_or_a_commit(
    saved: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    first = cache_repository(tmp_path, MODEL, saved, "main")
    other = Path(shutil.copytree(saved, tmp_path / "other"))
    (other / "added_tokens.json").write_text("{}")
    second = cache_repository(tmp_path, MODEL, other, "v2")
    asked = [None, "v2", first, second]
    found = [find_model(MODEL, revision) for revision in asked]
    assert [place.revision for place in found] == [first, second, first, second]
    assert [(place.path / "added_tokens.json").exists() for place in found] == [0, 1, 0, 1]
    assert all(str(place) == place.name == MODEL for place in found)
    with pytest.raises(GracecError, match="and not at revision v3 in the cache .*--revision v3$"):
        find_model(MODEL, "v3")
    for named in (saved, str(saved)):
        with pytest.raises(GracecError, match="a directory has no revisions"):
            find_model(named, "v2")
    with pytest.raises(GracecError, match="teacher_revision: only a repository of the Hugging"):
        gracec.compile(saved, "w4a16", teacher=saved, teacher_revision="v2", train_data=[{}])


def test_a_directory_is_meant_before_a_repository(
    saved: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    shutil.copytree(saved, tmp_path / MODEL)
    cache_repository(tmp_path, MODEL, saved, "main")
    assert find_model(MODEL) == Place(Path(MODEL), "tiny-llava")
    assert load_model(find_model(MODEL).path).config.model_type == "llava"
    assert not find_model(Path("acme/other")).revision


@pytest.mark.parametrize(
    "named", ["x", "./x", "../x", "/a/b", "a/b/c", "a/", "~/x", "a\\b", "C:/x", "a/..", "a/b:c", 12]
)
def test_what_is_no_name_of_a_repository_is_a_path(named: Any) -> None:
    assert not is_hub_name(named)


def test_what_is_not_cached_is_told_in_one_line(
    saved: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    line = (
        "acme/none: no such model directory, and not in the cache of the Hugging Face Hub, which "
        "is offline; give a directory, or where there is a network: hf download acme/none"
    )
    for call in (
        lambda: gracec.compile("acme/none"),
        lambda: gracec.compile(saved, "w4a16", teacher="acme/none", train_data=[{}]),
        lambda: gracec.load("acme/none"),
        lambda: gracec.load("acme/none", "onnxruntime"),
    ):
        with pytest.raises(GracecError) as error:
            call()
        assert str(error.value) == line
    for arguments in (("inspect", "acme/none"), ("compile", "acme/none", "--out", "out")):
        done = command(*arguments)
        assert (done.returncode, done.stderr.strip()) == (2, f"gracec: {line}")
    assert line in command("doctor", "acme/none").stdout
    with pytest.raises(GracecError, match='models: no such model directory; .*"org/name"'):
        gracec.compile("models")
    cache_repository(tmp_path, MODEL, saved, "main")
    with pytest.raises(GracecError, match=f"{MODEL}: not a gracec artifact; gracec.json missing"):
        gracec.load(MODEL)


def test_weights_that_are_not_cached_are_told(
    saved: Path, tmp_path: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = shutil.copytree(saved, tmp_path / "part", ignore=lambda *_: {"model.safetensors"})
    (Path(part) / "pytorch_model.bin").write_bytes(b"")
    cache_repository(tmp_path, MODEL, Path(part), "main")
    assert find_description(MODEL).revision
    with pytest.raises(GracecError, match=f"{MODEL}: no safetensors weights in the cache .* hf do"):
        find_model(MODEL)
    kept = find_description(MODEL)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(kept.path))
    with pytest.raises(GracecError, match="no safetensors weights, and pickles are not read"):
        find_model(MODEL)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (GatedRepoError, "access to this .* open https://.*/acme/x, .* log in: hf auth login"),
        (RepositoryNotFoundError, "no such model directory, and no such repository .* log in: hf"),
        (RevisionNotFoundError, "acme/x: the repository has no revision v9; "),
        (OSError, "acme/x: it cannot be fetched from the Hugging Face Hub: the disk is full; "),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(
    kind: type[Exception], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        error = kind.__new__(kind)
        error.args = ("the disk is full\nand more",)
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(GracecError, match=line) as found:
        find_model("acme/x", "v9")
    assert "\n" not in str(found.value)


def test_only_what_is_read_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = """config.json generation_config.json tokenizer.json tokenizer_config.json merges.txt
    vocab.json preprocessor_config.json chat_template.jinja additional_chat_templates/tool.jinja
    model-00001-of-00002.safetensors model.safetensors.index.json README.md pytorch_model.bin
    original/consolidated.safetensors modeling_x.py training_args.bin x.pt gracec.json
    gracec/gracec.safetensors onnx/model.onnx onnx/model.onnx_data onnx/session.json""".split()
    fetched: set[str] = set()

    def download(name: str, *, allow_patterns: Any, ignore_patterns: Any, **_: Any) -> str:
        wanted = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        fetched.update(filter_repo_objects(listed, **wanted))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    find_description("acme/x")
    looked = {*listed[:9], "gracec.json"}
    assert fetched == looked
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    find_model("acme/x")
    assert fetched == looked | {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    fetched.clear()
    (tmp_path / "gracec.json").touch()
    find_model("acme/x"), find_artifact("acme/x")
    assert fetched == looked | {"gracec/gracec.safetensors"}
    find_artifact("acme/x", onnx=True)
    assert fetched - looked == {"gracec/gracec.safetensors", *listed[-3:]}


def test_a_dataset_is_read_by_name(tmp_path: Path, env: dict[str, str]) -> None:
    records = [{"question": f"what is {word} ?", "answer": word} for word in ("red", "blue")]
    cache_dataset(tmp_path, "acme/words", records, "test")
    data = open_train_data("acme/words:test")
    assert [data.sample(number).turns[-1].text for number in range(2)] == ["red", "blue"]
    with pytest.raises(
        GracecError, match="acme/words: no such file or folder, and no dataset"
    ) as e:
        open_train_data("acme/words")
    assert "\n" not in str(e.value)
    with pytest.raises(GracecError, match="acme/no:a: .*it is not in the cache of datasets, which"):
        open_train_data("acme/no:a")
    with pytest.raises(GracecError, match="no.jsonl: cannot be read"):
        open_train_data("acme/no.jsonl")
