"""The command line: ``ldm-export VERB …``, the verbs being those of ``VERBS``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import ModuleType

from ldm_export.screen import Screen, printable
from ldm_export.verbs import bench, build, calibrate, client, convert, generate, inspect, report, triton, verify
from ldm_runtime.errors import LdmError, interrupted

VERBS = (build, convert, calibrate, generate, verify, report, inspect, bench, triton, client)
"""Modules of one verb each: its name, its help in the first docstring line, ``add_arguments`` and ``run``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 after an error told in one line on standard error; bad usage exits with 2."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger().setLevel(logging.DEBUG if args.verbose else logging.ERROR)
    logging.captureWarnings(True)
    try:
        return int(args.command(args, Screen(quiet=args.quiet)) or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # its reader has gone, e.g. `| head`
        return 1
    except OSError as error:  # a path that was given: too long, not ours to read, on a disk that fails
        return _told(f"{error.filename or 'input or output'}: {error.strerror or error}; check the path and the disk")
    except (KeyboardInterrupt, ImportError, LdmError) as error:
        if interrupted(error):  # or what a package that was loading made of it, and what we said of that
            print("ldm-export: interrupted", file=sys.stderr)
            return 130
        if isinstance(error, LdmError):
            return _told(str(error))
        raise


def _told(message: str) -> int:
    print(f"ldm-export: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; needs no package beyond the runtime's."""
    parser = argparse.ArgumentParser(prog="ldm-export", description="Latent diffusion models out of the notebook.")
    parser.add_argument("--version", action="version", version=f"ldm-export {version('ldm-export')}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for module in VERBS:
        _add(verbs, module)
    return parser


def _add(verbs: argparse._SubParsersAction, module: ModuleType) -> None:  # type: ignore[type-arg]
    name, text = module.__name__.rpartition(".")[2], (module.__doc__ or "").partition(": ")[2].rstrip(".\n")
    verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    verb.set_defaults(command=module.run)
    module.add_arguments(verb)
    verb.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    loudness = verb.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", action="store_true", help="no progress, no notes")
    loudness.add_argument("--verbose", action="store_true", help="log what is done, to standard error")


if __name__ == "__main__":
    sys.exit(main())
