"""The command line: ``ldm-export build | generate | verify | inspect``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from ldm_export import commands
from ldm_export.screen import Screen, printable
from ldm_runtime.errors import LdmError

PRECISIONS = ("fp32", "fp16", "bf16")
BACKENDS = ("onnxruntime", "tensorrt")
TARGETS = ("tensorrt-rtx", "tensorrt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 after an error told in one line on standard error; bad usage exits with 2."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger().setLevel(logging.DEBUG if args.verbose else logging.ERROR)
    logging.captureWarnings(True)
    try:
        return int(args.command(args, Screen(quiet=args.quiet)) or 0)
    except LdmError as error:
        return _told(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # its reader has gone, e.g. `| head`
        return 1
    except OSError as error:  # a path that was given: too long, not ours to read, on a disk that fails
        return _told(f"{error.filename or 'input or output'}: {error.strerror or error}; check the path and the disk")
    except KeyboardInterrupt:
        print("ldm-export: interrupted", file=sys.stderr)
        return 130


def _told(message: str) -> int:
    print(f"ldm-export: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; needs no package beyond the runtime's."""
    parser = argparse.ArgumentParser(prog="ldm-export", description="Latent diffusion models out of the notebook.")
    parser.add_argument("--version", action="version", version=f"ldm-export {version('ldm-export')}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _build(_verb(verbs, "build", "export a checkpoint into a bundle", commands.build))
    _generate(_verb(verbs, "generate", "make pictures from a bundle; needs no torch", commands.generate))
    _verify(_verb(verbs, "verify", "measure a bundle against its checkpoint", commands.verify))
    _inspect(_verb(verbs, "inspect", "show what is in a bundle", commands.inspect))
    return parser


def _verb(verbs: argparse._SubParsersAction, name: str, text: str, command: object) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    verb.set_defaults(command=command)
    verb.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    loudness = verb.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", action="store_true", help="no progress, no notes")
    loudness.add_argument("--verbose", action="store_true", help="log what is done, to standard error")
    return verb


def _build(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("checkpoint", nargs="?", type=Path, help="a diffusers folder; left out: the shipped shapes model")
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="folder to write")
    verb.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of weights and arithmetic")
    engines = verb.add_argument_group("engines")
    engines.add_argument("--target", choices=TARGETS, help="also build TensorRT engines")
    engines.add_argument(
        "--compute-capability", metavar="LIST", help="of the GPUs to build for, e.g. 8.6,8.9 (tensorrt-rtx)"
    )
    for name, unit in (("batch", "images"), ("height", "pixels"), ("width", "pixels")):
        engines.add_argument(f"--{name}", metavar="MIN:OPT:MAX", help=f"{unit} of one call that an engine takes")
    verb.add_argument(
        "--random-weights", action="store_true", help="draw the weights (configs are enough), to try sizes out"
    )


def _generate(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("bundle", type=Path)
    verb.add_argument("prompts", nargs="+", metavar="PROMPT")
    verb.add_argument("-o", "--output", type=Path, default=Path("out.png"), help="PNG to write (default out.png)")
    verb.add_argument("--each", action="store_true", help="beside a grid of several pictures, write each: out-0.png, …")
    verb.add_argument("--seed", type=int, help="the same seed gives the same pictures (default: a fresh one, told)")
    verb.add_argument("--steps", type=int, default=50, help="denoising steps (default 50)")
    verb.add_argument("--eta", type=float, default=0.3, help="noise of each step, 0 for none (default 0.3)")
    verb.add_argument("--guidance", type=float, default=6.0, help="guidance scale, 1 for none (default 6)")
    verb.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to steer away from")
    verb.add_argument("--width", type=int, help="pixels, a multiple of 8 (default: the model's)")
    verb.add_argument("--height", type=int, help="pixels, a multiple of 8 (default: the model's)")
    verb.add_argument(
        "--images-per-prompt", type=int, default=1, metavar="N", help="pictures of each prompt (default 1)"
    )
    verb.add_argument("--precision", choices=PRECISIONS, help="which graphs (default: what the bundle was built for)")
    verb.add_argument("--backend", choices=BACKENDS, default="onnxruntime", help="what runs it (default onnxruntime)")
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default auto)")
    verb.add_argument("--threads", type=int, help="CPU threads (default: all cores)")


def _verify(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("bundle", type=Path)
    verb.add_argument("--against", type=Path, metavar="CHECKPOINT", help="default: the shipped shapes model")
    verb.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line (default: four)")
    verb.add_argument("--steps", type=int, default=50, help="denoising steps of the pictures (default 50)")
    verb.add_argument("--precision", choices=PRECISIONS, help="which graphs (default: what the bundle was built for)")
    verb.add_argument("--tolerance", type=float, help="largest error of a component, of its own scale")
    verb.add_argument("--max-pixel", type=int, help="largest difference of a pixel, of 255 (default 1 for fp32)")
    verb.add_argument("--min-psnr", type=float, metavar="DB", help="least PSNR of a picture (default 45 for fp16)")
    verb.add_argument("--random-weights", action="store_true", help="the bundle was built with --random-weights")


def _inspect(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("bundle", type=Path)
    verb.add_argument("--check", action="store_true", help="check every file's digest too")


if __name__ == "__main__":
    sys.exit(main())
