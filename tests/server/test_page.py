"""The page at /, used in a real browser as people use it."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from extras import needs

webdriver = needs("selenium.webdriver", "dev", "test_door.py covers that the page is served")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    says = "install chromium and chromium-driver to test the page; test_door.py covers that it is served"
    pytest.skip(says, allow_module_level=True)

from browsing import Page
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from rwkv_cli.engine.choosing import Chooser
from rwkv_cli.server import chat

HOSTILE = "<img src=x onerror=alert(1)> **<b onclick=alert(2)>** [x](javascript:alert(3)) `<i>`"
LONG = "and so on " * 400
BREAK = "\x18"
"""Where a model that says this text breaks."""


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, downloads: Path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    folder = tmp_path_factory.mktemp("browser")
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={folder}"):
        options.add_argument(f"--{argument}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


class Script:
    """What the model says, one text for each answer, and what it was asked."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.seconds = 0.0
        """Time for a byte."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    made, read_body = Script(), chat.read_body

    async def read(*args: Any) -> Any:
        fields = await read_body(*args)
        made.asked.append(vars(fields)["_values"])
        return fields

    def sample(sampler: Chooser, _: Any) -> int:
        if "left" not in vars(sampler):
            vars(sampler)["left"] = [*made.texts.pop(0).encode(), 0]
        time.sleep(made.seconds)
        byte: int = vars(sampler)["left"].pop(0)
        if byte == ord(BREAK):
            raise RuntimeError("the model is broken")
        return byte

    monkeypatch.setattr(chat, "read_body", read)
    monkeypatch.setattr(Chooser, "sample", sample)
    return made


@pytest.fixture
def page(browser: Any, served: Any, script: Script) -> Page:
    del script  # it is in force before the page asks anything
    return Page(browser, served.url)


def test_a_chat_outlives_a_reload(page: Page, script: Script) -> None:
    text = "Grüße — 你好, 🙂! **Bold**, *slanted* and `code`.\n1. one\n   - two\n```py\nx = '<b>'\n```"
    script.texts = [text, "Again."]
    page.set("system", "Be brief.")
    page.set("temperature", "0.5")
    page.type("Hello", Keys.SHIFT, Keys.ENTER, Keys.NULL)
    (answer,) = page.say("world")
    assert "Grüße — 你好, 🙂! Bold, slanted and code." in answer
    assert page.all("article strong, article em, article li, article pre") == [
        "Bold", "slanted", "one\ntwo", "two", "x = '<b>'",
    ]  # fmt: skip
    page.type("half a th")
    page.browser.refresh()
    assert page.turns() == ["Hello\nworld"]
    assert page.answers() == [answer]
    assert page.draft == "half a th"
    assert page.say("ought") == [answer, "Again."]
    assert script.asked[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello\nworld"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "half a thought"},
    ]
    assert script.asked[1]["temperature"] == 0.5
    assert set(script.asked[1]) == {"model", "messages", "temperature", "stream", "stream_options"}
    assert page.complaints() == []


def test_escape_stops_and_keeps_what_came(page: Page, served: Any, script: Script) -> None:
    script.texts, script.seconds = [LONG, "Next."], 0.004
    page.type("Go", Keys.ENTER)
    page.until(lambda: "so on" in page.answers()[0])
    assert page.at("#log").get_attribute("aria-busy") == "true"
    page.type("", Keys.ESCAPE)
    page.done()
    (answer,) = page.answers()
    assert LONG.startswith(answer)
    assert page.all(".note") == ["Stopped."]
    page.until(lambda: served.host.scheduler.running == 0)
    assert page.say("And?")[1] == "Next."


def test_a_reload_amid_an_answer_keeps_what_came(page: Page, script: Script) -> None:
    script.texts, script.seconds = [LONG], 0.004
    page.type("Go", Keys.ENTER)
    page.until(lambda: "so on" in page.answers()[0])
    page.browser.refresh()
    assert "so on" in page.answers()[0]
    assert page.all(".note") == ["The page was closed here."]


def test_retry_edit_and_undo(page: Page, script: Script) -> None:
    script.texts = ["one", "two", "three", "four"]
    assert page.say("Count") == ["one"]
    page.click("[data-act=retry]")
    page.until(lambda: page.answers() == ["two"])
    page.done()
    page.click("#undo")
    assert page.answers() == ["one"]
    assert page.say("More") == ["one", "three"]
    page.type("a draft")
    page.click("[data-act=edit]")
    assert page.draft == "Count"
    assert page.say(" down") == ["four"]
    assert page.turns() == ["Count down"]
    assert page.draft == "a draft"
    page.browser.refresh()
    page.click("#undo")
    assert page.turns() == ["Count", "More"]
    assert page.answers() == ["one", "three"]
    assert page.draft == "Count down\n\na draft"
    page.click("#undo")
    assert page.turns() == ["Count"]
    assert page.draft == "More\n\nCount down\n\na draft"
    page.click("[data-act=edit]")
    page.type("x", Keys.ESCAPE)
    assert page.draft == "More\n\nCount down\n\na draft"


def test_hostile_text_stays_text(page: Page, script: Script) -> None:
    script.texts = [f"<think>{HOSTILE}</think>{HOSTILE}\n- <script>alert(4)</script>"]
    page.say(HOSTILE)
    page.click("summary")
    page.browser.refresh()
    page.click("summary")
    assert page.turns() == [HOSTILE]
    shown = "<img src=x onerror=alert(1)> <b onclick=alert(2)> [x](javascript:alert(3)) <i>"
    assert page.answers() == [f"{shown}\n<script>alert(4)</script>"]
    assert page.all(".thinking .text") == [shown]
    assert page.browser.find_elements(By.CSS_SELECTOR, "main img, main script, main b, main i, main a") == []
    assert page.complaints() == []
    page.browser.execute_script("try { document.body.innerHTML = '<i>' } catch {}")
    assert page.browser.find_elements(By.CSS_SELECTOR, "i") == []


def test_thinking_is_apart(page: Page, script: Script) -> None:
    script.texts, script.seconds = ["<think>" + "Why? " * 15 + "</think>So.", "Yes."], 0.004
    page.type("Think", Keys.ENTER)
    page.until(lambda: "Why?" in "".join(page.all(".thinking .text")))
    assert page.all("summary") == ["Thinking…"]
    page.done()
    assert page.answers() == ["So."]
    assert page.all(".thinking .text") == []
    assert page.all("summary")[0].startswith("Thought for ")
    page.say("Sure?")
    assert script.asked[1]["messages"][1] == {"role": "assistant", "content": "So."}


def test_errors_are_told_and_nothing_is_lost(page: Page, script: Script) -> None:
    page.set("think", "long")
    page.say("Hello")
    assert "does not reason" in page.all(".note.bad")[0]
    page.set("think", "as")
    script.texts = [f"Half a sen{BREAK}", "Whole."]
    page.click("[data-act=retry]")
    page.until(lambda: page.answers() == ["Half a sen"])
    page.done()
    assert page.all(".note.bad") == ["the answer failed; the server's operator sees why"]
    page.browser.refresh()
    assert page.turns() == ["Hello"]
    assert page.answers() == ["Half a sen"]
    page.click("[data-act=retry]")
    page.until(lambda: page.answers() == ["Whole."])


def test_a_server_that_is_gone(browser: Any, start: Any, script: Script) -> None:
    served = start()
    page = Page(browser, served.url)
    page.until(lambda: page.all("#model option"))
    script.texts, script.seconds = [LONG], 0.004
    page.type("Go", Keys.ENTER)
    page.until(lambda: "so on" in page.answers()[0])
    served.host.scheduler.close(0)
    page.done()
    assert LONG.startswith(page.answers()[0])
    assert page.all(".note.bad") == ["the server is about to stop"]
    served.stop()
    page.say("Still there?")
    assert page.all(".note.bad")[1] == "The server does not answer. It may have stopped."
    assert page.turns() == ["Go", "Still there?"]


def test_a_stream_may_be_cut_anywhere(page: Page) -> None:
    told = page.browser.execute_async_script(
        """
        const done = arguments[0];
        const event = (text) => `data: ${JSON.stringify({ choices: [{ delta: { content: text } }] })}\\r\\n\\r\\n`;
        const bytes = new TextEncoder().encode(event("你") + ": waiting\\n\\n" + event("🙂é"));
        const body = () => new ReadableStream({
          start(controller) { for (const byte of bytes) controller.enqueue(Uint8Array.of(byte)); },
          pull(controller) { controller.error(new TypeError("network error")); },
        });
        window.fetch = async () => new Response(body());
        import("/server.js").then(async ({ answer }) => {
          const { signal } = new AbortController();
          let text = "";
          try {
            for await (const event of answer({}, "", signal)) text += event.choices[0].delta.content;
          } catch (error) {
            done([text, error.message]);
          }
        });
        """
    )
    assert told == ["你🙂é", "The server went away before the end of the answer."]


def test_a_server_with_a_key(browser: Any, start: Any, script: Script) -> None:
    page = Page(browser, start(api_key="secret").url)
    for key in ("wrong", "secret"):
        page.until(lambda: page.at("#door").is_displayed())
        page.at("#key").send_keys(key, Keys.ENTER)
    page.until(lambda: page.all("#model option") == ["tiny", "other"])
    script.texts = ["Welcome."]
    assert page.say("Hello") == ["Welcome."]
    page.browser.refresh()
    page.until(lambda: page.all("#model option"))
    assert not page.at("#door").is_displayed()


def test_conversations_have_names_and_leave_as_a_file(page: Page, script: Script, downloads: Path) -> None:
    script.texts = ["one", "two"]
    page.say("First")
    page.click("#new")
    page.say("Second")
    assert page.all("#list .open") == ["Second", "First"]
    page.click("#list li:last-child [data-act=rename]")
    page.at("#list input").send_keys("A name", Keys.ENTER)
    assert page.all("#list .open") == ["Second", "A name"]
    assert page.answers() == ["two"]
    page.click("#export")
    page.until(lambda: [*downloads.glob("*.json")])
    (file,) = downloads.glob("*.json")
    page.click("#list li [data-act=delete]")
    assert page.all("#list .open")[1:] == ["A name"]
    page.click("#toast button")
    assert page.answers() == ["two"]
    page.click("#list li [data-act=delete]")
    page.click("#list li:last-child [data-act=delete]")
    page.browser.refresh()
    assert len(page.all("#list .open")) <= 1
    page.at("#file").send_keys(str(file))
    page.until(lambda: len(page.all("#list .open")) > 1)
    assert {"Second", "A name"} <= set(page.all("#list .open"))
    page.click("#list li:last-child .open")
    assert page.answers() == ["one"]
    evil = file.with_name("evil.json")
    evil.write_text(
        json.dumps({"conversations": [{"id": "x", "messages": [{"role": HOSTILE, "content": 5}, None]}, 7]})
    )
    for wrong in (evil, Path(__file__)):
        page.at("#file").send_keys(str(wrong))
        page.until(lambda: page.all("#toast"))
    assert page.answers() == ["one"]


def test_dark_light_and_narrow(page: Page, browser: Any) -> None:
    def ground() -> str:
        return str(page.at("body").value_of_css_property("background-color"))

    before = ground()
    page.click("#theme")
    assert ground() != before
    browser.refresh()
    assert ground() != before
    assert page.at("#theme").get_attribute("aria-pressed") in ("true", "false")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    )
    page.until(lambda: not page.at("#side").is_displayed())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    page.click("#menu")
    page.until(lambda: page.at("#new").is_displayed())
    page.at("#new").send_keys(Keys.ESCAPE)
    page.until(lambda: not page.at("#side").is_displayed())
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_has_a_name(page: Page, script: Script) -> None:
    script.texts = ["```\ncode\n```"]
    page.say("Hello")
    unnamed = page.browser.execute_script(
        "return [...document.querySelectorAll('button, input:not([hidden]), select, textarea')].filter("
        "(e) => !(e.textContent.trim() && e.tagName === 'BUTTON') && !e.ariaLabel && !e.labels?.length)"
        ".map((e) => e.outerHTML)"
    )
    assert unnamed == []
    assert page.browser.switch_to.active_element == page.at("#draft")
    page.until(lambda: page.browser.execute_script("return document.querySelector('#status').textContent") != "")
