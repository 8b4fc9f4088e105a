"""The report: what it shows of a bundle, that untrusted names are escaped, and how a real browser displays it."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_export.cli import main
from ldm_export.screen import human_bytes
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.backends.engine import pipeline_components
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import MANIFEST, graph_file, weights_file
from ldm_runtime.images import psnr
from ldm_runtime.model import SHALLOW_UNET
from tests.support.browser import screenshot, shown
from tests.support.markup import Page, assert_self_contained

PROMPTS = ("a red circle", "a blue square left of a green cross")
STEPS = 3
HOSTILE = (
    "</td></table><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;\u202e"
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


@pytest.fixture(scope="module")
def half_page(half_bundle: Bundle, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    options = ["--prompts", str(prompts), "--steps", str(STEPS), "--seed", "5", "-o", str(path), "--quiet"]
    assert main(["report", str(half_bundle.folder), *options]) == 0
    return path


def all_images(page: Page) -> list[np.ndarray]:
    sources = [attributes["src"] or "" for name, attributes in page.elements if name == "img"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))) for source in sources]


def test_images_are_those_the_runtime_generates_with_their_amplified_difference(
    half_bundle: Bundle, half_page: Path
) -> None:
    page = Page.read(half_page)
    assert_self_contained(page)
    head, *rows = page.table("request")
    assert head[:3] == ["request", "fp32", "fp16"] and len(rows) == 2
    times = int(head[3].removeprefix("|fp16 − fp32| × "))
    result, expected = all_images(page), []
    for precision in ("fp32", "fp16"):
        with LatentDiffusionPipeline.from_bundle(half_bundle, precision=precision) as pipeline:
            options = {"eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": STEPS}
            generated = [pipeline(prompt, seed=5 + i, **options).images[0] for i, prompt in enumerate(PROMPTS)]
            expected.append([np.asarray(image).astype(int) for image in generated])
    for index, row in enumerate(rows):
        one, other, difference = result[3 * index : 3 * index + 3]
        assert np.array_equal(one, expected[0][index]) and np.array_equal(other, expected[1][index])
        assert np.array_equal(difference, np.minimum(255, times * np.abs(one.astype(int) - other)))
        assert row[0] == f"{PROMPTS[index]}seed {5 + index}"
        value = psnr(one.astype(np.float64), other.astype(np.float64), 255.0)
        assert row[3] == f"PSNR {'equal' if value is None else f'{value:.1f}'}"


def test_precisions_islands_and_origin_are_shown(half_bundle: Bundle, half_page: Path) -> None:
    page = Page.read(half_page)
    components = pipeline_components(half_bundle.manifest.model)
    _, full, half = page.table("PSNR mean, dB")
    for row, precision in ((full, "fp32"), (half, "fp16")):
        graphs = [graph_file(name, precision) for name in components]
        graphs += [weights_file(graph) for graph in graphs]
        files = [fact for file, fact in half_bundle.manifest.files.items() if file in graphs]
        assert row[:2] == [precision, human_bytes(sum(fact.size for fact in files))]
        assert row[5].endswith(f", computing in {precision}") or row[5] == "openvino, computing in fp32"
        assert float(row[6]) > 0
    assert full[3] == "–" and (half[3] == "equal" or float(half[3]) > 45)
    islands = page.table("nodes in fp32")[1:]
    assert [row[0] for row in islands] == [name for name in components if name != SHALLOW_UNET]
    for component, _, nodes, float_count, why in islands:
        facts = json.loads(half_bundle.file(f"report/{component}.fp16.json").read_text())
        assert (int(nodes), int(float_count)) == (facts["half"], len(facts["islands"]))
        softmax = sum(reason == "softmax" for reason in facts["islands"].values())
        assert f"{softmax} softmax" in why if softmax else "softmax" not in why
    assert page.text.count("largest fp16 number") == 1
    assert ["checkpoint", "tiny"] in page.table("build request")


def test_int8_results_and_the_most_sensitive_layers_are_shown(int8_bundle: Bundle, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    assert main(["report", str(int8_bundle.folder), "--steps", "2", "-o", str(target), "--quiet"]) == 0
    page, facts = Page.read(target), json.loads(int8_bundle.file("report/int8.json").read_text())
    assert_self_contained(page)
    assert page.table("request")[0][:3] == ["request", "fp32", "int8"]
    assert "Budget met: at least 20 dB on 1 image, mean " in page.text and facts["record"]["sha256"] in page.text
    (outcome,) = [rows for rows in page.tables if any(row[0] == "UNet operations in int8" for row in rows)]
    output = {row[0]: row[1] for row in outcome}
    assert output["UNet operations in int8"] == f"{facts['summary']['unet_int8_share']:.1%}"
    assert output["PSNR against fp32"] == f"{facts['summary']['psnr_mean']:.1f} dB"
    layers = [layer for layer in facts["components"]["unet"]["layers"] if layer["latent_db"] is not None]
    assert len(layers) >= 4
    by_name = {layer["name"]: layer for layer in layers}
    (listed,) = [rows[1:] for rows in page.tables if rows[0][1] == "most sensitive first" and rows[1][1] in by_name]
    assert [float(row[4]) for row in listed] == sorted(float(row[4]) for row in listed)
    assert listed[0][4] == f"{min(layer['latent_db'] for layer in layers):.1f}"
    assert all((row[5] == "int8") is by_name[row[1]]["int8"] for row in listed)
    assert sum(name == "circle" for name, _ in page.elements) >= len(layers)
    assert "unet: ranges over timesteps" in page.text


def test_a_bundle_of_fp32_alone_gives_a_page_without_comparisons(tiny_bundle: Path, tmp_path: Path, capfd) -> None:
    target = tmp_path / "new/page.html"
    assert main(["report", str(tiny_bundle), "--steps", "1", "-o", str(target), "--json"]) == 0
    output = json.loads(capfd.readouterr().out)
    assert output == {"page": str(target), "bytes": target.stat().st_size, "precisions": ["fp32"]}
    page = Page.read(target)
    assert_self_contained(page)
    assert page.table("request")[0] == ["request", "fp32"] and len(all_images(page)) == 4
    assert "Half precision" not in page.text and "Differences" not in page.text


def test_untrusted_names_are_shown_as_text(half_bundle: Bundle, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(half_bundle.folder, tmp_path / "bundle<i>"))
    hostile = {HOSTILE: HOSTILE, "rows": [{HOSTILE: HOSTILE}], "named": {HOSTILE: {HOSTILE: [HOSTILE, {"a": None}]}}}
    islands = {"half": HOSTILE, "islands": {HOSTILE: f"range: {HOSTILE}"}, "matrix_islands": []}
    reports = {"report/unet.fp16.json": islands, "report/ranges.json": {HOSTILE: {HOSTILE: 1.0, "b": HOSTILE}}}
    layer = {"name": HOSTILE, "op": HOSTILE, "flops": -1, "int8": HOSTILE, "why": HOSTILE, "latent_db": 1e30}
    part = {"why": HOSTILE, "bytes_int8": 5e-324, "layers": [layer, HOSTILE, {**layer, "latent_db": -0.0}]}
    part["ranges"] = {"timesteps": [3, 3], "tensors": {HOSTILE: [1e-30, 1e30], "b": [0, 1], "c": [HOSTILE]}}
    output = {
        "budget": HOSTILE,
        "settings": {"steps": HOSTILE},
        "summary": {"psnr_mean": HOSTILE},
        "record": {"file": HOSTILE},
    }
    reports["report/int8.json"] = {
        **output,
        "components": {HOSTILE: part, "b": HOSTILE},
        "speed": {"ratio": 1, "unet_ms": 7},
    }
    measured = bundle.with_measured({HOSTILE: hostile}, {name: json.dumps(v).encode() for name, v in reports.items()})
    manifest = replace(measured.manifest, request={HOSTILE: HOSTILE}, tools={HOSTILE: HOSTILE})
    (bundle.folder / MANIFEST).write_text(manifest.to_json())
    (tmp_path / "prompts.txt").write_text(HOSTILE)
    target = tmp_path / "page.html"
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "1", "-o", str(target), "--quiet"]
    assert main(["report", str(bundle.folder), *options]) == 0
    page = Page.read(target)
    assert_self_contained(page)
    assert page.text.count(HOSTILE.replace("\u202e", "\\u202e")) >= 20 and "\u202e" not in page.text
    assert "<title>bundle&lt;i&gt;: report</title>" in shown(target)


REPORTS: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "unet.fp16.json: not valid JSON ("),
    "deep JSON": (b"[" * 10**6, "unet.fp16.json: not valid JSON ("),
    "a list": (b"[]", "unet.fp16.json: got list, expected an object; rebuild the bundle"),
    "binary": (b"\xff", "unet.fp16.json: not valid JSON ("),
}


@pytest.mark.parametrize("case", REPORTS)
def test_a_report_file_that_cannot_be_read_is_refused(
    half_bundle: Bundle, tmp_path: Path, refused: Callable[..., None], case: str
) -> None:
    content, message = REPORTS[case]
    bundle = Bundle.open(shutil.copytree(half_bundle.folder, tmp_path / "bundle"))
    bundle.with_measured({}, {"report/unet.fp16.json": content})
    refused("report", "bundle", "--steps", "1", message=message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "0"), "steps: got 0, expected 1..1000"),
        (("--seed", str(2**70)), "seed: got 1180591620717411303424"),
        (("-o", "."), ".: is a folder, expected the name of a file"),
        (("-o", "/proc/page.html", "--steps", "1"), "/proc/page.html: cannot be written"),
        (("--prompts", "none.txt"), "none.txt: cannot be read (No such file or directory)"),
    ],
)
def test_bad_options_are_refused(bundle_copy: Path, refused: Callable[..., None], options, message: str) -> None:
    refused("report", bundle_copy, *options, message=message)


def test_a_browser_shows_it(half_page: Path, tmp_path: Path) -> None:
    image = np.asarray(screenshot(half_page, tmp_path / "page.png"))
    first = all_images(Page.read(half_page))[0]
    shape, times = first.shape[:2], 3  # 64 pixels are shown as 192
    dark = (image < 100).all(axis=2).sum()
    assert image.shape == (1600, 1200, 3) and 5000 < dark < 400_000, "no text, or no paper"
    inner = image[: -times * shape[0], : -times * shape[1]]
    corners = np.argwhere((inner == first[0, 0]).all(axis=2))
    result = [image[y : y + times * shape[0] : times, x : x + times * shape[1] : times] for y, x in corners]
    assert any(np.array_equal(part, first) for part in result), "the first image is nowhere on the page"
