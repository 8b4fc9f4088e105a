"""Requests with LoRA adapters: in the batch scheduler, over HTTP and as Triton's input, and those that are refused."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm_export.cli import main
from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.http.served_model import ServedModel
from ldm_runtime.loras.graph_layers import graph_layers
from ldm_runtime.triton.request_tensors import parse_request
from tests.http.conftest import ENGINE, running
from tests.support.lora_bundle import BOTH, OPTIONS, PROMPT, SMALL, WHOLE, image


def test_requests_with_other_adapters_have_batches_of_their_own(pipe: LatentDiffusionPipeline) -> None:
    selections: list[dict[str, float] | None] = [None, {WHOLE: 0.7}, BOTH, {SMALL: 1.5}, {WHOLE: 0.7}]
    expected = [image(pipe, loras=loras) for loras in selections]
    with BatchScheduler(pipe) as scheduler:
        jobs = [scheduler.submit(Request(PROMPT, **OPTIONS, loras=loras)) for loras in selections * 2]
        results = [np.asarray(job.result().images[0], np.int64) for job in jobs]
    for ours, theirs in zip(results, expected * 2, strict=True):
        assert np.abs(ours - theirs).max() <= 1


def test_the_images_api(bundle: Bundle) -> None:
    fields = {"steps": 2, "seed": 5, "size": "16x16", "response_format": "url"}
    model = ServedModel.open(bundle.folder, "sd", ENGINE)
    try:
        expected = image(model.pipeline, guidance_scale=None, num_inference_steps=2, loras={SMALL: 2})
        with running({"sd": model}) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            answer = client.images.generate(prompt=PROMPT, extra_body={**fields, "loras": {SMALL: 2}})
            assert answer.data is not None and answer.data[0].url is not None
            received = Image.open(io.BytesIO(client._client.get(answer.data[0].url).content))
            assert np.abs(np.asarray(received, np.int64) - expected).max() <= 1
            with pytest.raises(openai.BadRequestError, match="loras: got 'other', expected one of small"):
                client.images.generate(prompt=PROMPT, extra_body={**fields, "loras": {"other": 1}})
    finally:
        model.close()


def test_tritons_input() -> None:
    tensors = {"PROMPT": np.array([b"a"], object), "LORAS": np.array([b'{"whole": 0.7}'], object)}
    assert parse_request(tensors).request.loras == {WHOLE: 0.7}
    with pytest.raises(SpecError, match=r"LORAS: got .\{whole., expected a JSON object"):
        parse_request({**tensors, "LORAS": np.array([b"{whole"], object)})


def test_int8_graphs_are_refused(calibrated: Bundle, tmp_path: Path) -> None:
    folder, file = Path(shutil.copytree(calibrated.folder, tmp_path / "bundle")), tmp_path / "one.safetensors"
    layer = graph_layers(calibrated.graph("unet", "fp32"))[0]
    (rows, *columns), key = layer.shape, f"unet.{layer.module}.lora"
    save_file({f"{key}_A.weight": torch.ones(1, *columns), f"{key}_B.weight": torch.ones(rows, 1, 1, 1)}, file)
    assert main(["add-lora", str(folder), f"one={file}"]) == 0
    with (
        LatentDiffusionPipeline.from_bundle(folder, backend="onnxruntime") as pipe,
        pytest.raises(
            SpecError, match="loras: the weights of int8 graphs cannot be changed; use onnxruntime or openvino"
        ),
    ):
        pipe.plan(Request(PROMPT, loras={"one": 1.0}))
    with LatentDiffusionPipeline.from_bundle(folder, backend="onnxruntime", precision="fp32") as pipe:
        assert pipe.plan(Request(PROMPT, loras={"one": 1.0})).loras == (("one", 1.0),)


def test_wrong_fields_and_other_pipelines_are_refused(bundle: Bundle, pipe: LatentDiffusionPipeline) -> None:
    for wrong in (["whole"], {WHOLE: "much"}, {WHOLE: float("nan")}, {1: 1.0}, "whole", {WHOLE: True}):
        with pytest.raises(SpecError, match="loras: "):
            pipe.plan(Request(PROMPT, **OPTIONS, loras=wrong))  # type: ignore[arg-type]
    alone = LatentDiffusionPipeline(bundle.manifest.model, pipe.backends, bundle.file)
    with pytest.raises(SpecError, match="components of this pipeline run elsewhere or were given to it"):
        alone.plan(Request(PROMPT, **OPTIONS, loras={WHOLE: 1.0}))
