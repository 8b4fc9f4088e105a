"""Renders a verification as one self-contained HTML page: figures, and images side by side with their difference."""

from __future__ import annotations

from ldm_export.page.document import Figure, Markup, decibel, difference, document, element, inline_image, table, text
from ldm_export.quality.measures import Tolerance
from ldm_export.quality.verification import Verification

__all__ = ["page"]

AMPLIFIED = 64
"""Amplification of differences: 1/255 becomes a quarter of full brightness."""


def page(result: Verification) -> str:
    """Render the verification as HTML with inline images; no network is needed to open it."""
    verdict = element("p", "All results are within the tolerance.", class_="good")
    if result.failures:
        items = element("ul", *(element("li", line) for line in result.failures))
        verdict = element("div", element("p", "Beyond the tolerance:"), items, class_="bad")
    components = [
        (c.name, Figure(f"{c.max_error:.2e}"), Figure(f"{c.cosine:.7f}"), decibel(c.psnr)) for c in result.components
    ]
    images = [
        (
            Markup(f"{text(p.label)}<br>seed {p.request['seed']}"),
            inline_image(p.theirs),
            inline_image(p.ours),
            inline_image(difference(p.ours, p.theirs, AMPLIFIED)),
            Figure(f"{p.max_pixel}/255"),
            decibel(p.psnr),
        )
        for p in result.images
    ]
    return document(
        f"{result.bundle}, {result.precision}: compared with its checkpoint",
        (
            verdict,
            element("h2", "Components, compared with torch"),
            element(
                "p",
                "Both run on the same inputs. The error is the largest difference as a share of the largest value; "
                f"at most {result.tolerance.component:.0e} is accepted.",
            ),
            table(("component", "max error", "cosine", "PSNR dB"), components),
            element("h2", "Images, compared with diffusers"),
            element(
                "p",
                f"The same request and seed, {result.defaults.num_inference_steps} steps; "
                f"{_accepted(result.tolerance)} is accepted. "
                f"Differences are amplified by a factor of {AMPLIFIED}.",
            ),
            table(("request", "diffusers", "bundle", f"difference × {AMPLIFIED}", "max pixel", "PSNR dB"), images),
        ),
    )


def _accepted(tolerance: Tolerance) -> str:
    return f"at most {tolerance.pixel}/255" if tolerance.pixel < 255 else f"at least {tolerance.psnr:g} dB"
