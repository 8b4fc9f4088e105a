"""``--budget`` and ``--steps auto``: one of the settings that ``bench --quality --save`` has measured."""

from __future__ import annotations

import argparse

from ldm_export.screen import Screen
from ldm_export.verbs.options import number_or_auto, real_number
from ldm_runtime.bundle import Bundle
from ldm_runtime.measured_settings import settled
from ldm_runtime.quality import QualityResult
from ldm_runtime.request import AUTO, Request

__all__ = ["add_budget", "settled_request"]


def add_budget(verb: argparse.ArgumentParser) -> None:
    """Add ``--steps`` and ``--budget``."""
    verb.add_argument(
        "--steps",
        type=number_or_auto,
        help="denoising steps, or auto: the fewest of a setting that `bench --quality --save` has measured with "
        "--budget in every image or, without --budget, with as many correct images as the model's own number of steps "
        "(default: the model's)",
    )
    verb.add_argument(
        "--budget",
        type=real_number,
        metavar="DB",
        help="take the fastest setting of --steps, --cache-every and --guidance-every that `bench --quality --save` "
        "has measured with at least this PSNR in every image, e.g. 35; `generate` takes its precision too",
    )


def settled_request(
    request: Request, bundle: Bundle, precision: str | None, screen: Screen
) -> tuple[Request, QualityResult | None]:
    """Settle a request before the bundle is loaded, because the setting has a precision, and say which was taken.

    Args:
        request: The request; without a budget it is returned as it is.
        bundle: The bundle.
        precision: Precision that the user asks for; None takes a setting of any.
        screen: Gets one line.

    Raises:
        LdmError: As ``settled`` and ``Bundle.quality``.
    """
    if request.budget is None and request.num_inference_steps != AUTO:
        return request, None
    record = bundle.quality()
    settled_one, taken = settled(request, record, precision)
    assert taken is not None
    wanted = ["--steps auto"] if request.num_inference_steps == AUTO else []
    wanted += [] if request.budget is None else [f"--budget {request.budget:g}"]
    if taken is record.reference:
        note = f"no other measured setting is good enough; takes the reference, {taken.setting}"
    else:
        note = f"takes {taken.setting}; {record.measured(taken)}"
    screen.note(f"{' '.join(wanted)}: {note}")
    return settled_one, taken
