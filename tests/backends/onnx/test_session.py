import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import gracec
from gracec.backends.onnx.session import (
    SEAL,
    SessionConfig,
    open_session,
    session_options,
)
from gracec.errors import GracecError
from gracec.file_hashes import file_sha256, json_sha256

Copied = Callable[[], Path]
ARTIFACTS = Path(__file__).parents[2] / "artifacts"
DECODER = "decoder_model_merged_q4.onnx"


def refusal(directory: Path) -> str:
    """The one line that loading a directory ends with."""
    with pytest.raises(GracecError) as caught:
        gracec.load(directory, backend="onnx")
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(folder: Path, **fields: object) -> None:
    """Change fields of the session file, and have it vouch for itself."""
    path = folder / "session.json"
    changed = {**json.loads(path.read_text()), **fields}
    changed = {name: value for name, value in changed.items() if value is not ...}
    changed.pop(SEAL, None)
    path.write_text(json.dumps({**changed, SEAL: json_sha256(changed)}))


def vouch_for(folder: Path, name: str) -> None:
    """Give a file that was changed the right digest, so that only the runtime can object."""
    digests = json.loads((folder / "session.json").read_text())["sha256"]
    edit(folder, sha256={**digests, name: file_sha256(folder / name)})


def test_it_reads_back(exported: Path) -> None:
    config = SessionConfig.read(exported / "onnx")
    assert (config.family, config.ops, config.mode) == ("llava", "qdq", "faithful")
    assert config.options == {"session.qdq_matmulnbits_accuracy_level": "1"}
    assert config.kernels == {"vision_encoder": 0, "embed_tokens": 0, "decoder": 14}
    assert set(config.sha256) == {p.name for p in (exported / "onnx").glob("*.onnx*")}


def test_options() -> None:
    assert session_options("qdq", "fast") == {"session.qdq_matmulnbits_accuracy_level": "4"}
    assert session_options("matmulnbits", "fast") == {}


@pytest.mark.parametrize("name", [DECODER, f"{DECODER}_data", "embed_tokens.onnx"])
def test_a_truncated_file(copied: Copied, name: str) -> None:
    file = copied() / "onnx" / name
    file.write_bytes(file.read_bytes()[:-100])
    assert refusal(file.parents[1]).startswith(f"{file}: the file is not the one that was written")


def test_an_edited_graph(copied: Copied) -> None:
    file = copied() / "onnx" / DECODER
    model = onnx.load(str(file), load_external_data=False)
    model.graph.node[0].name = "edited"
    file.write_bytes(model.SerializeToString())
    assert "not the one that was written (sha256 differs); copy" in refusal(file.parents[1])


def test_the_data_of_another_model(copied: Copied) -> None:
    file = copied() / "onnx" / f"{DECODER}_data"
    file.write_bytes(bytes(reversed(file.read_bytes())))
    assert f"{DECODER}_data: the file is not the one" in refusal(file.parents[1])


@pytest.mark.parametrize("name", [DECODER, f"{DECODER}_data"])
def test_a_missing_file(copied: Copied, name: str) -> None:
    file = copied() / "onnx" / name
    file.unlink()
    assert refusal(file.parents[1]).startswith(f"{file}: missing; copy the directory again")


def test_graphs_of_another_family(copied: Copied) -> None:
    directory = copied()
    edit(directory / "onnx", family="florence")
    assert "the graphs are of the family 'florence', config.json is of 'llava'" in refusal(
        directory
    )


def test_no_session_file(copied: Copied) -> None:
    path = copied() / "onnx" / "session.json"
    path.unlink()
    expected = "missing; without its options the runtime computes something else"
    assert refusal(path.parents[1]).startswith(f"{path}: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not readable as JSON"),
        ("[]", "not a JSON object but a list"),
        ("[" * 100_000, "more than 100 deep"),
        ("{}", "format version None"),
        ('{"format_version": 1}', "family: Field required"),
        ("\x00", "not readable as JSON"),
    ],
)
def test_a_broken_session_file(copied: Copied, text: str, expected: str) -> None:
    path = copied() / "onnx" / "session.json"
    path.write_text(text)
    message = refusal(path.parents[1])
    assert message.startswith(f"{path}: ") and expected in message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"family": ...}, "family: Field required"),
        ({"graphs": "x"}, "graphs: Input should be a valid dictionary"),
        ({"kernels": {"decoder": "many"}}, "kernels.decoder: Input should be a valid integer"),
        ({"ops": "abacus"}, "ops: String should match pattern"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"options": {"session.x": "1"}}, "options: not those of ops and mode"),
        ({"graphs": {"decoder": "../../outside.onnx"}}, "no hash of '../../outside.onnx'"),
        ({"model_files": {}}, "model_files: empty"),
        ({"model_files": {"../x/config.json": "0"}}, "the file was not written with the model"),
    ],
)
def test_a_field_that_is_missing_or_wrong_is_named(
    copied: Copied, fields: dict[str, object], expected: str
) -> None:
    directory = copied()
    edit(directory / "onnx", **fields)
    assert expected in refusal(directory)


def test_a_session_file_that_was_edited_says_so(copied: Copied) -> None:
    path = copied() / "onnx" / "session.json"
    path.write_text(path.read_text().replace('"faithful"', '"fast"'))
    assert refusal(path.parents[1]).startswith(f"{path}: it is not what was written")


@pytest.mark.parametrize("name", [DECODER, f"{DECODER}_data"])
def test_a_file_that_is_read_and_has_no_hash(copied: Copied, name: str) -> None:
    directory = copied()
    digests = json.loads((directory / "onnx" / "session.json").read_text())["sha256"]
    del digests[name]
    edit(directory / "onnx", sha256=digests)
    message = refusal(directory)
    assert name in message and "no hash" in message


def test_a_hash_of_what_no_graph_reads(copied: Copied) -> None:
    folder = copied() / "onnx"
    (folder / "more.onnx").write_bytes(b"x")
    vouch_for(folder, "more.onnx")
    assert "sha256: 'more.onnx' is of none of the graphs" in refusal(folder.parent)


@pytest.mark.parametrize("name", ["../../outside.onnx", "/tmp/outside.onnx", "link.onnx"])
def test_a_graph_outside_the_directory(copied: Copied, name: str, tmp_path: Path) -> None:
    """With hashes that vouch for it."""
    directory = copied()
    folder = directory / "onnx"
    outside = tmp_path / "outside.onnx"
    outside.write_bytes((folder / "embed_tokens.onnx").read_bytes())
    if name == "link.onnx":
        (folder / name).symlink_to(outside)
    saved = json.loads((folder / "session.json").read_text())
    digests = {**saved["sha256"], name: file_sha256(outside)}
    del digests["embed_tokens.onnx"]
    edit(folder, graphs={**saved["graphs"], "embed_tokens": name}, sha256=digests)
    message = refusal(directory)
    assert "it leads out of its directory" in message or "is no name of a file in it" in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_configuration_or_processor_that_was_edited(copied: Copied, name: str) -> None:
    file = copied() / name
    file.write_text(file.read_text().replace("{", "{ ", 1))
    assert refusal(file.parent).startswith(f"{file}: the file is not the one that was written")
    file.unlink()
    assert refusal(file.parent).startswith(f"{file}: missing")


def test_what_a_user_adds_is_nobodys_business(copied: Copied) -> None:
    directory = copied()
    (directory / "README.md").write_text("mine")
    (directory / "onnx" / "notes.txt").write_text("mine")
    gracec.load(directory, backend="onnx")
    (directory / "chat_template.json").write_text("{}")
    assert "chat_template.json: the file was not written with the model" in refusal(directory)


def test_graphs_of_before_lose_no_hash_either(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(ARTIFACTS / "onnx", tmp_path / "copy"))
    path = directory / "onnx" / "session.json"
    saved = json.loads(path.read_text())
    saved["sha256"].pop("embed_tokens.onnx")
    path.write_text(json.dumps(saved))
    assert "graphs.embed_tokens: no hash of 'embed_tokens.onnx'" in refusal(directory)


def test_another_version_of_the_session_file(copied: Copied) -> None:
    directory = copied()
    edit(directory / "onnx", format_version=9)
    assert "format version 9, this gracec reads 1 to 3; export the model again" in refusal(
        directory
    )


def test_a_runtime_that_is_too_old(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.19.2")
    message = refusal(exported)
    assert message.endswith(
        "needs onnxruntime 1.24, 1.19.2 is installed; pip install -U onnxruntime"
    )


def test_what_the_runtime_refuses_is_one_line(copied: Copied) -> None:
    directory = copied()
    file = directory / "onnx" / DECODER
    file.write_bytes(file.read_bytes()[:-100])
    vouch_for(file.parent, DECODER)
    message = refusal(directory)
    assert f"{file}: onnxruntime {onnxruntime.__version__} cannot load it" in message
    assert "ONNXRuntimeError" not in message


def test_data_that_is_too_short(copied: Copied) -> None:
    directory = copied()
    file = directory / "onnx" / f"{DECODER}_data"
    file.write_bytes(file.read_bytes()[:-100])
    vouch_for(file.parent, file.name)
    assert "cannot load it" in refusal(directory)


def test_an_operator_set_that_the_runtime_does_not_know(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 999)], ir_version=10)
    (tmp_path / "new.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(GracecError, match=r"new\.onnx: onnxruntime .* cannot load it: .*opset"):
        open_session(tmp_path / "new.onnx", {}, threads=1)


def test_a_directory_without_graphs(copied: Copied) -> None:
    directory = copied()
    (directory / "onnx").rename(directory / "elsewhere")
    assert "no folder 'onnx', so it holds no ONNX graphs; compile with --format" in refusal(
        directory
    )


@pytest.mark.parametrize("wanted", [None, "0"])
def test_no_usage_data_is_gathered_unless_it_is_wanted(
    wanted: str | None, bundle: Path, tmp_path: Path
) -> None:
    """ONNX Runtime would keep a number of this machine, and what it has still to send."""
    variables = {"HOME": str(tmp_path)}  # none of CI, where it gathers nothing by itself
    variables |= {} if wanted is None else {"ORT_DISABLE_TELEMETRY": wanted}
    script = "import sys, gracec, onnxruntime as ort; ort.InferenceSession(sys.argv[1])"
    command = [sys.executable, "-c", script, str(bundle / "onnx/embed_tokens.onnx")]
    subprocess.run(command, env=variables, check=True, timeout=300)
    assert bool(list(tmp_path.rglob("deviceid"))) == (wanted == "0")
