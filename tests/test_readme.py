import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def load_script() -> object:
    spec = importlib.util.spec_from_file_location("demo_results", ROOT / "docs/demo_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_are_those_of_the_committed_run() -> None:
    script = load_script()
    result = json.loads((ROOT / "docs/results/demo.json").read_text())
    assert script.block_of((ROOT / "README.md").read_text()) == script.render(result)


def test_every_link_leads_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_every_command_exists() -> None:
    from typer.main import get_command

    from gracec.cli import app

    known = set(get_command(app).commands)
    written = set(re.findall(r"^gracec (\w+)", (ROOT / "README.md").read_text(), re.M))
    assert written
    assert written <= known
