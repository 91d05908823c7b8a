"""Write a split as a plain visual-question-answering folder.

    python make_dataset.py --split test --out DIR [--limit N]

DIR/samples.jsonl holds one question a line, {"image", "question", "answer", "type"}, and
DIR/images one PNG per scene. The five questions of a scene stand in consecutive lines.
"""

import argparse
import json
from pathlib import Path

from emojivqa.packing import questions_of
from emojivqa.questions import TYPES
from emojivqa.scenes import compose, render
from PIL import Image

SCENES = {"train": 2000, "validation": 800, "test": 800}


def write(split: str, folder: Path, limit: int | None = None) -> int:
    """Write at most `limit` questions; the number written."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    total = SCENES[split] * len(TYPES) if limit is None else limit
    index = 0
    while len(lines) < total:
        name = f"images/{index:06d}.png"
        pixels = render(split, index, compose(split, index))
        Image.fromarray(pixels).save(folder / name)
        for question in questions_of(split, index)[: len(TYPES)]:
            fields = {"question": question.text, "answer": question.answer, "type": question.type}
            lines.append(json.dumps({"image": name, **fields}))
        index += 1
    lines = lines[:total]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--split", choices=SCENES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="number of questions (default: the whole split)")
    args = parser.parse_args()
    print(f"{write(args.split, args.out, args.limit)} questions in {args.out}")


if __name__ == "__main__":
    main()
