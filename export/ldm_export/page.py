"""The verification as one self-contained HTML page: figures, and pictures side by side with their difference."""

from __future__ import annotations

import base64
from html import escape

from PIL import Image, ImageChops

from ldm_export.verification import Tolerance, Verification
from ldm_runtime.images import to_png

AMPLIFIED = 64
"""A difference of one in 255 shows as a quarter of full brightness."""

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 2rem; }
th, td { text-align: left; padding: .4rem .8rem; border-bottom: 1px solid #ddd; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
img { width: 160px; image-rendering: pixelated; border: 1px solid #ccc; display: block; }
.good { color: #176a2c; } .bad { color: #a3161b; }
"""


def page(result: Verification) -> str:
    """HTML with inline pictures; opens without a network."""
    verdict = "<p class=good>All of it is within the tolerance.</p>"
    if result.failures:
        items = "".join(f"<li>{escape(line)}</li>" for line in result.failures)
        verdict = f"<div class=bad><p>Beyond the tolerance:</p><ul>{items}</ul></div>"
    components = "".join(
        f"<tr><td>{c.name}</td><td class=n>{c.max_error:.2e}</td><td class=n>{c.cosine:.7f}</td>"
        f"<td class=n>{_decibel(c.psnr)}</td></tr>"
        for c in result.components
    )
    pictures = "".join(
        f"<tr><td>{escape(p.prompt)}<br>seed {p.seed}</td><td>{_image(p.theirs)}</td><td>{_image(p.ours)}</td>"
        f"<td>{_image(_difference(p.ours, p.theirs))}</td><td class=n>{p.max_pixel}/255</td>"
        f"<td class=n>{_decibel(p.psnr)}</td></tr>"
        for p in result.pictures
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(result.bundle)}: verification</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>{escape(result.bundle)}, {result.precision}: measured against its checkpoint</h1>{verdict}
<h2>Components, against torch</h2>
<p>The same inputs to both. The error is the largest, as a share of the largest value; at most
{result.tolerance.component:.0e} is accepted.</p>
<table><tr><th>component</th><th class=n>max error</th><th class=n>cosine</th><th class=n>PSNR dB</th></tr>
{components}</table>
<h2>Pictures, against diffusers</h2>
<p>The same prompt and seed, {result.steps} steps; {_accepted(result.tolerance)} is accepted.
The difference is shown {AMPLIFIED} times as bright as it is.</p>
<table><tr><th>prompt</th><th>diffusers</th><th>bundle</th><th>difference × {AMPLIFIED}</th>
<th class=n>max pixel</th><th class=n>PSNR dB</th></tr>
{pictures}</table></body></html>
"""


def _accepted(tolerance: Tolerance) -> str:
    return f"at most {tolerance.pixel}/255" if tolerance.pixel < 255 else f"at least {tolerance.psnr:g} dB"


def _difference(one: Image.Image, other: Image.Image) -> Image.Image:
    return ImageChops.difference(one, other).point(lambda value: min(255, value * AMPLIFIED))


def _image(image: Image.Image) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(to_png(image)).decode()}">'


def _decibel(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"
