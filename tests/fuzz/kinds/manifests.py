"""Manifests of bundles: opened, described, opened as a pipeline, and a request planned, without any engine."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from ldm_export.bundle.inspection import inspect_bundle
from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import MANIFEST
from ldm_runtime.manifest_reader import read_manifest
from tests.fuzz.mutation import changed_bytes, changed_document
from tests.fuzz.outcome import Attempt
from tests.support.small_bundle import write_small_bundle
from tests.support.small_models import bundle_of, text_model

__all__ = ["prepare"]


def prepare(folder: Path) -> Attempt:
    """Write a conditioned and an unconditional bundle; an input is one of their manifests, changed."""
    folders = [folder / "text", folder / "unconditional"]
    bundle_of(text_model(folder / "model"), folders[0], ("unet",))
    write_small_bundle(folders[1])
    texts = [(one / MANIFEST).read_bytes() for one in folders]
    documents = [json.loads(text) for text in texts]

    def attempt(random: Random) -> None:
        which = random.randrange(2)
        content = (
            changed_bytes(random, texts[which])
            if random.random() < 0.2
            else json.dumps(changed_document(random, documents[which])).encode()
        )
        (folders[which] / MANIFEST).write_bytes(content)
        bundle = Bundle.open(folders[which])
        rewritten = folder / "rewritten"
        rewritten.mkdir(exist_ok=True)
        (rewritten / MANIFEST).write_text(bundle.manifest.to_json(), encoding="utf-8")
        assert read_manifest(rewritten) == bundle.manifest
        inspect_bundle(bundle)
        with LatentDiffusionPipeline.from_bundle(bundle, backend="onnxruntime", threads=1) as pipeline:
            request = Request("a red circle") if bundle.manifest.conditioning else Request(count=1)
            pipeline.plan(request)

    return attempt
