"""``ldm-export calibrate``: add int8 graphs to a bundle, calibrated on its own pictures within a budget."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ldm_export.screen import Screen
from ldm_export.verbs.int8_options import add_int8_arguments, given, settings_of, show
from ldm_export.verbs.options import unwritten
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """The verb's options."""
    verb.add_argument("bundle", type=Path)
    verb.add_argument("--record", type=Path, metavar="FILE", help="a calibration.json to follow; nothing is measured")
    add_int8_arguments(verb)


def run(args: argparse.Namespace, screen: Screen) -> None:
    """``ldm-export calibrate``."""
    from ldm_export.extras import needs

    with needs("export"):
        from ldm_export.bundle.add_int8 import calibrate
        from ldm_export.bundle.int8_report import write_report
        from ldm_export.demo import demo_grader
    begun = time.monotonic()
    bundle = Bundle.open(args.bundle)
    if args.record is not None and given(args):
        raise SpecError(f"--record: says all of the calibration; leave {', '.join(given(args))} out")
    settings = args.record or settings_of(args, bundle)
    with screen.bar("reading") as bar:
        built = calibrate(
            args.bundle, settings, lambda stage, done, total: bar.to(done, total, stage), demo_grader(bundle)
        )
        bar.to(0, 1, "report")
        try:
            _, report = write_report(built.bundle)
        except OSError as error:
            raise unwritten(args.bundle, error, "free some disk space") from None
    if args.json:
        screen.json({name: report[name] for name in ("record", "summary", "budget", "speed")})
        return
    made = [name for name, origin in built.origins.items() if origin == "made"]
    what = f"made {', '.join(made)}" if made else "nothing to do, all of it is there"
    screen.note(f"{what}; {time.monotonic() - begun:.0f} s")
    show(report, screen)
