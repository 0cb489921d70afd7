"""The page in a real browser: nothing fetched from elsewhere, an answer streamed, slices drawn."""

import os
from pathlib import Path

import pytest
from support.live_server import live

from uhd_export.runtime.serving.http.front import HttpOptions

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize(("width", "height"), [(1280, 760), (390, 844)])
def test_ask_on_the_page(browser, serve, width, height):
    with live(serve(), HttpOptions(keys=("secret",))) as address:
        page = browser.new_page(viewport={"width": width, "height": height})
        problems, fetched = [], []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(address)
        page.locator("#key").wait_for(state="visible")  # it asks for a key when it is refused without
        page.fill("#key", "secret")
        page.locator("#key").press("Enter")
        page.locator("#model").get_by_text("llava-uhd").wait_for()
        page.set_input_files("#file", ROOT / "examples" / "cards-1.png")
        page.locator("#cut").get_by_text("3x2 slices of 336x336").wait_for()
        drawn = page.evaluate(
            "() => { const c = document.querySelector('#canvas'), p = c.getContext('2d');"
            " return [...p.getImageData(Math.round(c.width / 3), 200, 1, 1).data]; }"
        )
        assert drawn[2] > 200 and drawn[2] - drawn[0] > 100  # a blue line where two slices meet
        page.fill("#question", "What is the code on the red card?")
        page.click("#ask")
        page.locator("#answer:not(.running)").get_by_text("900").wait_for()
        page.locator("#time").get_by_text("first token").wait_for()
        page.locator("#memory").get_by_text("slots, reserved").wait_for()
        assert page.locator("#time dt").all_inner_texts()[:5] == [
            "image",
            "queue",
            "vision",
            "prefill",
            "decode",
        ]
        fits = page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
        assert fits and not problems
        assert all(url.startswith((address, "data:", "blob:")) for url in fetched)
        assert page.locator("#problem").inner_text() == ""
        if "UHD_SCREENSHOTS" in os.environ:
            page.screenshot(path=Path(os.environ["UHD_SCREENSHOTS"]) / f"page-{width}.png")


@pytest.mark.parametrize(
    "give",
    [
        "document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true}))",
        "drop.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}))",
    ],
    ids=["pasted", "dropped"],
)
def test_an_image_is_given_and_an_answer_stopped(browser, serve, give):
    with live(serve()) as address:
        page = browser.new_page()
        page.goto(address)
        page.evaluate(
            f"""async () => {{
                const canvas = Object.assign(document.createElement('canvas'), {{width: 900, height: 300}});
                const blob = await new Promise(done => canvas.toBlob(done));
                const data = new DataTransfer();
                data.items.add(new File([blob], 'p.png', {{type: 'image/png'}}));
                const drop = document.querySelector('#drop');
                {give};
            }}"""
        )
        page.locator("#cut").get_by_text("900x300").wait_for()
        page.route("**/v1/chat/completions", lambda route: None)  # never answered
        page.fill("#question", "What?")
        page.click("#ask")
        page.locator("#ask").get_by_text("Stop").wait_for()
        page.click("#ask")
        page.locator("#ask").get_by_text("Ask").wait_for()
        assert page.locator("#problem").inner_text() == ""
