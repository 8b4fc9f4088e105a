"""Haystack, a framework that calls OpenAI's images API, generates images of our server: ``OpenAIImageGenerator``."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.http.conftest import Served

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of Haystack


def test_an_image_and_a_refusal(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    reason = "install haystack-ai 3.4; it is no dependency, because it brings a telemetry client"
    generators = pytest.importorskip("haystack.components.generators", reason=reason)
    from haystack.utils import Secret

    generator = generators.OpenAIImageGenerator(
        model="text", size="auto", api_key=Secret.from_token("none"), api_base_url=f"{served.url}/v1", max_retries=0
    )
    answer = generator.run("a red circle", size="32x16")
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))))
    assert image.shape == (16, 32, 3) and image.std() > 1
    with pytest.raises(Exception, match="height: got 17, expected a multiple of 2") as refused:
        generator.run("a red circle", size="33x17")
    assert type(refused.value).__name__ == "BadRequestError"
    generator.close()
