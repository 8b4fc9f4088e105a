"""The sampler's step as a graph gives what ``Trajectory.step`` gives, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from ldm_export.graph.step_graph import export_step, step_specs
from ldm_runtime.device_loop import GUIDED_STEP, STEP
from ldm_runtime.device_run import coefficients
from ldm_runtime.errors import BuildError
from ldm_runtime.guidance import guide
from ldm_runtime.schedulers import scheduler_from_config
from ldm_runtime.specs import check_feed
from tests.support.numpy_model import SCHEDULERS, description

UNET = description().components["unet"]
IMAGES, STEPS = 3, 7
SHAPE = (IMAGES, 4, 6, 10)


class Step:
    """A step component on ONNX Runtime."""

    def __init__(self, folder: Path, slots: int, guided: bool):
        self.spec = step_specs(UNET, slots, branches=2)[GUIDED_STEP if guided else STEP]
        (graph,) = export_step(self.spec, folder / "step.onnx")
        self._session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

    def __call__(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        check_feed(self.spec, feed)
        names = [tensor.name for tensor in self.spec.outputs]
        return dict(zip(names, self._session.run(names, feed), strict=True))


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        *(("ddim", {"prediction_type": kind}) for kind in ("epsilon", "v_prediction", "sample")),
        *(
            (name, {})
            for name in (
                "pndm",
                "pndm_runge_kutta",
                "dpm",
                "dpm_sde",
                "dpm_3",
                "euler_ancestral",
                "lms",
                "heun",
                "unipc",
            )
        ),
    ],
)
@pytest.mark.parametrize("eta", [0.0, 0.3])
@pytest.mark.parametrize("guided", [False, True])
def test_each_step_is_that_of_the_trajectory(
    tmp_path: Path, scheduler: str, options: dict[str, Any], eta: float, guided: bool
) -> None:
    trajectory = scheduler_from_config(SCHEDULERS[scheduler] | options).trajectory(STEPS, eta)
    slots = trajectory.slots
    step, scale = Step(tmp_path, slots, guided), np.float32(6.0)
    numbers = coefficients(trajectory.rows, slots, 6.0)
    rng = np.random.default_rng(1)
    state = trajectory.start(rng.standard_normal(SHAPE).astype(np.float32))
    for index in range(len(trajectory)):
        predicted = rng.standard_normal((2 * IMAGES if guided else IMAGES, *SHAPE[1:])).astype(np.float32)
        noise = rng.standard_normal(SHAPE).astype(np.float32) if trajectory.needs_noise else None
        feed = {
            "sample": np.concatenate([state[0], state[0]]) if guided else state[0],
            "noise_pred": predicted,
            "noise": np.zeros(SHAPE, np.float32) if noise is None else noise,
            "coefficients": np.repeat(numbers[index : index + 1], IMAGES, 0),
        }
        if slots > 1:
            feed["history"] = np.concatenate(state[1:], axis=1)
        result = step(feed)
        output = guide(*np.split(predicted, 2), scale)[0] if guided else predicted
        state = trajectory.step(state, output, index, noise)
        for half in np.split(result["next_sample"], 2 if guided else 1):
            np.testing.assert_array_equal(half, state[0])
        if slots > 1:
            np.testing.assert_array_equal(result["next_history"], np.concatenate(state[1:], axis=1))


def test_images_of_one_batch_may_be_at_different_steps(tmp_path: Path) -> None:
    step = Step(tmp_path, 3, guided=True)
    rng = np.random.default_rng(2)
    latents, noise = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    predicted = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    history = rng.standard_normal((IMAGES, 8, *SHAPE[2:])).astype(np.float32)
    numbers = rng.standard_normal((IMAGES, 16)).astype(np.float32)

    def run(chosen: slice) -> dict[str, np.ndarray]:
        return step(
            {
                "sample": np.concatenate([latents[chosen], latents[chosen]]),
                "noise_pred": np.concatenate([predicted[0, chosen], predicted[1, chosen]]),
                "noise": noise[chosen],
                "coefficients": numbers[chosen],
                "history": history[chosen],
            }
        )

    together = run(slice(None))
    for i in range(IMAGES):
        result = run(slice(i, i + 1))
        np.testing.assert_array_equal(together["next_sample"][i], result["next_sample"][0])
        np.testing.assert_array_equal(together["next_history"][i], result["next_history"][0])


def test_the_steps_of_a_model_follow_its_branches() -> None:
    assert [list(step_specs(UNET, 2, branches)) for branches in (0, 1, 2)] == [[STEP], [STEP], [STEP, GUIDED_STEP]]
    assert all(spec.runs == "step" for spec in step_specs(UNET, 1, 2).values())
    with pytest.raises(BuildError, match="got 3 guidance branches"):
        step_specs(UNET, 1, 3)
