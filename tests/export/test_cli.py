"""The command line where all goes well: each verb on the tiny model, what it writes, and what goes to which stream."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_export.cli import main
from ldm_runtime.backends.openvino import has_bf16
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import MANIFEST as NAME
from tests.support.checkpoints import random_checkpoint
from tests.support.configs_only import write_configs

COMPONENTS = ("text_encoder", "cross_attention_kv", "time_embedding", "unet", "shallow_unet", "decoder")
ALL = (*COMPONENTS, "step", "guided_step")
STEPS = ("--steps", "2", "--seed", "7", "--threads", "1")
PROMPT = "a red circle left of the blue square"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ldm_export.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def run(capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    assert main([str(argument) for argument in arguments]) == code
    return capfd.readouterr()


def test_build_from_configs_alone_then_a_image(place, capfd) -> None:
    configs = write_configs(place / "configs")
    out, err = run(capfd, "build", configs, "-o", "sub/bundle", "--random-weights", "--json")
    output = json.loads(out)
    assert err == "" and set(output) == {"bundle", "bytes", "made", "seconds"}
    assert output["bundle"] == "sub/bundle"
    graphs = ("text_encoder", "unet", "shallow_unet", "decoder", "step", "guided_step")
    rewritten = (f"{name}.fp32.onnxruntime-cpu" for name in ("unet", "shallow_unet", "decoder"))
    assert sorted(output["made"]) == sorted(["tokenizer", *rewritten, *(f"{name}.fp32" for name in graphs)])
    built = Bundle.open(place / "sub/bundle")
    built.check()
    assert output["bytes"] == sum(fact.size for fact in built.manifest.files.values())
    assert built.manifest.request["random_weights_seed"] == 0
    assert not list(place.rglob(".*"))
    run(capfd, "generate", "sub/bundle", PROMPT, *STEPS)
    assert pixels("out.png").shape == (16, 16, 3)


def test_build_keeps_valid_files_and_rebuilds_damaged_ones(tiny_checkpoint, bundle_copy, capfd) -> None:
    before = (bundle_copy / NAME).read_bytes()
    out, err = run(capfd, "build", tiny_checkpoint, "-o", bundle_copy)
    assert re.fullmatch(rf"{bundle_copy}: [\d.]+ MB, 13 files\n", out)
    assert re.fullmatch(r"nothing to do, the bundle is complete; \d+ s\n", err)
    (bundle_copy / "tokenizer.json").write_bytes(b"{}")
    out, err = run(capfd, "build", tiny_checkpoint, "-o", bundle_copy)
    assert re.fullmatch(r"made tokenizer; \d+ s\n", err)
    assert (bundle_copy / NAME).read_bytes() == before
    Bundle.open(bundle_copy).check()


def test_quiet_prints_only_the_result(tiny_checkpoint, bundle_copy, capfd) -> None:
    out, err = run(capfd, "build", tiny_checkpoint, "-o", bundle_copy, "--quiet")
    assert out.startswith(f"{bundle_copy}: ") and out.count("\n") == 1 and err == ""
    assert run(capfd, "generate", bundle_copy, PROMPT, *STEPS, "--quiet") == ("out.png\n", "")


def test_generate_writes_an_image_and_prints_the_seed(tiny_bundle, capfd) -> None:
    out, err = run(capfd, "generate", tiny_bundle, PROMPT, *STEPS, "--precision", "fp32")
    assert out == "out.png\n" and re.fullmatch(r"seed 7; (openvino|onnxruntime), fp32 graphs .* in fp32: .*\n", err)
    assert pixels("out.png").shape == (64, 64, 3)
    run(capfd, "generate", tiny_bundle, PROMPT, *STEPS, "--precision", "fp32", "-o", "again.png")
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()


def test_generate_prints_a_seed_that_gives_the_same_image_again(tiny_bundle, capfd) -> None:
    steps = ("--steps", "2", "--threads", "1")
    out, err = run(capfd, "generate", tiny_bundle, PROMPT, *steps, "--json", "-o", "one.png")
    assert err == ""
    seed = json.loads(out)["seed"]
    run(capfd, "generate", tiny_bundle, PROMPT, *steps, "--seed", seed, "-o", "two.png")
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()


def test_generate_several_of_another_size_each_and_as_a_grid(tiny_bundle, capfd) -> None:
    size = ("--width", "24", "--height", "16", "--images-per-prompt", "2", "--each", "-o", "new/a.png")
    out, _ = run(capfd, "generate", tiny_bundle, "a circle", "a square", *STEPS, *size, "--json")
    files = ["new/a.png", *(f"new/a-{index}.png" for index in range(4))]
    output = json.loads(out)
    assert (output["files"], output["seed"], output["choice"]["backend"]) == (files, 7, "onnxruntime")
    sheet = pixels("new/a.png")
    assert sheet.shape == (2 * 16 + 2, 2 * 24 + 2, 3)
    assert sorted(str(path) for path in Path("new").iterdir()) == sorted(files)
    for index in range(4):
        row, column = divmod(index, 2)
        tile = sheet[row * 18 : row * 18 + 16, column * 26 : column * 26 + 24]
        assert np.array_equal(tile, pixels(f"new/a-{index}.png"))


@pytest.mark.parametrize(
    "option", [("--guidance", "1"), ("--eta", "0"), ("--negative-prompt", "blue"), ("--steps", "3")]
)
def test_generate_heeds_every_option(tiny_bundle, capfd, option: tuple[str, str]) -> None:
    run(capfd, "generate", tiny_bundle, PROMPT, *STEPS, "-o", "plain.png")
    run(capfd, "generate", tiny_bundle, PROMPT, *STEPS, *option, "-o", "other.png")
    assert not np.array_equal(pixels("plain.png"), pixels("other.png"))


def test_names_and_prompts_with_brackets_and_colons_are_not_markup(tiny_bundle, capfd) -> None:
    name = "[bold]a[/b] :smile: {0} é.png"
    assert run(capfd, "generate", tiny_bundle, "[/red] [link]", *STEPS, "-o", name, "--quiet") == (f"{name}\n", "")
    assert Path(name).exists()


def test_inspect_lists_the_contents(tiny_bundle, capfd) -> None:
    out, err = run(capfd, "inspect", tiny_bundle, "--check")
    assert err == ""
    assert "checked: all 13 files have the sizes and digests of the manifest" in out
    for text in (*COMPONENTS, "sample: float32", "fp32", "operators", "precision", "run `ldm-export verify`"):
        assert text in out
    facts = json.loads(run(capfd, "inspect", tiny_bundle, "--json")[0])
    assert set(facts["components"]) == set(ALL)
    assert facts["components"]["unet"]["inputs"][0] == "sample: float32 [batch, 4, height, width]"
    assert facts["components"]["unet"]["graphs"]["fp32"]["operators"]["Conv"] > 5
    assert facts["request"].keys() == {"checkpoint", "checkpoint_sha256", "feature_cache", "precision", "quantize"}
    assert (facts["request"]["checkpoint"], facts["request"]["precision"]) == ("tiny", "fp32")
    sizes = {name: (tiny_bundle / name).stat().st_size for name in facts["files"]}
    assert facts["files"] == sizes and len(sizes) == 13


def test_verify_writes_a_page_and_inspect_shows_its_results(tiny_checkpoint, bundle_copy, place, capfd) -> None:
    (place / "prompts.txt").write_text("a <b>red</b> circle\n\na blue [/i] square\n")
    arguments = ("verify", bundle_copy, "--against", tiny_checkpoint, "--prompts", "prompts.txt", "--steps", "2")
    out, err = run(capfd, *arguments, "--json")
    facts = json.loads(out)
    assert err == "" and facts["within_tolerance"] is True
    assert set(facts["components"]) == {"text_encoder", "unet", "decoder"}
    assert all(0 <= part["max_error"] < 1e-3 for part in facts["components"].values())
    assert [image["request"]["prompts"] for image in facts["images"]] == [
        "a <b>red</b> circle",
        "a blue [/i] square",
    ]
    assert all(image["max_pixel"] <= 1 for image in facts["images"])
    bundle = Bundle.open(bundle_copy)
    bundle.check()
    assert bundle.manifest.measured == {"verify": facts}
    page = bundle.file("report/verify.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in page and page.count("data:image/png;base64,") == 6
    assert "http:" not in page and "https:" not in page and "within the tolerance" in page
    out, err = run(capfd, *arguments)
    assert "a blue [/i] square" in out and f"{bundle_copy}/report/verify.html\n" in out and err == ""
    assert "verify.settings.num_inference_steps" in run(capfd, "inspect", bundle_copy)[0]


@pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16 arithmetic")
def test_verify_runs_bf16_on_an_engine_that_computes_in_it(tiny_checkpoint, bundle_copy, place, capfd) -> None:
    (place / "prompts.txt").write_text("a circle")
    arguments = ("--against", tiny_checkpoint, "--prompts", "prompts.txt", "--steps", "1", "--precision", "bf16")
    facts = json.loads(run(capfd, "verify", bundle_copy, *arguments, "--json")[0])
    assert facts["within_tolerance"] is True
    assert 1e-3 < facts["components"]["unet"]["max_error"] < 0.1


def test_verify_against_another_checkpoint_fails_with_figures(bundle_copy, place, capfd) -> None:
    other = random_checkpoint(place / "other", seed=1)
    (place / "prompts.txt").write_text("a circle")
    arguments = ("verify", bundle_copy, "--against", other, "--prompts", "prompts.txt", "--steps", "1")
    out, err = run(capfd, *arguments, code=1)
    failures = [line for line in out.splitlines() if line.startswith("beyond tolerance: ")]
    assert len(failures) == 4 and err == ""
    assert failures[1].startswith("beyond tolerance: unet: max error ")
    assert Bundle.open(bundle_copy).manifest.measured["verify"]["within_tolerance"] is False


@pytest.mark.parametrize(
    "arguments",
    [
        *(["paint"], ["build"], ["build", "x"], ["build", "x", "-o", "y", "--precision", "fp7"]),
        *(
            ["generate"],
            ["generate", "x", "--count", "few"],
            ["generate", "x", "y", "--steps", "many"],
            ["inspect", "x", "--quiet=1"],
        ),
        *(["generate", "x", "y", "--device", "tpu"], ["inspect", "x", "--quiet", "--verbose"], ["verify", "x", "y"]),
    ],
)
def test_bad_usage_exits_with_2_and_shows_the_usage(place, capfd, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capfd.readouterr()
    assert caught.value.code == 2 and out == "" and list(place.iterdir()) == []
    assert err.startswith("usage: ldm-export") and "ldm-export" in err.splitlines()[-1] and "error: " in err


def test_version_and_module(tiny_bundle) -> None:
    done = python("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ldm-export {version('ldm-export')}\n", "")
    done = python("inspect", tiny_bundle, "--json", env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "20"})
    assert done.returncode == 0 and done.stderr == ""
    assert set(json.loads(done.stdout)["components"]) == set(ALL)


def test_generate_loads_no_torch(tiny_bundle, place) -> None:
    code = "import sys; from ldm_export.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "generate", tiny_bundle, PROMPT, *STEPS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == "out.png\n0 False\n" and done.stderr.startswith("seed 7; ")


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_reader_that_has_gone_is_no_traceback(tiny_bundle, options: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ldm_export.cli", "inspect", str(tiny_bundle), *options]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
