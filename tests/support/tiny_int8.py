"""A tiny bundle's calibration: how it is asked for, and what it came to."""

from __future__ import annotations

from ldm_runtime.ddim import DDIM

from ldm_calibration.record import ComponentRecord, read_record
from ldm_calibration.settings import Settings
from ldm_calibration.trajectories import Model
from ldm_export.bundle.int8_stages import RECORD
from ldm_runtime.bundle import Bundle
from ldm_runtime.manifest import COMPONENTS

PROMPTS = ("a red circle", "a blue square")
SETTINGS = Settings(PROMPTS, PROMPTS, steps=3, samples=2, trial_steps=3, sensitivity="results", min_psnr=15.0)


def part(bundle: Bundle, name: str) -> ComponentRecord:
    return read_record(bundle.file(RECORD)).components[name]


def model_of(bundle: Bundle) -> Model:
    manifest = bundle.manifest
    graphs = {name: bundle.graph(name, "fp32") for name in COMPONENTS}
    specs = {name: manifest.components[name].spec for name in COMPONENTS}
    return Model(graphs, specs, bundle.file(manifest.tokenizer), DDIM.from_config(manifest.scheduler))
