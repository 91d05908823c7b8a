"""The mean of two trainings is a complete model and records what it is made of."""

import json

import torch
import train
from average import average
from emojivqa.models import build
from transformers import AutoModelForImageTextToText


def test_mean_of_two_runs(tmp_path) -> None:
    torch.manual_seed(0)
    models = [build("student") for _ in range(2)]
    folders = [tmp_path / "first", tmp_path / "second"]
    for steps, (model, folder) in enumerate(zip(models, folders, strict=True), start=7):
        folder.mkdir()
        train.save(model, folder, {"steps": steps, "runs": []})
    average("student", folders, tmp_path / "out")
    made = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    first, second, found = (dict(model.named_parameters()) for model in (*models, made))
    for name, weight in found.items():
        expected = (first[name] + second[name]) / 2
        torch.testing.assert_close(weight, expected, atol=1e-3, rtol=1e-3)
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record == {"steps": 8, "runs": [], "averaged": [7, 8]}
