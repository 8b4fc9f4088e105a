"""``ldm-export triton``: write a Triton model repository that serves a bundle, without torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ldm_export.screen import Screen
from ldm_export.serving.config import TARGETS, Serving
from ldm_export.serving.models import STREAM, UNARY, make_model, model_names
from ldm_export.serving.repository import write_models
from ldm_export.verbs.lora_option import add_lora_selections
from ldm_export.verbs.options import PRECISIONS, whole_number
from ldm_runtime.backends.registry import BACKEND_NAMES
from ldm_runtime.batching.limits import MAX_COUNT, rows_of_call
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.loras.sets import lora_selections
from ldm_runtime.model import DENOISERS, UNET
from ldm_runtime.number_checks import integer, threads
from ldm_runtime.triton.parameters import IN_PROCESS, PER_STEP, ModelParameters

__all__ = ["add_arguments", "row_buckets", "run"]


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    verb.add_argument("bundle", type=Path)
    verb.add_argument(
        "-o", "--output", type=Path, required=True, metavar="REPOSITORY", help="model repository to write"
    )
    verb.add_argument(
        "--target",
        choices=TARGETS,
        default="python",
        help="backend of the models of single components: this runtime in Triton's Python backend (default), or "
        "Triton's own backend for ONNX graphs or TensorRT plans; ldm and ldm_stream always run in the Python backend",
    )
    verb.add_argument("--backend", choices=BACKEND_NAMES, default="auto", help="engine of this runtime (default auto)")
    verb.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to run on (default auto)"
    )
    verb.add_argument("--precision", choices=PRECISIONS, help="precision of the graphs (default: the bundle's)")
    verb.add_argument("--threads", type=whole_number, help="CPU threads of each model (default: all cores)")
    verb.add_argument(
        "--max-rows",
        type=whole_number,
        help="maximum rows of one UNet call; a guided image takes two (default 32, or what the UNet takes)",
    )
    verb.add_argument(
        "--max-queue", type=whole_number, default=256, help="maximum number of waiting requests (default 256)"
    )
    add_lora_selections(verb)
    verb.add_argument(
        "--only",
        nargs="+",
        metavar="MODEL",
        help=f"write these models only: components, {STREAM}, {UNARY} (default all)",
    )
    verb.add_argument(
        "--per-step",
        action="store_true",
        help="have ldm_stream call the model unet at each step, so that it is loaded once; slower, see "
        "docs/guides/triton.md",
    )


def run(args: argparse.Namespace, screen: Screen) -> None:
    """Run the command."""
    bundle = Bundle.open(args.bundle)
    names = _selected(model_names(bundle), args.only, args.per_step)
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


def _selected(known: Sequence[str], only: Sequence[str] | None, per_step: bool) -> list[str]:
    """Names of the models to write, including those that they call."""
    selected = set(only or known)
    if unknown := sorted(selected - set(known)):
        raise SpecError(f"only: got {unknown[0]!r:.60}, expected one or more of {', '.join(known)}")
    selected |= {STREAM} if UNARY in selected else set()
    selected |= set(DENOISERS) & set(known) if per_step and STREAM in selected else set()
    return [name for name in known if name in selected]


def _serving(args: argparse.Namespace, bundle: Bundle) -> Serving:
    threads(args.threads)
    max_rows = rows_of_call(bundle.manifest.components[UNET].spec, args.max_rows, "this bundle's UNet")
    integer("max-queue", args.max_queue, 1, MAX_COUNT)
    precision = bundle.precision if args.target != "python" and args.precision is None else args.precision
    backend = args.backend if args.target == "python" or args.backend != "auto" else args.target
    fixed = backend == "tensorrt"
    parameters = ModelParameters(
        precision=precision or "",
        backend=backend,
        device=args.device,
        threads="" if args.threads is None else str(args.threads),
        max_rows=str(max_rows),
        row_buckets=" ".join(map(str, row_buckets(max_rows))) if fixed else "",
        max_queue=str(args.max_queue),
        lora_selections=str(lora_selections(args.lora_selections, "lora-selections")),
        unet=PER_STEP if args.per_step else IN_PROCESS,
    )
    return Serving(args.target, args.device == "cuda" or args.target == "tensorrt" or fixed, parameters)


def row_buckets(max_rows: int) -> list[int]:
    """Row counts of UNet calls for engines with a CUDA graph for each; at most a third of a call is padding.

    1, 2, 3, 4, 6, 8, 12, 16, 24, … up to ``max_rows``.
    """
    sizes = {1, max_rows}
    sizes |= {size for n in range(max_rows.bit_length()) for size in (2**n, 3 * 2**n) if size < max_rows}
    return sorted(sizes)
