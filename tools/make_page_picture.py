"""The picture of the web page for README, docs/page.png: the bundled storyteller is served, a browser chats with it.

python tools/make_page_picture.py        (needs chromium, chromium-driver and selenium, and `rwkv` beside this Python)
"""

import subprocess
import sys
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "page.png"
SIZE = (1180, 700)
TALKS = ["Tell me about a cat who could not sleep.", "A rainy day.", "Tell me a story about a brave little dog."]


def draw(address: str) -> None:
    """Chat, and save what the page shows."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    mouse = "blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars", mouse):
        options.add_argument(f"--{argument}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        width, height = SIZE
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(address)
        browser.implicitly_wait(20)
        browser.find_element(By.CSS_SELECTOR, "#model option")
        browser.find_element(By.ID, "tune").click()
        browser.find_element(By.NAME, "seed").send_keys("2")
        browser.find_element(By.CSS_SELECTOR, "#settings .ends .strong").click()
        for talk in TALKS:
            browser.find_element(By.ID, "new").click()
            browser.find_element(By.ID, "draft").send_keys(talk, Keys.ENTER)
            browser.find_element(By.CSS_SELECTOR, "[data-act=retry]")
        time.sleep(0.5)
        browser.save_screenshot(str(PICTURE))
    finally:
        browser.quit()


def main() -> None:
    command = [str(Path(sys.executable).with_name("rwkv")), "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            said = next(line for line in server.stderr if line.startswith("Serving "))
            draw(said.partition("/v1")[0].rpartition(" ")[2])
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
