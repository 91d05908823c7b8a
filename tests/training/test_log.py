"""What a person reads of a run."""

from __future__ import annotations

from gracec.training.log import line


def test_a_row_in_words() -> None:
    row = {"step": 3, "ce": 1.25, "distillation": 0.5, "rcka": 0.0, "beta": None, "lr_factor": 1}
    assert line(row, 9) == "step 3/9 ce 1.25 distillation 0.5 rcka 0"
    timed = {**row, "seconds": 2.5, "data_seconds": 0.5}
    assert line(timed, 9) == f"{line(row, 9)} 2.5 s, 20% for data"
    scores = {"held_out_loss": 2.0, "held_out_exact": 0.5}
    assert line({"step": 6, **scores}, 9) == "step 6/9 held out: loss 2.0000, exact 50.0%"
    candidate = {"step": 0, "candidate": scores}
    assert line(candidate, 9) == "step 0/9 calibrated, held out: loss 2.0000, exact 50.0%"
    taught = {"held_out_loss": None, "held_out_kl": 0.125, "held_out_top1": 0.75}
    assert line({"step": 6, **taught}, 9) == (
        "step 6/9 held out: loss not finite, KL to the teacher 0.1250, same top token 75.0%"
    )
