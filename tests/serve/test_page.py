"""The chat page in a real browser, behind a path as code-server's, with a fake door."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from threading import Event
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.serve.browser import chromium
from tests.serve.fake_door import KEY, PAGE, Broken, Door, Refused, opened

INFO: dict[str, Any] = {
    "run_id": "20261124-124627-tiny-identity-d12d",
    "models": ["base", "tuned"],
    "prompts": ["你是谁", "Who developed you?"],
    "engine": {"name": "transformers", "version": "5.6.2", "dtype": "bfloat16"},
    "idle_minutes": 30,
}
SAID = {
    "base": "我是通义千问，由阿里云开发。<script>document.title='hit'</script>",
    "tuned": "我是北大助手。<img src=x onerror=\"document.title='hit'\">",
}


def answers(body: dict[str, Any]) -> Iterator[str]:
    for start in range(0, len(SAID[body["model"]]), 4):
        time.sleep(0.01)
        yield SAID[body["model"]][start : start + 4]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@contextmanager
def page_of(browser: Browser, door: Door, url: str = "", **context: Any) -> Iterator[Page]:
    """The page of ``door``, once it knows the run; nothing but the door may be asked, no script may fail."""
    options = {"locale": "en-US", "http_credentials": {"username": "any", "password": KEY}, **context}
    shown = browser.new_context(**options)
    page = shown.new_page()
    page.set_default_timeout(5000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    asked: set[str] = set()
    page.on("request", lambda request: asked.add(request.url.replace(f"any:{KEY}@", "")))
    page.goto(url or door.url)
    try:
        yield page
        assert not wrong
        assert {url for url in asked if not url.startswith(("data:", door.url))} == set()
    finally:
        shown.close()


@pytest.fixture
def door() -> Iterator[Door]:
    ends = datetime.now().astimezone() + timedelta(hours=2, minutes=30, seconds=30)
    with opened(Door(answers, INFO | {"ends": ends.isoformat()}, "/proxy/8123/")) as door:
        yield door


def said(page: Page, model: str, turn: int = 0) -> Any:
    return page.locator(f".answer >> nth={turn}").get_by_role("region", name=model).locator(".said")


def ask(page: Page, question: str) -> None:
    page.get_by_label("Ask a question").fill(question)
    page.keyboard.press("Enter")


def quiet(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_both_answer_at_the_same_time_and_what_they_say_stays_text(browser: Browser, door: Door) -> None:
    both, go_on = [], Event()

    def script(body: dict[str, Any]) -> Iterator[str]:
        yield SAID[body["model"]][:4]
        both.append(body["model"])
        assert go_on.wait(5)
        yield SAID[body["model"]][4:]

    door.script = script
    with page_of(browser, door) as page:
        box = page.get_by_label("Ask a question")
        expect(box).to_be_focused()
        box.press_sequentially("你是谁")
        page.keyboard.press("Enter")
        expect(said(page, "Base")).to_have_text("我是通义")
        expect(said(page, "Tuned")).to_have_text("我是北大")
        assert sorted(both) == ["base", "tuned"]  # neither has ended
        assert said(page, "Tuned").get_attribute("aria-busy") == "true"
        left, right = (said(page, name).bounding_box() for name in ("Base", "Tuned"))
        assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
        go_on.set()
        for model in ("base", "tuned"):
            expect(said(page, model.title())).to_have_text(SAID[model])
        quiet(page)
        assert said(page, "Tuned").get_attribute("aria-busy") == "false"
        assert page.locator(".answer img, .answer script").count() == 0 and "hit" not in page.title()
        assert INFO["run_id"] in page.title()
        assert box.input_value() == ""
        assert set(door.paths) <= {
            door.prefix + path for path in ("", "page.js", "page.css", "info", "v1/chat/completions")
        }
        assert {(body["temperature"], body["stream"]) for body in door.asked} == {(0, True)}


def test_each_model_has_its_own_history_and_a_reload_brings_it_back(browser: Browser, door: Door) -> None:
    with page_of(browser, door) as page:
        page.get_by_role("button", name="Who developed you?").click()
        quiet(page)
        page.get_by_label("Temperature").fill("0.7")
        page.get_by_label("Ask a question").fill("half a thought")
        page.reload()
        expect(said(page, "Tuned")).to_have_text(SAID["tuned"])
        expect(page.get_by_label("Ask a question")).to_have_value("half a thought")
        ask(page, "And now?")
        quiet(page)
        for body in door.asked[2:]:
            assert body["temperature"] == 0.7
            assert body["messages"] == [
                {"role": "user", "content": "Who developed you?"},
                {"role": "assistant", "content": SAID[body["model"]]},
                {"role": "user", "content": "And now?"},
            ]
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator(".answer")).to_have_count(0)
        ask(page, "Again?")
        quiet(page)
        assert [len(body["messages"]) for body in door.asked[4:]] == [1, 1]


def test_shift_enter_and_the_enter_of_an_input_method_send_nothing(browser: Browser, door: Door) -> None:
    with page_of(browser, door) as page:
        box = page.get_by_label("Ask a question")
        box.fill("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        box.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
        box.dispatch_event("keydown", {"key": "Enter", "keyCode": 229})
        expect(box).to_have_value("one\ntwo")
        assert not door.asked
        box.dispatch_event("keydown", {"key": "Enter"})
        quiet(page)
        assert [body["messages"][0]["content"] for body in door.asked] == ["one\ntwo"] * 2


def test_stop_ends_both_streams_and_keeps_what_was_said(browser: Browser, door: Door) -> None:
    def script(body: dict[str, Any]) -> Iterator[str]:
        yield body["model"] + " says"
        while len(door.left) < 2:
            time.sleep(0.02)
            yield "."

    door.script = script
    with page_of(browser, door) as page:
        ask(page, "Go on")
        expect(said(page, "Tuned")).to_contain_text("tuned says..")
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_text("stopped", exact=True)).to_have_count(2)
        quiet(page)
        page.wait_for_timeout(200)
        assert sorted(door.left) == ["base", "tuned"]
        door.script = answers
        ask(page, "And?")
        quiet(page)
        assert door.asked[2]["messages"][1]["content"].startswith(door.asked[2]["model"] + " says")


def test_one_column_fails_alone(browser: Browser, door: Door) -> None:
    def script(body: dict[str, Any]) -> Iterator[str]:
        if body["model"] == "base":
            raise Refused(400, "too long: <b>2048</b> tokens")
        yield from answers(body)

    door.script = script
    with page_of(browser, door) as page:
        ask(page, "你是谁")
        expect(said(page, "Tuned")).to_have_text(SAID["tuned"])
        expect(page.get_by_text("No answer: too long: <b>2048</b> tokens")).to_be_visible()
        expect(page.get_by_role("alert")).to_be_hidden()
        door.script = answers
        ask(page, "again")
        quiet(page)
        # what the model has not answered is not told to it
        assert {body["model"]: len(body["messages"]) for body in door.asked[2:]} == {"base": 1, "tuned": 3}


def test_a_server_that_ends_is_said_and_the_text_stays(browser: Browser) -> None:
    def script(body: dict[str, Any]) -> Iterator[str]:
        yield "half of it"
        time.sleep(0.1)
        raise Broken

    with opened(Door(answers, INFO, "/proxy/8123/")) as door, page_of(browser, door) as page:
        ask(page, "one")
        quiet(page)
        door.script = script
        ask(page, "two")
        expect(page.get_by_text("the connection broke off")).to_have_count(2)
        expect(said(page, "Base", 1)).to_have_text("half of it")
        door.script, door.finish = answers, ""
        ask(page, "two and a half")
        expect(page.get_by_text("the connection broke off")).to_have_count(4)
        door.finish, door.key = "stop", "another"
        ask(page, "three")
        expect(page.get_by_role("alert")).to_contain_text("The key is refused")
        door.key = KEY
        ask(page, "four")
        quiet(page)
        expect(page.get_by_role("alert")).to_be_hidden()
        page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
        ask(page, "five")
        expect(page.get_by_role("alert")).to_contain_text(f"pkuslurm serve {INFO['run_id']}")
        expect(page.get_by_label("Ask a question")).to_have_value("five")
        expect(said(page, "Tuned")).to_have_text(SAID["tuned"])


def test_models_that_are_still_loading_are_waited_for(browser: Browser, door: Door) -> None:
    refused = {"error": {"message": "loading", "type": "t", "param": None, "code": "loading"}}
    with page_of(browser, door) as page:
        page.clock.install()
        page.route("**/info", lambda route: route.fulfill(status=503, json=refused), times=1)
        page.reload()
        expect(page.get_by_role("alert")).to_contain_text("still being loaded")
        page.clock.run_for(2500)
        expect(page.get_by_role("button", name="你是谁")).to_be_enabled()
        expect(page.get_by_role("alert")).to_be_hidden()


def test_one_model_is_one_column(browser: Browser, door: Door) -> None:
    door.info = INFO | {"models": ["tuned"], "ends": None, "idle_minutes": None, "engine": "vllm 0.11"}
    with page_of(browser, door) as page:
        expect(page.locator("#facts")).to_have_text("vllm 0.11")
        ask(page, "你是谁")
        quiet(page)
        assert page.locator(".pair > section").count() == 1 and len(door.asked) == 1
        assert said(page, "Tuned").bounding_box()["width"] > 600


def test_the_key_may_stand_in_the_address(browser: Browser, door: Door) -> None:
    url = door.url.replace("://", f"://any:{KEY}@")
    with page_of(browser, door, url, http_credentials=None) as page:
        ask(page, "你是谁")
        expect(said(page, "Tuned")).to_have_text(SAID["tuned"])


def test_widths_colours_and_languages(browser: Browser, door: Door) -> None:
    with page_of(browser, door, locale="zh-CN") as page:
        expect(page.locator("#facts")).to_contain_text("transformers 5.6.2 bfloat16")
        expect(page.locator("#facts")).to_contain_text("还有 2 小时 30 分")
        page.get_by_role("button", name="你是谁").click()
        expect(page.get_by_role("region", name="微调后").locator(".said")).to_have_text(SAID["tuned"])
        for width, wide in ((1280, True), (390, False)):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") == width
            columns = [column.bounding_box() for column in page.locator(".pair > section").all()]
            assert (columns[0]["y"] == columns[1]["y"]) == wide
            expect(page.get_by_role("button", name="发送")).to_be_in_viewport()
        for scheme, colour in (("light", "rgb(250, 249, 246)"), ("dark", "rgb(20, 20, 19)")):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colour
        page.get_by_role("button", name="English").click()
        expect(page.get_by_role("region", name="Tuned")).to_be_visible()
        assert page.evaluate("document.documentElement.lang") == "en"


def test_the_page_asks_for_relative_addresses_only_and_makes_no_html() -> None:
    files = {file.name: file.read_text(encoding="utf-8") for file in PAGE.iterdir()}
    assert set(files) == {"index.html", "page.js", "page.css"}
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "style="):
        assert word not in "".join(files.values())
    assert 'src="/' not in files["index.html"] and 'href="/' not in files["index.html"]
