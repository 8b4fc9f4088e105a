"""The calibration of the tiny bundle: its settings, its model, and its record."""

from __future__ import annotations

from ldm_calibration.model import CalibrationModel
from ldm_calibration.record import ComponentRecord, read_record
from ldm_calibration.settings import CalibrationSettings
from ldm_runtime.backends.engine import pipeline_components
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import CALIBRATION_RECORD

REQUESTS = ({"prompts": "a red circle"}, {"prompts": "a blue square"})
SETTINGS = CalibrationSettings(
    REQUESTS,
    REQUESTS,
    steps=3,
    samples=2,
    trial_steps=3,
    sensitivity="results",
    eta=0.3,
    guidance_scale=6.0,
    min_psnr=15.0,
)
LATENTS_SETTINGS = CalibrationSettings(
    REQUESTS[:1], REQUESTS[1:], steps=4, samples=2, trial_steps=4, eta=0.3, guidance_scale=6.0, min_psnr=20.0
)
"""Settings that measure the sensitivity of each layer in the final latents."""
QUANTIZED = ("unet", "decoder", "text_encoder")


def part(bundle: Bundle, name: str) -> ComponentRecord:
    """What the record of a bundle says of a component."""
    return read_record(bundle.file(CALIBRATION_RECORD)).components[name]


def model_of(bundle: Bundle) -> CalibrationModel:
    """The fp32 model of a bundle."""
    model = bundle.manifest.model
    graphs = {name: bundle.graph(name, "fp32") for name in pipeline_components(model)}
    return CalibrationModel(model, graphs, bundle.file)
