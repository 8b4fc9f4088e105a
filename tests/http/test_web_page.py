"""The page of the server in a real browser: generate, cancel, errors, two tabs, masks, accessibility, no other host."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from ldm_runtime.http.served_model import ServedModel
from ldm_runtime.http.server_options import ServerOptions
from tests.http.conftest import ENGINE, Served, running, stopped
from tests.support.browser import NAMES
from tests.support.paper_bundles import paper_bundle
from tests.support.shared import SharedFolders
from tests.support.waiting import wait_until

KEY = "a key of the tests"
TIMEOUT = 60_000
"""Milliseconds after which a test fails that waits for the page."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next((path for name in NAMES if (path := shutil.which(name))), None)
    assert path, "no Chromium to open the page with; `apt-get install chromium`"
    expect.set_options(timeout=TIMEOUT)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


class Tab:
    """A tab, with the messages of its console and the addresses that it asked for."""

    def __init__(self, browser: Browser, url: str):
        self.context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        self.page: Page = self.context.new_page()
        self.messages: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.page.set_default_timeout(TIMEOUT)

    def status(self, text: str) -> None:
        expect(self.page.locator("#status")).to_have_text(text)

    def generate(self, steps: int, prompt: str = "a red circle") -> None:
        if self.page.locator("#prompt").is_visible():
            self.page.fill("#prompt", prompt)
        if not self.page.locator("#steps").is_visible():
            self.page.click("summary")
        self.page.fill("#steps", str(steps))
        self.page.click("#generate")


@pytest.fixture
def tab(browser: Browser, served: Served) -> Iterator[Tab]:
    opened = Tab(browser, served.url)
    yield opened
    assert all(url.startswith((served.url, "data:", "blob:")) for url in opened.asked), opened.asked
    opened.context.close()


def test_generate_and_copy_the_request(tab: Tab, served: Served) -> None:
    expect(tab.page.locator("#model option")).to_have_text(["text", "plain"])
    tab.page.fill("#seed", "7")
    tab.generate(6)
    tab.status("Done.")
    item = tab.page.locator("#gallery li")
    expect(item).to_have_count(1)
    expect(item.locator("p")).to_have_text("a red circle · seed 7 · 16x16")
    assert tab.page.evaluate("document.querySelector('#gallery img').naturalWidth") == 16
    item.get_by_role("button", name="Copy as curl").click()
    tab.status("Copied.")
    copied = tab.page.evaluate("navigator.clipboard.readText()")
    settings = json.loads(copied.split(" -d '")[1].removesuffix("'"))
    assert settings == {"model": "text", "n": 1, "prompt": "a red circle", "seed": 7, "steps": 6}
    assert copied.startswith(f"curl {served.url}/v1/images/generations ") and tab.messages == []


def test_fields_follow_the_model(tab: Tab) -> None:
    expect(tab.page.locator("#prompt")).to_be_visible()
    tab.page.select_option("#model", "plain")
    for hidden in ("#prompt", "#negative_prompt", "#labels", "#image", "#guidance"):
        expect(tab.page.locator(hidden)).to_be_hidden()
    tab.page.fill("#n", "3")
    tab.generate(2)
    tab.status("Done.")
    expect(tab.page.locator("#gallery li")).to_have_count(3)


def test_a_budget_where_settings_were_measured(tab: Tab) -> None:
    expect(tab.page.locator("#budget")).to_be_visible()
    tab.page.select_option("#model", "plain")
    expect(tab.page.locator("#budget")).to_be_hidden()
    tab.page.select_option("#model", "text")
    tab.page.fill("#prompt", "a circle")
    tab.page.fill("#budget", "15")
    tab.page.click("summary")
    expect(tab.page.locator("#steps")).to_be_disabled()
    tab.page.click("#generate")
    tab.status("Done.")
    expect(tab.page.locator("#gallery p")).to_contain_text("4 steps")
    tab.page.fill("#budget", "")
    expect(tab.page.locator("#steps")).to_be_enabled()


def test_cancel_and_go_on(tab: Tab, served: Served, cancelled: threading.Event) -> None:
    model = served.models["text"]
    before = model.scheduler.snapshot().outcomes["cancelled"]
    with stopped(model) as gate:
        tab.generate(1000)
        gate.wait_for_call()
        gate.advance()
        tab.status("Step 1 of 1000")
        tab.page.click("#cancel")
        tab.status("Cancelled.")
        assert cancelled.wait(60)
    assert wait_until(lambda: model.scheduler.snapshot().outcomes["cancelled"] == before + 1)
    tab.generate(2)
    tab.status("Done.")


def test_an_error_is_shown_and_the_next_request_works(tab: Tab) -> None:
    tab.page.evaluate("document.querySelector('#form').noValidate = true")
    tab.generate(1001)
    expect(tab.page.locator("#status.error")).to_contain_text("steps: got 1001, expected 1..1000")
    tab.generate(2)
    tab.status("Done.")


def test_two_tabs_at_once(tab: Tab, browser: Browser, served: Served) -> None:
    other = Tab(browser, served.url)
    for one, seed in ((tab, 1), (other, 2)):
        one.page.fill("#seed", str(seed))
        one.generate(80)
    for one, seed in ((tab, 1), (other, 2)):
        one.status("Done.")
        expect(one.page.locator("#gallery p")).to_contain_text(f"seed {seed}")
    other.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility_on_a_phone(tab: Tab, scheme: str) -> None:
    tab.page.set_viewport_size({"width": 360, "height": 740})
    tab.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    tab.generate(2)
    tab.status("Done.")
    tab.page.focus("#model")
    results = Axe().run(tab.page)
    assert results.violations_count == 0, results.generate_report()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_keyboard_alone(tab: Tab) -> None:
    expect(tab.page.locator("#model option")).to_have_count(2)
    tab.page.focus("#prompt")
    tab.page.keyboard.type("a circle")
    for _ in range(20):
        tab.page.keyboard.press("Tab")
        if tab.page.evaluate("document.activeElement.id") == "generate":
            break
    tab.page.keyboard.press("Enter")
    tab.status("Done.")


def test_a_mask_is_painted(browser: Browser, shared: SharedFolders, tmp_path: Path) -> None:
    model = ServedModel.open(paper_bundle(shared, "inpainting_big").bundle.folder, "inpainting", ENGINE)
    height, width = (model.facts()["ldm"][side][1] for side in ("height", "width"))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    try:
        with running({"inpainting": model}) as server:
            tab = Tab(browser, server.url)
            tab.page.set_input_files("#image", tmp_path / "a.png")
            expect(tab.page.locator("#mask")).to_be_visible()
            tab.generate(2)
            tab.status("Paint what is to be redrawn first.")
            tab.page.locator("#mask").scroll_into_view_if_needed()
            box = tab.page.locator("#mask").bounding_box()
            assert box
            tab.page.mouse.move(box["x"] + 10, box["y"] + 10)
            tab.page.mouse.down()
            tab.page.mouse.move(box["x"] + 60, box["y"] + 60, steps=5)
            tab.page.mouse.up()
            tab.page.click("#generate")
            tab.status("Done.")
            expect(tab.page.locator("#gallery li")).to_have_count(1)
            tab.page.click("#clear-mask")
            tab.page.focus("#mask")
            tab.page.keyboard.press("ArrowLeft")
            tab.page.keyboard.press("Space")
            tab.page.click("#generate")
            expect(tab.page.locator("#gallery li")).to_have_count(2)
            assert tab.messages == []
            tab.context.close()
    finally:
        model.close()


def test_the_page_asks_for_the_key(browser: Browser, models: dict[str, ServedModel]) -> None:
    with running(models, ServerOptions(api_key=KEY)) as server:
        tab = Tab(browser, server.url)
        expect(tab.page.locator("#status.error")).to_contain_text("Authorization: Bearer KEY")
        tab.page.click("summary")
        tab.page.fill("#key", KEY)
        tab.page.press("#key", "Tab")
        expect(tab.page.locator("#model option")).to_have_count(2)
        tab.generate(2)
        tab.status("Done.")
        tab.context.close()
