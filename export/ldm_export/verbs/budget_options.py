"""``generate --budget`` and ``--steps auto``: one of the settings that ``bench --quality --save`` has measured."""

from __future__ import annotations

import argparse

from ldm_export.screen import Screen
from ldm_export.verbs.options import real_number, whole_number
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import number
from ldm_runtime.quality import QualityResult

__all__ = ["STEPS_HELP", "add_budget", "settled", "steps_or_auto"]

AUTO = "auto"
STEPS_HELP = (
    ", or auto: the fewest of a setting that `bench --quality --save` has measured with --budget in every image or, "
    "without --budget, with as many correct images as the model's own number of steps"
)
DECIDED = ("precision", "scheduler", "cache_every", "full_steps", "guidance_every")
"""Options that cannot be given together with a stored setting, which was measured without them or decides them."""


def steps_or_auto(text: str) -> int | str:
    """Parse a number of steps or "auto" for argparse; errors as ``whole_number``."""
    return AUTO if text == AUTO else whole_number(text)


def add_budget(verb: argparse.ArgumentParser) -> None:
    """Add the option."""
    verb.add_argument(
        "--budget",
        type=real_number,
        metavar="DB",
        help="take the fastest setting of --steps, --cache-every, --guidance-every and --precision that "
        "`bench --quality --save` has measured with at least this PSNR in every image, e.g. 35",
    )


def settled(
    args: argparse.Namespace, bundle: Bundle, screen: Screen
) -> tuple[argparse.Namespace, QualityResult | None]:
    """Return the arguments with the values of the stored setting that they ask for, and the setting, or None.

    Raises:
        SpecError: An option that the setting decides is given too, or the budget cannot be used.
        ManifestError: The bundle has no measured settings, or they are damaged.
    """
    auto = args.steps == AUTO
    if args.budget is None and not auto:
        return args, None
    asked = "--steps auto" if args.budget is None else "--budget"
    given = [name for name in DECIDED if getattr(args, name) is not None]
    given += ["steps"] if args.steps is not None and not auto else []
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise SpecError(f"{asked}: got {option} too, but a stored setting decides it; leave one of them out")
    budget = None if args.budget is None else number("budget", args.budget)
    record = bundle.quality()
    taken = record.fewest_steps(budget) if auto or budget is None else record.fastest(budget)
    wanted = " ".join([*(["--steps auto"] if auto else []), *([] if budget is None else [f"--budget {budget:g}"])])
    if taken is record.reference:
        screen.note(f"{wanted}: no other stored setting is good enough; takes the reference, {taken.setting}")
    else:
        screen.note(f"{wanted}: takes {taken.setting}; {record.measured(taken)}")
    setting = taken.setting
    values = {name: getattr(setting, name) for name in ("precision", "steps", "cache_every", "guidance_every")}
    return argparse.Namespace(**{**vars(args), **values}), taken
