"""Quantizes a UNet with NNCF's post-training quantization. ``quantizers.py`` runs it in NNCF's environment."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nncf
import numpy as np
import openvino


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("graph", type=Path, help="the fp32 ONNX graph")
    parser.add_argument("samples", type=Path, help="folder of .npz files, one feed each")
    parser.add_argument("output", type=Path, help="the .xml to write")
    parser.add_argument("--transformer", action="store_true", help="model type transformer: SmoothQuant, mixed preset")
    parser.add_argument("--leave", type=Path, help="a JSON list of [node, its result] to leave in float")
    args = parser.parse_args()
    feeds = [dict(np.load(file)) for file in sorted(args.samples.glob("*.npz"))]
    model = openvino.Core().read_model(args.graph)
    scope = None
    if args.leave:
        kinds = ("Convolution", "GroupConvolution", "MatMul")
        layers = [one.get_friendly_name() for one in model.get_ops() if one.get_type_name() in kinds]
        names = []
        for layer in json.loads(args.leave.read_text()):  # by the name of the node or of its result
            matches = [name for name in layers if name.removesuffix("/WithoutBiases") in layer]
            if not matches:
                parser.error(f"{args.graph} has no matrix work {layer[0]!r}")
            names += matches
        scope = nncf.IgnoredScope(names=names)
    quantized = nncf.quantize(
        model,
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        model_type=nncf.ModelType.TRANSFORMER if args.transformer else None,
        ignored_scope=scope,
    )
    openvino.save_model(quantized, args.output, compress_to_fp16=False)


if __name__ == "__main__":
    main()
