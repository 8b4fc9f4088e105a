"""Measures the demo model: generates images of held-out prompts and grades them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ldm_export_demo.drawing import PIXELS
from ldm_export_demo.grader import ATTRIBUTES, Accuracy, Grade, grade, summarise
from ldm_export_demo.grammar import held_out_prompts, parse

Pixels = NDArray[np.uint8]
COLUMNS, ROWS, SCALE, GAP, CAPTION = 8, 4, 2, 10, 72
"""Sample grid: images across and down, magnification, and pixels between cells and for a caption."""


def generate(pipeline: DiffusionPipeline, prompts: list[str], args: argparse.Namespace) -> Iterator[Pixels]:
    """Generate one image, uint8 [64, 64, 3] RGB, per prompt; batch ``i`` has the seed ``args.seed + i``."""
    pipeline.set_progress_bar_config(disable=True)
    starts = range(0, len(prompts), args.batch)
    for index, start in enumerate(track(starts, description="generating", console=Console(stderr=True))):
        batch = pipeline(
            prompts[start : start + args.batch],
            height=PIXELS,
            width=PIXELS,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            eta=args.eta,
            generator=torch.manual_seed(args.seed + index),
        ).images
        yield from (np.asarray(image.convert("RGB")) for image in batch)


def wrap(text: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> str:
    """Break a text into lines of at most ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def sample_grid(images: list[Pixels], prompts: list[str], grades: list[Grade]) -> Image.Image:
    """Arrange evenly chosen images in a grid with their prompts below; a red frame marks an incorrect image."""
    count = min(len(images), COLUMNS * ROWS)
    chosen = [index * len(images) // count for index in range(count)]
    side = SCALE * PIXELS
    columns, rows = min(count, COLUMNS), -(-count // COLUMNS)
    sheet = Image.new("RGB", (columns * (side + GAP) + GAP, rows * (side + GAP + CAPTION) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for cell, index in enumerate(chosen):
        row, column = divmod(cell, COLUMNS)
        x, y = GAP + column * (side + GAP), GAP + row * (side + GAP + CAPTION)
        colour, width = ("silver", 1) if grades[index].correct else ("red", 4)
        draw.rectangle((x - width, y - width, x + side + width - 1, y + side + width - 1), outline=colour, width=width)
        sheet.paste(Image.fromarray(images[index]).resize((side, side), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x, y + side + 6), wrap(prompts[index], side, draw, font), "black", font, spacing=2)
    return sheet


def table(accuracy: Accuracy) -> Table:
    """Table of the shares of correct images in percent, one column for each kind of prompt."""
    by_kind = {"all": accuracy.overall, "one object": accuracy.one_object, "two objects": accuracy.two_objects}
    present = {name: counters for name, counters in by_kind.items() if counters}
    result = Table("correct, %", *(f"{name} ({counters.number})" for name, counters in present.items()))
    for name in ("correct", *ATTRIBUTES):
        label = "everything" if name == "correct" else name
        result.add_row(label, *(f"{100 * getattr(counters, name):.1f}" for counters in present.values()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a saved LDMTextToImagePipeline")
    parser.add_argument("--one-object", type=int, default=100, help="held-out one-object prompts")
    parser.add_argument("--two-object", type=int, default=200, help="held-out two-object prompts")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--eta", type=float, default=0.3)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--json", type=Path, help="file to write the figures and settings to")
    parser.add_argument("--grid", type=Path, help="PNG file to write a sample grid to")
    args = parser.parse_args()
    if not (args.folder / "model_index.json").is_file():
        parser.error(f"{args.folder} has no model_index.json, expected a saved pipeline")
    if args.one_object + args.two_object < 1:
        parser.error("no prompts: --one-object and --two-object are both 0")
    prompts = held_out_prompts(args.one_object, args.two_object)
    images = list(generate(DiffusionPipeline.from_pretrained(args.folder), prompts, args))
    sentences = [parse(prompt) for prompt in prompts]
    grades = [grade(image, sentence) for image, sentence in zip(images, sentences, strict=True)]
    accuracy = summarise(grades, sentences)
    Console().print(table(accuracy))
    if args.json:
        names = ("steps", "eta", "guidance", "seed", "batch", "one_object", "two_object")
        settings = {name: getattr(args, name) for name in names}
        failed = {
            prompt: [name for name in ATTRIBUTES if not getattr(graded, name)]
            for prompt, graded in zip(prompts, grades, strict=True)
            if not graded.correct
        }
        figures = {"settings": settings, "accuracy": asdict(accuracy), "wrong": failed}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    if args.grid:
        args.grid.parent.mkdir(parents=True, exist_ok=True)
        sample_grid(images, prompts, grades).save(args.grid, "PNG")


if __name__ == "__main__":
    main()
