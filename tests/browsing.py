"""The server's page in a browser, by what people see of it and do with it."""

import time
from collections.abc import Callable
from typing import Any

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys


class Page:
    """The page, by what people see of it and do with it."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser, self.url = browser, url
        browser.get(f"{url}/health")
        browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        browser.get_log("browser")
        browser.get(f"{url}/")

    def at(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[str]:
        return [found.text for found in self.browser.find_elements(By.CSS_SELECTOR, selector) if found.is_displayed()]

    def click(self, selector: str) -> None:
        self.browser.execute_script("arguments[0].click()", self.at(selector))

    def type(self, text: str, *keys: str) -> None:
        """Write a text into the draft at once, and press keys behind it."""
        self.browser.execute_script("arguments[0].focus()", self.at("#draft"))
        self.browser.execute_cdp_cmd("Input.insertText", {"text": text})
        self.at("#draft").send_keys(*keys)

    def until(self, true: Callable[[], Any]) -> None:
        """Wait for something. Kernels may have to be compiled first."""
        end = time.monotonic() + 100
        while True:
            try:
                if true():
                    return
            except StaleElementReferenceException:  # it was drawn anew meanwhile
                pass
            assert time.monotonic() < end, self.all("body")
            time.sleep(0.01)

    def done(self) -> None:
        """Wait for the end of an answer."""
        self.until(lambda: self.at("#send").is_displayed() and not self.at("#send").get_attribute("hidden"))

    def say(self, text: str) -> list[str]:
        """Send a text, and return the answers once the last one is whole."""
        self.type(text, Keys.ENTER)
        self.done()
        return self.answers()

    def answers(self) -> list[str]:
        return self.all("article.assistant > .text")

    def turns(self) -> list[str]:
        return self.all("article.user .text")

    @property
    def draft(self) -> Any:
        return self.at("#draft").get_property("value")

    def set(self, name: str, value: str) -> None:
        """Change a setting as a person does."""
        self.click("#tune")
        self.at(f"#settings [name={name}]").send_keys(value)
        self.click("#settings .ends .strong")

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]
