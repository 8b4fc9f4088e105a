"""Requests with a budget: they take a measured setting of the loaded precision, over both endpoints and in streams."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from ldm_runtime.bundle import Bundle
from ldm_runtime.quality import QualityResult
from tests.http.conftest import Served, open_models, running
from tests.http.test_openai_client import client_of, picture, png
from tests.support.measured import CLOSE, FAR, record_of
from tests.support.paper_bundles import paper_bundle
from tests.support.shared import SharedFolders

REFERENCE = record_of(10).reference
MEASURE = "`ldm-export bench BUNDLE --quality --save`"


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with client_of(served) as opened:
        yield opened


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ({"budget": 15}, FAR),
        ({"budget": 30}, CLOSE),
        ({"budget": 45.5}, REFERENCE),
        ({"budget": 30, "steps": "auto"}, CLOSE),
    ],
)
def test_the_image_is_that_of_the_setting(
    client: openai.OpenAI, served: Served, asked: dict[str, Any], taken: QualityResult
) -> None:
    answer = client.images.generate(model="text", prompt="a circle", extra_body={**asked, "seed": 5})
    assert answer.model_dump()["setting"] == taken.facts() and answer.data
    pipeline = served.models["text"].pipeline
    expected = np.asarray(pipeline("a circle", seed=5, **taken.setting.options).images[0]).astype(int)
    assert np.abs(picture(answer.data[0].b64_json or "") - expected).max() <= 1


def test_the_models_tell_the_settings_of_the_loaded_precision(served: Served) -> None:
    facts = {name: model.facts()["ldm"]["measured"] for name, model in served.models.items()}
    assert facts == {"text": [one.facts() for one in (REFERENCE, CLOSE, FAR)], "plain": []}


def test_a_stream_tells_the_setting_with_the_image(client: openai.OpenAI) -> None:
    body = {"budget": 15, "progress": True}
    events = [one.model_dump() for one in client.images.generate(prompt="a circle", stream=True, extra_body=body)]
    assert [one["type"] for one in events] == ["progress"] * 5 + ["image_generation.completed"]
    assert events[-1]["setting"] == FAR.facts()


REFUSED = {
    "nothing measured": ("plain", {"budget": 30}, "budget", f"has no measured settings; measure them with {MEASURE}"),
    "auto": ("plain", {"steps": "auto"}, "steps", f"has no measured settings; measure them with {MEASURE}"),
    "steps": ("text", {"budget": 30, "steps": 5}, "budget", "got 30 dB and steps too, but a measured setting decides"),
    "a text": ("text", {"budget": "30 dB"}, "budget", "got '30 dB', expected a finite number"),
    "not graded": ("text", {"steps": "auto"}, "steps", "got auto without a budget, but no grader decides"),
    "a word": ("text", {"steps": "few"}, "steps", "got 'few', expected 1..1000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(client: openai.OpenAI, case: str) -> None:
    model, body, param, message = REFUSED[case]
    prompt = "a circle" if model == "text" else ""
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(model=model, prompt=prompt, extra_body=body)
    assert refused.value.param == param and message in refused.value.message


def test_edits_take_a_budget_too(shared: SharedFolders, tmp_path: Path) -> None:
    folder = shutil.copytree(paper_bundle(shared, "inpainting_big").bundle.folder, tmp_path / "inpainting")
    Bundle.open(folder).with_quality(record_of(50))
    models = open_models([folder])
    height, width = (models["inpainting"].facts()["ldm"][side][1] for side in ("height", "width"))
    black, mask = (Image.new("RGB", (width, height)) for _ in range(2))
    mask.paste("white", (0, 0, width // 2, height))
    body = {"seed": 3, "budget": 15}
    try:
        with running(models) as server, client_of(server) as client:
            one, other = (
                client.images.edit(
                    image=("a.png", png(black)), mask=("m.png", png(mask)), prompt="", extra_body=body | more
                )
                for more in ({}, {"steps": "auto"})
            )
            assert one.model_dump()["setting"] == other.model_dump()["setting"] == FAR.facts()
            assert one.data and other.data and one.data[0].b64_json == other.data[0].b64_json
    finally:
        models["inpainting"].close()
