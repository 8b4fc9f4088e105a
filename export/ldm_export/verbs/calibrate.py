"""``ldm-export calibrate``: add int8 graphs to a bundle, calibrated on its own images within a budget."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ldm_export.screen import Screen
from ldm_export.verbs.int8_options import add_int8_arguments, given_options, settings_of, show
from ldm_export.verbs.options import unwritten
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError

__all__ = ["add_arguments", "run"]


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options."""
    verb.add_argument("bundle", type=Path)
    verb.add_argument(
        "--record", type=Path, metavar="FILE", help="calibration record (calibration.json) to apply without measuring"
    )
    add_int8_arguments(verb)


def run(args: argparse.Namespace, screen: Screen) -> None:
    """Run ``ldm-export calibrate``.

    Raises:
        LdmError: The bundle, the settings or the budget cannot be used.
    """
    from ldm_export.extras import needs

    with needs("export"):
        from ldm_export.bundle.add_int8 import calibrate
        from ldm_export.bundle.int8_report import write_report
        from ldm_export.demo import demo_grader
    begun = time.monotonic()
    bundle = Bundle.open(args.bundle)
    conditioning = [entry.kind for entry in bundle.manifest.conditioning]
    classes = max((entry.settings.get("classes", 0) for entry in bundle.manifest.conditioning), default=0)
    if args.record is not None and given_options(args):
        raise SpecError(
            f"--record: got {', '.join(given_options(args))} too, but the record determines them; leave them out"
        )
    settings = args.record or settings_of(args, conditioning, bundle, classes)
    with screen.bar("reading") as bar:
        built = calibrate(
            args.bundle, settings, lambda part, done, total: bar.to(done, total, part), demo_grader(bundle)
        )
        bar.to(0, 1, "report")
        try:
            _, report = write_report(built.bundle)
        except OSError as error:
            raise unwritten(args.bundle, error, "free some disk space") from None
    if args.json:
        screen.json({name: report[name] for name in ("record", "summary", "budget", "warnings", "speed")})
        return
    new = [name for name, origin in built.origins.items() if origin == "made"]
    what = f"made {', '.join(new)}" if new else "nothing to do, the bundle is complete"
    screen.note(f"{what}; {time.monotonic() - begun:.0f} s")
    show(report, screen)
    if built.bundle.precision == "int8":
        screen.note("`ldm-export generate` now takes int8 from this bundle; --precision fp32 is exact")
