"""``ldm-export triton``: write a Triton model repository that serves a bundle; needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_export.screen import Screen
from ldm_export.serving.config import TARGETS, Serving
from ldm_export.serving.models import MODELS, make_model
from ldm_export.serving.repository import write_models
from ldm_export.verbs.options import PRECISIONS
from ldm_runtime.backends.selection import BACKENDS
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.signature import check_signature
from ldm_runtime.triton.parameters import IN_PROCESS, PER_STEP, Settings


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """The verb's options."""
    verb.add_argument("bundle", type=Path)
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="REPOSITORY", help="folder to write")
    verb.add_argument(
        "--target",
        choices=TARGETS,
        default="python",
        help="what runs text_encoder, unet and decoder: our runtime in Triton's python backend (default), or Triton's "
        "own backend for ONNX graphs or TensorRT plans; ldm and ldm_stream always run in the python backend",
    )
    verb.add_argument("--backend", choices=BACKENDS, default="auto", help="of our runtime (default auto, the fastest)")
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default auto)")
    verb.add_argument("--precision", choices=PRECISIONS, help="which graphs (default: what the bundle was built for)")
    verb.add_argument("--threads", type=int, help="CPU threads of each model (default: all cores)")
    verb.add_argument("--rows", type=int, default=32, help="of one UNet call; a guided image takes two (default 32)")
    verb.add_argument("--queue", type=int, default=256, help="requests that may wait (default 256)")
    verb.add_argument(
        "--only", nargs="+", choices=MODELS, metavar="MODEL", help=f"write these alone (default: {', '.join(MODELS)})"
    )
    verb.add_argument(
        "--per-step",
        action="store_true",
        help="have ldm_stream call the model unet at each step, so that it is loaded once; slower, see docs/serving.md",
    )


def run(args: argparse.Namespace, screen: Screen) -> None:
    """``ldm-export triton``."""
    bundle = Bundle.open(args.bundle)
    check_signature(bundle.manifest.components)
    wanted = set(args.only or MODELS)
    wanted |= {"ldm_stream"} if "ldm" in wanted else set()
    wanted |= {"unet"} if args.per_step and "ldm_stream" in wanted else set()
    names = [name for name in MODELS if name in wanted]
    serving = _serving(args, bundle)
    with screen.bar("checking", len(bundle.manifest.files)) as bar:
        done = iter(range(len(bundle.manifest.files)))
        bundle.check(lambda name: bar.to(next(done), len(bundle.manifest.files), f"checking {name}"))
    models = [make_model(bundle, serving, name) for name in names]
    with screen.bar("writing"):
        version = write_models(args.output.resolve(), models)
    if args.json:
        screen.json({"repository": str(args.output), "version": version, "models": names})
        return
    screen.note(f"serve it with: tritonserver --model-repository={args.output.resolve()}")
    screen.result(f"{args.output}: version {version} of {', '.join(names)}")


def _serving(args: argparse.Namespace, bundle: Bundle) -> Serving:
    if args.threads is not None and args.threads < 1:
        raise SpecError(f"threads: got {args.threads}, expected 1 or more; leave it out for all cores")
    most = min(tensor.bounds("max")[0] for tensor in bundle.manifest.components["unet"].spec.inputs)
    if not 1 <= args.rows <= most:
        raise SpecError(f"rows: got {args.rows}, expected 1..{most}, what this bundle's UNet takes")
    if args.queue < 1:
        raise SpecError(f"queue: got {args.queue}, expected 1 or more")
    if args.target != "python" and args.precision is None:
        args.precision = bundle.precision
    backend = args.backend if args.target == "python" or args.backend != "auto" else args.target
    fixed = backend == "tensorrt"
    settings = Settings(
        precision=args.precision or "",
        backend=backend,
        device=args.device,
        threads="" if args.threads is None else str(args.threads),
        rows=str(args.rows),
        call_rows=" ".join(map(str, call_rows(args.rows))) if fixed else "",
        queue=str(args.queue),
        unet=PER_STEP if args.per_step else IN_PROCESS,
    )
    return Serving(args.target, args.device == "cuda" or args.target == "tensorrt" or fixed, settings)


def call_rows(most: int) -> list[int]:
    """Row counts of UNet calls for engines that keep a CUDA graph for each: at most a third of a call is padding.

    1, 2, 3, 4, 6, 8, 12, 16, 24, … up to ``most``.
    """
    sizes = {1, most} | {size for n in range(most.bit_length()) for size in (2**n, 3 * 2**n) if size < most}
    return sorted(sizes)
