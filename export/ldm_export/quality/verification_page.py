"""The verification as one self-contained HTML page: figures, and pictures side by side with their difference."""

from __future__ import annotations

from ldm_export.page.document import Figure, Markup, decibel, difference, document, element, picture, table, text
from ldm_export.quality.measures import Tolerance
from ldm_export.quality.verification import Verification

AMPLIFIED = 64
"""A difference of one in 255 shows as a quarter of full brightness."""


def page(result: Verification) -> str:
    """HTML with inline pictures; opens without a network."""
    verdict = element("p", "All of it is within the tolerance.", class_="good")
    if result.failures:
        items = element("ul", *(element("li", line) for line in result.failures))
        verdict = element("div", element("p", "Beyond the tolerance:"), items, class_="bad")
    components = [
        (c.name, Figure(f"{c.max_error:.2e}"), Figure(f"{c.cosine:.7f}"), decibel(c.psnr)) for c in result.components
    ]
    pictures = [
        (
            Markup(f"{text(p.label)}<br>seed {p.request['seed']}"),
            picture(p.theirs),
            picture(p.ours),
            picture(difference(p.ours, p.theirs, AMPLIFIED)),
            Figure(f"{p.max_pixel}/255"),
            decibel(p.psnr),
        )
        for p in result.pictures
    ]
    return document(
        f"{result.bundle}, {result.precision}: measured against its checkpoint",
        (
            verdict,
            element("h2", "Components, against torch"),
            element(
                "p",
                "The same inputs to both. The error is the largest, as a share of the largest value; at most "
                f"{result.tolerance.component:.0e} is accepted.",
            ),
            table(("component", "max error", "cosine", "PSNR dB"), components),
            element("h2", "Pictures, against diffusers"),
            element(
                "p",
                f"The same request and seed, {result.defaults.num_inference_steps} steps; "
                f"{_accepted(result.tolerance)} is accepted. "
                f"The difference is shown {AMPLIFIED} times as bright as it is.",
            ),
            table(("request", "diffusers", "bundle", f"difference × {AMPLIFIED}", "max pixel", "PSNR dB"), pictures),
        ),
    )


def _accepted(tolerance: Tolerance) -> str:
    return f"at most {tolerance.pixel}/255" if tolerance.pixel < 255 else f"at least {tolerance.psnr:g} dB"
