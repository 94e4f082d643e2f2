"""The page of `l2p serve` in a real browser."""

import base64
import json
from pathlib import Path
from urllib.parse import urlsplit

import comfyui_browser
import numpy as np
import pytest
from PIL import Image
from serving import MISSING, png

FOUND = comfyui_browser.find()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} come with the extra serve"),
    pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND)),
]

PROMPT = 'a large red circle on a blue background, left; "seed": 5'
SEED = str(2**64 - 1)  # too large for JavaScript's numbers
CHANGES = """() => {
    window.previews = new Set();
    new MutationObserver(() => {
        const source = document.querySelector(".job img")?.src;
        if (source) window.previews.add(source);
    }).observe(document.getElementById("jobs"), {attributes: true, subtree: true, childList: true});
}"""
DROP = """(base64) => {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
    document.body.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true}));
}"""


@pytest.fixture(scope="module")
def context():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=FOUND[0], args=comfyui_browser.FLAGS)
        yield browser.new_context(locale="en-GB", viewport={"width": 1200, "height": 900})
        browser.close()


@pytest.fixture
def page(context, server):
    """The page, which must not report errors nor ask other hosts for anything."""
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request",
        lambda request: (
            urlsplit(request.url).netloc not in ("", urlsplit(server.url).netloc)
            and faults.append(request.url)
        ),
    )
    page.set_default_timeout(120_000)
    open_page(page, server)
    yield page
    page.close()
    assert not faults


def open_page(page, server):
    page.goto(server.url)
    page.wait_for_selector("body[data-ready]")


def fill(page, **fields):
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))


def generate(page):
    """Press the button, and wait until its images are in the gallery."""
    there = page.locator("#gallery img").count()
    page.click("#generate")
    page.wait_for_function(
        f"() => document.querySelectorAll('#gallery img').length > {there}"
        " && !document.querySelector('.job')"
    )


def download(page, folder):
    with page.expect_download() as started:
        page.click("#download")
    started.value.save_as(folder / started.value.suggested_filename)
    return Image.open(folder / started.value.suggested_filename)


def test_a_prompt_becomes_an_image_whose_png_restores_every_setting(page, server, tmp_path):
    page.evaluate(CHANGES)
    fill(page, prompt=PROMPT, negative_prompt="green", num_inference_steps=8, seed=SEED)
    fill(page, cfg_scale=1.5, width=112)
    page.select_option("#sampler", "ab2")
    page.click("summary")
    fill(page, shift=2.5, cfg_truncation=0.75)
    generate(page)
    assert page.evaluate("() => window.previews.size") >= 3

    with download(page, tmp_path) as image:
        record = json.loads(image.info["l2p"])
        assert image.size == (112, 96)
    wanted = {"prompt": PROMPT, "negative_prompt": "green", "seed": int(SEED), "sampler": "ab2"}
    wanted |= {"num_inference_steps": 8, "cfg_scale": 1.5, "shift": 2.5, "cfg_truncation": 0.75}
    assert record.items() >= wanted.items()

    open_page(page, server)  # a reload: the gallery stays, the form is as new
    assert page.locator("#gallery img").count() == 1 and page.input_value("#prompt") == ""
    page.evaluate(DROP, base64.b64encode(Path(image.filename).read_bytes()).decode())
    page.wait_for_function("() => document.getElementById('prompt').value")
    for name in {*wanted, "height", "width", "stages", "redraw"}:
        value = page.input_value(f"#{name}")
        assert value == str(record[name]) or float(value) == record[name], name
    assert not page.is_checked("#random")

    page.click("#delete")
    page.wait_for_function("() => !document.querySelector('#gallery img')")


def test_cancel_ends_a_running_image_and_one_that_waits(page, server):
    before = server.metric("l2p_cancelled_total")
    fill(page, prompt="a circle", num_inference_steps=100, count=2)
    page.click("#generate")
    page.wait_for_function("() => document.querySelector('.job progress')?.value > 0")
    page.click("#generate")
    page.wait_for_selector(".job:nth-child(2) >> text=Place in the queue")
    for _ in "ab":
        page.click(".job button")
    page.wait_for_function("() => !document.querySelector('.job')")
    page.wait_for_timeout(500)
    assert server.metric("l2p_cancelled_total") == before + 4
    assert server.metric("l2p_images_running") == server.metric("l2p_queue_length") == 0
    assert page.is_hidden("#message") and page.locator("#gallery img").count() == 0


def test_a_mask_painted_over_an_image_is_what_changes(page, tmp_path):
    source = Image.new("RGB", (96, 96), (0, 0, 200))
    page.set_input_files(
        "#input_file", {"name": "blue.png", "mimeType": "image/png", "buffer": png(source)}
    )
    page.wait_for_selector("#editor:not([hidden])")
    fill(page, prompt="a red circle", num_inference_steps=4)
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    across = [box["x"] + box["width"] * share for share in (0.3, 0.7)]
    middle = box["y"] + box["height"] / 2
    page.mouse.move(across[0], middle)
    page.mouse.down()
    page.mouse.move(across[1], middle, steps=4)
    page.mouse.up()
    assert page.input_value("#denoising_strength") == "1"
    generate(page)

    with download(page, tmp_path) as image:
        changed = (np.asarray(image) != np.asarray(source)).any(axis=2)
    assert changed[48, 30:66].mean() > 0.5  # the stroke: 12 % of the width, from 30 % to 70 %
    assert not changed[:36].any() and not changed[60:].any()

    page.click("#compare")
    assert page.is_visible("#before") and page.is_visible("#divider")
    page.click("#remove_input")
    page.click("#restore")  # the gallery keeps image and mask too
    page.wait_for_selector("#editor:not([hidden])")
    painted = page.evaluate(
        "() => document.getElementById('mask').getContext('2d').getImageData(48, 48, 1, 1).data[3]"
    )
    assert painted == 255


def test_errors_are_shown_where_they_are_seen(page):
    fill(page, prompt="a circle", width=112)
    page.evaluate("() => document.getElementById('form').noValidate = true")
    fill(page, width=100)
    page.click("#generate")
    page.wait_for_selector("#message:not([hidden])")
    assert "multiples of 16" in page.inner_text("#message")


def test_chinese_and_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.select_option("#language", "zh")
    assert page.inner_text("#generate") == "生成"
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate("() => document.documentElement.lang") == "zh"
    page.click("summary")
    assert page.evaluate("() => document.scrollingElement.scrollWidth") <= 390
    missing = page.evaluate("""async () => {
        const { TEXTS } = await import("./texts.js");
        const [en, zh] = [TEXTS.en, TEXTS.zh].map((texts) => Object.keys(texts));
        return [...en.filter((key) => !zh.includes(key)), ...zh.filter((key) => !en.includes(key))];
    }""")
    assert missing == []
    page.evaluate("() => localStorage.clear()")


def test_the_documentation_of_the_api_opens(page):
    page.click("header a")
    page.wait_for_selector("#operations-default-generations_v1_images_generations_post")
