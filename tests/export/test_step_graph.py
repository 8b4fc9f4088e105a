"""The DDIM step as a graph gives what the NumPy loop gives, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ldm_export.graph.components import ModelShape
from ldm_export.graph.step_graph import export_step, step_spec
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_runtime.ddim import DDIM

UNET = ModelShape(tokens=7, context_width=8, latent_channels=4, latent_size=8).specs()["unet"]
IMAGES, STEPS = 3, 7


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.3])
@pytest.mark.parametrize("guided", [False, True])
def test_each_step_is_the_numpy_loops(tmp_path: Path, prediction: str, eta: float, guided: bool) -> None:
    spec = step_spec(UNET, guided)
    (graph,) = export_step(spec, tmp_path / "step.onnx")
    backend = OnnxRuntimeBackend(graph, spec, "cpu", 1)
    schedule = DDIM(clip_sample=False, prediction_type=prediction).schedule(STEPS, eta)
    rng = np.random.default_rng(1)
    shape = (IMAGES, 4, 6, 10)
    latents = rng.standard_normal(shape).astype(np.float32)
    scale = np.float32(6.0)
    for index, row in enumerate(schedule.rows):
        predicted = rng.standard_normal((2 * IMAGES if guided else IMAGES, *shape[1:])).astype(np.float32)
        noise = rng.standard_normal(shape).astype(np.float32)
        unguided, prompted = np.split(predicted, 2) if guided else (predicted, predicted)
        expected = schedule.step(
            latents, unguided + scale * (prompted - unguided) if guided else predicted, index, noise if eta else None
        )
        feed = {
            "sample": np.concatenate([latents, latents]) if guided else latents,
            "noise_pred": predicted,
            "noise": noise,
            "coefficients": np.tile(np.append(row, scale).astype(np.float32), (IMAGES, 1)),
        }
        found = backend.run(feed)["next_sample"]
        halves = np.split(found, 2) if guided else [found]
        for half in halves:
            np.testing.assert_array_equal(half, expected)
        latents = expected


def test_samples_of_one_batch_may_be_at_different_steps(tmp_path: Path) -> None:
    spec = step_spec(UNET, True)
    (graph,) = export_step(spec, tmp_path / "step.onnx")
    rng = np.random.default_rng(2)
    images = [rng.standard_normal((1, 4, 8, 8)).astype(np.float32) for _ in range(IMAGES)]
    predicted = [rng.standard_normal((2, 4, 8, 8)).astype(np.float32) for _ in range(IMAGES)]
    noise = rng.standard_normal((IMAGES, 4, 8, 8)).astype(np.float32)
    coefficients = rng.standard_normal((IMAGES, 4)).astype(np.float32)
    backend = OnnxRuntimeBackend(graph, spec, "cpu", 1)
    alone = [
        backend.run(
            {
                "sample": np.concatenate([images[i], images[i]]),
                "noise_pred": predicted[i],
                "noise": noise[i : i + 1],
                "coefficients": coefficients[i : i + 1],
            }
        )["next_sample"][:1]
        for i in range(IMAGES)
    ]
    together = backend.run(
        {
            "sample": np.concatenate([*images, *images]),
            "noise_pred": np.concatenate([p[:1] for p in predicted] + [p[1:] for p in predicted]),
            "noise": noise,
            "coefficients": coefficients,
        }
    )["next_sample"]
    np.testing.assert_array_equal(together[:IMAGES], np.concatenate(alone))
