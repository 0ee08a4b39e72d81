"""The page, in a real browser: from a prompt to a playing video, with a key, with an image, on a phone."""

import io
import json
import re
import shutil
import subprocess
import time
from contextlib import contextmanager
from dataclasses import replace

import av
import pytest
from PIL import Image

from gateway.api_error import ApiError
from gateway.body import canonical, read_body
from gateway.order import make_order
from gateway.page import offered
from gateway.served import ServedModel
from tests.gateway.running import WAN_TRT, gateway_in_front
from tests.runtime.test_extend import GOOD, endpoint
from tests.runtime.test_extend import said as answer_of
from tests.triton_repo.serving import serving
from triton_repo.job_request import parse_request
from triton_repo.settings import Limits
from triton_repo.wire import arrays_of
from wan22.bundle import open_bundle
from wan22.sampling import presets_for

CHROMIUM = shutil.which("chromium")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
PATIENCE_MS = 40_000


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def window(chromium, url, *expected, **options):
    """The page at ``url``; afterwards nothing stands on its console but lines with one of the ``expected`` texts."""
    context, said = chromium.new_context(**options), []
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(url)
    yield page
    context.close()
    assert not [line for line in said if not any(text in line for text in expected)]


def plays(card):
    """Wait until the video of a card plays; its size."""
    video = card.locator("video")
    video.wait_for()
    return video.evaluate(
        """video => new Promise((plays, fails) => {
            video.onerror = () => fails(video.error.message);
            if (video.error) video.onerror();
            const size = () => [video.videoWidth, video.videoHeight];
            const look = () => video.currentTime > 0 ? plays(size()) : setTimeout(look, 20);
            look();
        })"""
    )


# Every call of an engine begins later: a job of the tiny model may be over before the page has asked for its events.
UNHURRIED = """
import time


class TritonPythonModel(TritonPythonModel):
    def initialize(self, args):
        super().initialize(args)
        kind = type(self.pipeline)
        at_once = kind.pause
        kind.pause = property(lambda pipeline: lambda: (time.sleep(0.2), at_once.fget(pipeline)()), at_once.fset)
"""


@in_browser
@pytest.mark.slow
def test_from_a_prompt_to_a_playing_video_with_the_keyboard_alone(installation, tiny_engines, chromium, tmp_path):
    with (
        serving(installation, tmp_path, {"wan22": tiny_engines}, added=UNHURRIED) as server,
        gateway_in_front(tmp_path / "data", [server.url], "--finish-within", 0) as gateway,
        window(chromium, gateway.url) as page,
    ):
        watch(page)
        page.get_by_label("Prompt", exact=True).focus()
        page.keyboard.type("A red panda")
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")  # none, golden hour, noir
        for _ in range(3):
            page.keyboard.press("Tab")  # the other terms, the size, the length
        page.keyboard.type("0.8")
        page.keyboard.press("Control+Enter")
        first = page.locator("#videos > li").first
        assert plays(first) == [256, 160]
        video = gateway.video(first.get_attribute("id"))
        terms = "Night time, Hard lighting, Side lighting, Cool colors, Dutch angle shot"
        assert (video["prompt"], video["num_frames"]) == (f"{terms}. A red panda", 13)
        told = page.evaluate("window.told")
        assert all(any(f"{expert} noise expert" in line for line in told) for expert in ("high", "low"))
        assert any(re.search(r"^Step \d+ of 8, .* about \d+ s left", line) for line in told)
        assert page.evaluate("window.previews") > 0
        # the same video again, by what is in the form now
        first.get_by_role("button", name="Again").press("Enter")
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.keyboard.press("Control+Enter")
        page.locator("#videos > li").nth(1).wait_for()
        second = page.locator("#videos > li").first
        plays(second)
        with page.expect_download() as downloading:
            second.get_by_role("button", name="Download").press("Enter")
        whole = gateway.ask("GET", f"/v1/videos/{video['id']}/content").body
        assert frames(downloading.value.path()) == frames(io.BytesIO(whole))
        assert downloading.value.suggested_filename == f"{second.get_attribute('id')}.mp4"


def frames(file):
    with av.open(file) as container:
        return [frame.to_ndarray().tobytes() for frame in container.decode(video=0)]


def watch(page):
    """Record what the first card says and how many previews it gets."""
    page.evaluate(
        """() => {
            [window.told, window.previews] = [[], 0];
            const videos = document.querySelector("#videos");
            const look = () => {
                const status = videos.querySelector(".status")?.textContent;
                if (status && status !== told.at(-1)) told.push(status);
                if (videos.querySelector("img[alt=Preview]")) previews += 1;
            };
            const everything = { childList: true, subtree: true, attributes: true, characterData: true };
            new MutationObserver(look).observe(videos, everything);
        }"""
    )


@in_browser
@pytest.mark.slow
def test_jobs_are_cancelled_and_deleted_and_a_wrong_field_is_pointed_at(gateway, chromium):
    with window(chromium, gateway.url, "status of 400") as page:
        page.get_by_label("Prompt", exact=True).fill("A fox")
        page.get_by_text("Camera, light and style").click()
        page.get_by_label("Angle", exact=True).select_option("Aerial shot")
        page.get_by_label("Movement").select_option("Orbit shot")
        page.get_by_role("button", name="Make the video").click()
        page.locator("#trouble").get_by_text("a camera angle or a movement").wait_for()
        page.get_by_label("Angle", exact=True).select_option("")
        page.get_by_role("button", name="Make the video").click()
        card = page.locator("#videos > li").first
        card.get_by_text("Orbit shot. A fox").wait_for()
        video_id = card.get_attribute("id")
        card.get_by_role("button", name="Cancel").click()
        card.get_by_text("Cancelled.").wait_for()
        assert gateway.video(video_id)["error"]["code"] == "cancelled"
        page.reload()
        page.once("dialog", lambda dialog: dialog.accept())
        page.locator(f"#{video_id}").get_by_role("button", name="Delete").click()
        page.locator(f"#{video_id}").wait_for(state="detached")
        assert gateway.ask("GET", f"/v1/videos/{video_id}").status == 404


@in_browser
@pytest.mark.slow
def test_a_key_is_typed_once_and_an_image_starts_a_video_on_a_phone(installation, triton, flow_of, chromium, tmp_path):
    engines, data = {"wan22": flow_of("ti2v-5b-tiny").engines}, tmp_path / "data"
    add = subprocess.run(
        [WAN_TRT, "gateway", "key", "add", "a", "--data", data], capture_output=True, text=True, check=True
    )
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "color_scheme": "dark"}
    image = io.BytesIO()
    Image.new("RGB", (200, 100), "teal").save(image, "PNG")
    with (
        serving(installation, tmp_path, engines) as server,
        gateway_in_front(data, [server.url, triton.url], "--finish-within", 0) as gateway,
        window(chromium, gateway.url, "status of 401", **phone) as page,
    ):
        gateway.key = add.stdout.strip()
        while len(gateway.ask("GET", "/v1/models").json["data"]) < 2:
            time.sleep(0.05)
        assert page.locator("form").count() == 1  # nothing of the models is told
        assert "ti2v" not in page.content()
        page.get_by_label("Key").fill("wan_no")
        page.get_by_role("button", name="Open").tap()
        page.get_by_role("alert").get_by_text("no valid key").wait_for()
        page.get_by_label("Key").fill(gateway.key)
        page.get_by_role("button", name="Open").tap()
        page.get_by_label("Model").wait_for()
        page.reload()
        page.get_by_label("Model").select_option("wan2.2-ti2v-5b-tiny")
        page.locator(".drop").wait_for()
        page.get_by_label("Prompt", exact=True).fill("It turns round")
        drop_image(page, image.getvalue())
        assert page.get_by_label("noir").is_disabled()
        page.get_by_text("Camera, light and style").tap()
        page.get_by_label("Movement").select_option("Camera pans left")
        page.get_by_role("button", name="Make the video").tap()
        card = page.locator("#videos > li").first
        card.get_by_text("Camera pans left. It turns round").wait_for()
        assert plays(card) == [int(side) for side in gateway.video(card.get_attribute("id"))["size"].split("x")]
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        back, text = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert brightness(back) < 60
        assert brightness(text) > 200
        assert page.evaluate("[localStorage.length, document.cookie, location.href]") == [0, "", f"{gateway.url}/"]
        # the form is again that of the video's model
        page.get_by_label("Model").select_option("wan2.2-t2v-a14b-tiny")
        page.locator(".drop").wait_for(state="detached")
        page.locator("#videos > li").first.get_by_role("button", name="Again").tap()
        page.get_by_role("alert").get_by_text("Add the image again").wait_for()
        assert page.get_by_label("Model").input_value() == "wan2.2-ti2v-5b-tiny"
        assert page.get_by_label("Prompt", exact=True).input_value() == "Camera pans left. It turns round"
        with window(chromium, gateway.url) as another:
            another.get_by_label("Key").wait_for()


def drop_image(page, content):
    page.locator(".drop").first.evaluate(
        """(place, bytes) => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([new Uint8Array(bytes)], "photo.png", { type: "image/png" }));
            place.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
        }""",
        list(content),
    )


def brightness(color):
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


def test_the_page_allows_nothing_from_elsewhere_and_nothing_inline(gateway):
    page = gateway.ask("GET", "/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert "unsafe" not in str(policy)
    html = page.body.decode()
    assert not re.search(r"https?://|<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    for path in re.findall(r'(?:src|href)="([^"]+)"', html):
        asset = gateway.ask("GET", path)
        assert asset.status == 200
        assert "immutable" in asset.headers["cache-control"]
    assert gateway.ask("GET", "/page/page.html").status == 404
    assert gateway.ask("GET", "/?model=%3Cscript%3E").status == 400
    foreign = gateway.ask("GET", "/?model=%3Cscript%3E").body.decode()
    assert "&lt;script&gt;" in foreign and "<script>" not in foreign


def model_of(engines, **limits):
    manifest = open_bundle(engines, "engines").manifest
    return ServedModel(manifest.spec.name, "wan22", manifest, Limits.of(manifest.spec, **limits))


def test_every_size_and_length_of_the_page_can_be_asked_for(tiny_engines):
    model = model_of(tiny_engines)
    made = {(size, count) for size, counts in offered(model).items() for count in counts}
    assert {("256x160", 17), ("160x256", 5)} <= made
    for size, count in made:
        make_order({"prompt": "x", "size": size, "num_frames": count}, model)
    smaller = offered(model_of(tiny_engines, max_frames=9))
    assert {count for counts in smaller.values() for count in counts} == {5, 9}


@pytest.mark.parametrize("body", [
    ("application/json", json.dumps({"prompt": "A fox", "look": ["Noir", "low angle shot"]}).encode()),
    ("application/json", json.dumps({"prompt": "A fox", "look": "noir, Low angle shot"}).encode()),
    ("application/x-www-form-urlencoded", b"prompt=A+fox&look[]=noir&look[]=Low+angle+shot"),
])  # fmt: skip
def test_looks_stand_before_the_prompt_and_in_the_echo(tiny_engines, body):
    order = make_order(read_body(*body), model_of(tiny_engines))
    wanted = "Night time, Hard lighting, Side lighting, Cool colors, Low angle shot. A fox"
    assert order.inputs["prompt"] == order.echo["prompt"] == wanted
    assert "look" not in order.echo


@pytest.mark.parametrize(
    "look", [["noire"], ["noir", "clay", "Day time", "Night time"], [7], ["Low angle shot", "Orbit shot"]]
)
def test_wrong_looks_name_the_field(tiny_engines, look):
    with pytest.raises(ApiError) as refused:
        make_order(
            read_body("application/json", json.dumps({"prompt": "A fox", "look": look}).encode()),
            model_of(tiny_engines),
        )
    assert (refused.value.status, refused.value.param) == (400, "look")


def test_what_a_client_is_told_asks_for_the_same_with_every_preset(tiny_engines):
    model = model_of(tiny_engines)
    for preset in presets_for("t2v"):
        first = make_order({"prompt": "A fox", "preset": preset, "seed": 1}, model)
        told = {name: value for name, value in first.echo.items() if value is not None and name != "guidance_scale"}
        again = make_order(canonical(told), model)
        one, other = (parse_request(arrays_of(each.inputs), model.manifest, model.limits) for each in (first, again))
        assert one.request.switch_step == other.request.switch_step
        assert replace(one.request, boundary=None) == replace(other.request, boundary=None)


@in_browser
@pytest.mark.slow
def test_the_switch_has_the_prompt_rewritten_and_the_card_says_by_whom(triton, chromium, tmp_path):
    with (
        endpoint(answer_of(GOOD), (503, {})) as (there, asked),
        gateway_in_front(
            tmp_path / "data", [triton.url], "--finish-within", 0, "--extend", there.url, "--extend-model", "qwen"
        ) as gateway,
        window(chromium, gateway.url) as page,
    ):
        for number, (shown, by) in enumerate(((GOOD, "prompt by qwen at 127.0.0.1"), ("A cat", "status 503")), 1):
            page.get_by_label("Prompt", exact=True).fill("A cat")
            switch = page.get_by_label("Let a language model rewrite the prompt")
            switch.check()
            page.get_by_text("Make the video").click()
            card = page.locator(f"#videos .card:nth-last-child({number})")
            card.locator(".prompt", has_text=shown).wait_for()
            card.locator(".settings", has_text=by).wait_for()
        switch.uncheck()
        page.get_by_text("Make the video").click()
        page.locator("#videos .card:nth-last-child(3)").wait_for()
        assert len(asked) == 2
