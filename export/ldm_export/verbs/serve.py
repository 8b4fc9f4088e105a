"""``ldm-export serve``: serve bundles over HTTP with OpenAI's images API and a web page, without torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_export.extras import needs
from ldm_export.screen import Screen
from ldm_export.verbs.lora_option import add_lora_selections
from ldm_export.verbs.options import PRECISIONS, byte_count, real_number, whole_number
from ldm_runtime.backends.registry import BACKEND_NAMES
from ldm_runtime.errors import SpecError
from ldm_runtime.regular_files import read_regular

__all__ = ["add_arguments", "run"]

MAX_KEY_FILE = 4096
"""Maximum size of a key file in bytes."""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    verb.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="the first is the default model")
    verb.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    verb.add_argument("--port", type=whole_number, default=8000, help="port, 0 for a free one (default 8000)")
    verb.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with the key that requests must contain")
    verb.add_argument(
        "--watch",
        type=real_number,
        default=5.0,
        metavar="SECONDS",
        help="time between two checks for new versions of the bundles, 0 for no checks (default 5)",
    )
    engine = verb.add_argument_group("engine")
    engine.add_argument("--backend", choices=BACKEND_NAMES, default="auto", help="engine (default auto)")
    engine.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to run on (default auto)"
    )
    engine.add_argument("--precision", choices=PRECISIONS, help="precision of the graphs (default: the bundle's)")
    engine.add_argument("--threads", type=whole_number, help="CPU threads of each model (default: all cores)")
    engine.add_argument(
        "--no-safety-checker", action="store_true", help="do not check images with the bundles' safety checkers"
    )
    limits = verb.add_argument_group("limits")
    limits.add_argument(
        "--memory",
        type=byte_count,
        metavar="SIZE",
        help="maximum estimated memory of the loaded bundles, e.g. 8GB; with it, bundles are loaded on first use "
        "(default: no limit, all are loaded at the start)",
    )
    add_lora_selections(limits)
    limits.add_argument("--max-rows", type=whole_number, help="maximum rows of one UNet call; a guided image takes two")
    limits.add_argument(
        "--max-queue", type=whole_number, default=256, help="maximum number of waiting requests (default 256)"
    )
    limits.add_argument(
        "--max-images", type=whole_number, default=10, help="maximum number of images per request (default 10)"
    )
    limits.add_argument(
        "--max-pixels",
        type=whole_number,
        default=2**23,
        help="maximum pixels of all images of a request (default 8388608)",
    )
    limits.add_argument(
        "--max-client-requests",
        type=whole_number,
        default=16,
        help="maximum simultaneous requests of one client address (default 16)",
    )
    limits.add_argument(
        "--timeout", type=real_number, default=300.0, metavar="SECONDS", help="time limit of a request (default 300)"
    )
    limits.add_argument(
        "--grace",
        type=real_number,
        default=30.0,
        metavar="SECONDS",
        help="time that running requests have to end when the server stops (default 30)",
    )


def run(args: argparse.Namespace, screen: Screen) -> None:
    """Run the command."""
    with needs("serve"):
        from ldm_runtime.http.served_model import ModelOptions
        from ldm_runtime.http.served_models import ServedModels
        from ldm_runtime.http.server import serve
        from ldm_runtime.http.server_options import ServerOptions
        from ldm_runtime.loras.sets import lora_selections
        from ldm_runtime.pipeline_options import BundleOptions
    options = ServerOptions(
        host=args.host,
        port=args.port,
        api_key=None if args.api_key_file is None else _key(args.api_key_file),
        max_images=args.max_images,
        max_pixels=args.max_pixels,
        max_client_requests=args.max_client_requests,
        timeout=args.timeout,
        grace=args.grace,
        watch=args.watch,
    )
    bundle_options: BundleOptions = {
        "precision": args.precision,
        "backend": args.backend,
        "device": args.device,
        "threads": args.threads,
        "safety_checker": not args.no_safety_checker,
        "lora_selections": lora_selections(args.lora_selections, "lora-selections"),
    }
    model_options = ModelOptions(bundle_options, args.max_rows, args.max_queue)
    with screen.bar("loading"):
        models = ServedModels.open(args.bundles, model_options, args.memory, options.timeout)
    for bundle in models.bundles.values():
        if bundle.current is not None and bundle.current.pipeline.choice is not None:
            screen.note(f"{bundle.name}: {bundle.current.pipeline.choice.reason}")
    serve(
        models,
        options,
        log=lambda line: print(line, flush=True),
        on_ready=lambda url: screen.note(f"open {url} in a browser; Control-C stops the server"),
        note=screen.note,
    )


def _key(file: Path) -> str:
    data = read_regular(file, MAX_KEY_FILE, SpecError)
    try:
        return data.decode().strip()
    except UnicodeDecodeError:
        raise SpecError(f"{file}: expected a key in ASCII; create one with `openssl rand -hex 24`") from None
