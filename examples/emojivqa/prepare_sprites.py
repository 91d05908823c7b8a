"""Render the emoji of every concept from seven npm packages into one webp atlas per style.

    python prepare_sprites.py NODE_MODULES [--out sprites]

NODE_MODULES is the folder in which `npm install` put the packages of `PACKAGES`. The result is
`<style>.webp`: RGBA tiles of TILE x TILE pixels, COLUMNS a row, in the order of concepts.tsv.
"""

import argparse
import csv
import io
import json
from functools import cache
from pathlib import Path

import resvg_py
from PIL import Image

HERE = Path(__file__).resolve().parent
TILE = 40
COLUMNS = 16
PACKAGES = {
    "noto": "@iconify-json/noto",
    "noto-v1": "@iconify-json/noto-v1",
    "fluent-flat": "@iconify-json/fluent-emoji-flat",
    "fluent-3d": "@lobehub/fluent-emoji-3d",
    "emojione": "@iconify-json/emojione",
    "fxemoji": "@iconify-json/fxemoji",
    "twemoji": "@iconify-json/twemoji",
}
# Two sets have no table of code points; their icons carry Noto's names, with this exception.
RENAMED = {"bullseye": "direct-hit"}


@cache
def _json(path: Path) -> dict:
    return json.loads(path.read_text())


def _icon_name(modules: Path, style: str, codepoint: str, fxemoji: str) -> str:
    """The name under which the icon set of `style` keeps the emoji `codepoint`."""
    if style == "fxemoji":
        return fxemoji
    chars = _json(modules / PACKAGES[style] / "chars.json")
    if chars:
        return chars[codepoint]
    name = _json(modules / PACKAGES["noto"] / "chars.json")[codepoint]
    return RENAMED.get(name, name)


def _render_svg(modules: Path, style: str, name: str) -> Image.Image:
    """Icon `name` as a square RGBA image of TILE pixels."""
    icons = _json(modules / PACKAGES[style] / "icons.json")
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    size = {"width": 4 * TILE, "height": round(4 * TILE * height / width)}
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, **size)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _render_webp(modules: Path, style: str, codepoint: str) -> Image.Image:
    folder = modules / PACKAGES[style] / "assets"
    paths = [folder / f"{codepoint}.webp", folder / f"{codepoint}-fe0f.webp"]
    return Image.open(next(path for path in paths if path.exists())).convert("RGBA")


def _tile(image: Image.Image) -> Image.Image:
    """`image` cropped to what is visible and centred on a TILE x TILE square, aspect kept."""
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((TILE, TILE), Image.Resampling.BOX if side > TILE else Image.BICUBIC)


def atlas(modules: Path, style: str, concepts: list[dict[str, str]]) -> Image.Image:
    rows = -(-len(concepts) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
    for index, concept in enumerate(concepts):
        if style == "fluent-3d":
            image = _render_webp(modules, style, concept["codepoint"])
        else:
            name = _icon_name(modules, style, concept["codepoint"], concept["fxemoji"])
            image = _render_svg(modules, style, name)
        sheet.paste(_tile(image), (index % COLUMNS * TILE, index // COLUMNS * TILE))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", type=Path, help="the node_modules folder")
    parser.add_argument("--concepts", type=Path, default=HERE / "emojivqa" / "concepts.tsv")
    parser.add_argument("--out", type=Path, default=HERE / "sprites")
    args = parser.parse_args()
    with args.concepts.open() as file:
        concepts = list(csv.DictReader(file, delimiter="\t"))
    args.out.mkdir(parents=True, exist_ok=True)
    for style in PACKAGES:
        path = args.out / f"{style}.webp"
        atlas(args.modules, style, concepts).save(path, quality=90, method=6)
        print(f"{path.name}: {len(concepts)} sprites, {path.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
