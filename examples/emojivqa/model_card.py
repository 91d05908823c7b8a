"""Write MODEL/README.md from MODEL/training.json and the results of evaluate.py.

python model_card.py student --note "Trained to its plateau."
"""

import argparse
import json

from emojivqa.models import SIZES
from evaluate import HERE, table

TEXT = """---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---

# EmojiVQA {name}

A very small vision-language model for tests and demonstrations: it answers questions about
64 x 64 pictures of one to four emoji. `LlavaForConditionalGeneration` with a CLIP image tower
(width {tower}, {tower_layers} layers, 64 visual tokens), a two-layer projector and a Llama decoder
(width {width}, {layers} layers, tied embeddings, 192 words).
{parameters:.1f} M parameters in float16.

{note}

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("examples/emojivqa/{name}")
processor = AutoProcessor.from_pretrained("examples/emojivqa/{name}")
content = [{{"type": "image"}}, {{"type": "text", "text": "Where is the cat?"}}]
chat = [{{"role": "user", "content": content}}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(text=text, images=Image.open("scene.png"), return_tensors="pt")
tokens = model.generate(**inputs.to(model.dtype), max_new_tokens=4)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

## Accuracy

Exact match in percent with its standard error. `blind`: the same model with the image zeroed.

Validation: artwork of FxEmojis, never trained on; used to choose among checkpoints.

{validation}

Test: artwork of Twemoji, never trained on.

{test}

## Training

Scenes drawn from five emoji sets (Noto, Noto v1, Fluent flat, Fluent 3D, Emoji One 2.3) as
described in [the example](../README.md); artwork licences in
[ATTRIBUTION.md](../sprites/ATTRIBUTION.md). Made by `train.py --model {name}`, one row a run:

{runs}

Losses are means over the last steps of a run (cross-entropy, nats a token).

## Limits

Emoji are drawings: nothing here says how a model would do on photographs. The model knows 144
things, 192 words and the five kinds of question of EmojiVQA; any other word is unknown to it. It is
made to measure compression, not to be useful.
"""


def extras(run: dict) -> str:
    """What a run did beyond its stage."""
    grown = [f"decoder grown from the {run['grown_from']}'s"] if run.get("grown_from") else []
    kept = ["fixed word vectors"] if run.get("keep_words") else []
    return ", ".join([*grown, *kept, *(["restyled images"] if run.get("restyle") else [])])


def runs_table(runs: list[dict]) -> str:
    lines = [
        "| stage | steps | scenes a step | highest rate | align loss | answer loss | with |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        loss = f"{run['answer']:.3f}" if run["stage"] != "align" else ""
        lines.append(
            f"| {run['stage']} | {run['steps']} | {run['batch']} | {run['lr']:g} "
            f"| {run['align']:.3f} | {loss} | {extras(run)} |"
        )
    return "\n".join(lines)


def card(name: str, note: str) -> str:
    training = json.loads((HERE / name / "training.json").read_text())
    results = {
        split: table(json.loads((HERE / "results" / f"{name}_{split}.json").read_text()))
        for split in ("validation", "test")
    }
    weights = (HERE / name / "model.safetensors").stat().st_size
    return TEXT.format(
        name=name,
        note=note,
        parameters=weights / 2e6,
        runs=runs_table(training["runs"]),
        **SIZES[name],
        **results,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=SIZES)
    parser.add_argument("--note", default="", help="what a reader should know about its training")
    args = parser.parse_args()
    (HERE / args.model / "README.md").write_text(card(args.model, args.note))


if __name__ == "__main__":
    main()
