"""The command line: ``ldm-export VERB …``; ``VERBS`` lists the verbs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType

from ldm_export.screen import Screen, printable, warnings_on
from ldm_export.verbs import (
    add_lora,
    bench,
    build,
    calibrate,
    client,
    convert,
    doctor,
    generate,
    inspect,
    report,
    serve,
    triton,
    verify,
)
from ldm_runtime.errors import LdmError, interrupted

__all__ = ["VERBS", "main", "make_parser", "verb_name"]

VERBS = (build, convert, calibrate, add_lora, generate, verify, report, inspect, bench, serve, triton, client, doctor)
"""One module for each verb: its name, its help text (first docstring line), ``add_arguments`` and ``run``."""


EXAMPLES = """examples:
  ldm-export build path/to/checkpoint -o bundle      export a checkpoint
  ldm-export verify bundle --against path/to/checkpoint
  ldm-export generate bundle "a red circle" --seed 42 -o image.png
  ldm-export serve bundle                            a web page and OpenAI's images API
  ldm-export VERB --help                             the options of a verb
"""
KEEP_WORK = (build.run, calibrate.run, inspect.run)
"""Commands that do not remove the work folder of a killed build: two continue the build, and one reports it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Return 0, or 1 after an error, which is printed as one line. Bad usage exits with 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal without UTF-8 shows other characters as \u escapes
            stream.reconfigure(errors="backslashreplace")
    parser = make_parser()
    args = _parse(parser, arguments)
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger().setLevel(logging.DEBUG if args.verbose else logging.ERROR)
    logging.captureWarnings(True)
    screen = Screen(quiet=args.quiet)
    try:
        with warnings_on(screen, shown=not args.verbose):
            if args.command not in KEEP_WORK:
                for bundle in _bundles(args):
                    _remove_abandoned(bundle, screen)
            return int(args.command(args, screen) or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has closed the pipe, e.g. `| head`
        return 1
    except OSError as error:  # a path from the user: too long, not readable, or on a failing disk
        return _print_error(
            f"{error.filename or 'input or output'}: {error.strerror or error}; check the path and the disk"
        )
    except (KeyboardInterrupt, ImportError, LdmError) as error:
        if interrupted(error):  # also if a package that was being imported turned it into another exception
            print("ldm-export: interrupted", file=sys.stderr)
            return 130
        if isinstance(error, LdmError):
            return _print_error(str(error))
        raise


def _bundles(args: argparse.Namespace) -> list[Path]:
    """Return the bundles that a command names."""
    one: Path | None = getattr(args, "bundle", None)
    several: list[Path] = getattr(args, "bundles", [])
    return several if one is None else [one]


def _remove_abandoned(bundle: Path, screen: Screen) -> None:
    from ldm_export.bundle.abandoned import remove_abandoned

    if (work := remove_abandoned(bundle)) is not None:
        screen.note(f"removed {work}, which a build that was killed had left")


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments; prompts may also follow the options, which argparse does not allow for optional positionals."""
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        parser.exit(0)
    args, extra = parser.parse_known_args(arguments)
    if extra and (
        not isinstance(getattr(args, "prompts", None), list) or any(argument.startswith("-") for argument in extra)
    ):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:
        args.prompts = [*args.prompts, *extra]
    return args


def _print_error(message: str) -> int:
    print(f"ldm-export: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 1


def make_parser() -> argparse.ArgumentParser:
    """Create the parser of all verbs. It imports only packages of the runtime."""
    parser = argparse.ArgumentParser(
        prog="ldm-export",
        description="Export latent diffusion models to ONNX and TensorRT, and run them without torch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ldm-export {version('ldm-export')}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for module in VERBS:
        _add(verbs, module)
    return parser


def verb_name(module: ModuleType) -> str:
    """The name on the command line of a module of ``VERBS``, e.g. "add-lora"."""
    return module.__name__.rpartition(".")[2].replace("_", "-")


def _add(verbs: argparse._SubParsersAction, module: ModuleType) -> None:  # type: ignore[type-arg]
    name = verb_name(module)
    text = (module.__doc__ or "").partition(": ")[2].rstrip(".\n")
    verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    verb.set_defaults(command=module.run)
    module.add_arguments(verb)
    verb.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    loudness = verb.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", action="store_true", help="print neither progress nor notes")
    loudness.add_argument("--verbose", action="store_true", help="write a log to standard error")


if __name__ == "__main__":
    sys.exit(main())
