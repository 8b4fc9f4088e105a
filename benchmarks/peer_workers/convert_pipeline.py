"""Exports a Stable Diffusion checkpoint as a pipeline of optimum in fp32, for ``onnxruntime`` or ``openvino``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=("onnxruntime", "openvino"))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path, help="the folder in which the pipeline's folder is written")
    args = parser.parse_args()
    target = args.output / f"pipeline-{args.engine}"
    if args.engine == "onnxruntime":
        from optimum.exporters.onnx import main_export

        main_export(str(args.checkpoint), target, task="text-to-image", library_name="diffusers", do_validation=False)
    else:
        from optimum.intel import OVStableDiffusionPipeline

        pipeline = OVStableDiffusionPipeline.from_pretrained(
            args.checkpoint, export=True, compile=False, load_in_8bit=False
        )
        pipeline.save_pretrained(target)


if __name__ == "__main__":
    sys.exit(main())
