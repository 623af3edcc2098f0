"""The demonstration page in a headless Chromium; skipped where there is none.

Needs gradio, selenium, chromium and chromedriver (Debian: chromium chromium-driver).
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
from test_inspection import noise, write_pretrained

pytest.importorskip("gradio")
pytest.importorskip("matplotlib")
webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
DRIVER = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_pretrained(tmp_path_factory.mktemp("demo") / "student")
    model = os.environ.get("SPEAR_DEMO_MODEL") or str(folder)
    extra = os.environ.get("SPEAR_DEMO_OPTIONS", "").split()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cmd = [sys.executable, "-m", "espnet2_spear.bin.spear_demo", "--model", model]
    process = subprocess.Popen([*cmd, "--port", str(port), *extra])
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=5)
            break
        except OSError:
            assert process.poll() is None, "the page's server ended"
            time.sleep(0.2)
    yield url
    process.terminate()
    process.wait(timeout=120)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{word}")
    options.add_argument("--window-size=1200,1900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


def wait_for(driver, selector: str, count: int = 1, seconds: float = 90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = driver.find_elements("css selector", selector)
        if len(found) >= count:
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {selector} on the page")


def test_drop_audio_and_look(address: str, browser, tmp_path: Path) -> None:
    recording = os.environ.get("SPEAR_DEMO_AUDIO")
    if not recording:
        recording = str(tmp_path / "a.wav")
        soundfile.write(recording, noise(2.0).numpy(), 16000)
    browser.get(address)
    wait_for(browser, "#look")
    # Without audio the visitor is told what to do.
    browser.find_element("css selector", "#look").click()
    wait_for(browser, ".toast-body")
    assert "Drop or record some audio first" in browser.page_source
    browser.find_element("css selector", "input[type=file]").send_keys(recording)
    wait_for(browser, "#component-0 audio, audio, [data-testid*=waveform]")
    browser.find_element("css selector", "#look").click()
    for name in ("fbank", "similarity", "tokens"):
        (image, *_) = wait_for(browser, f"#{name} img")
        size = browser.execute_script(
            "return [arguments[0].naturalWidth, arguments[0].naturalHeight]", image
        )
        assert min(size) > 100
    note = browser.find_element("css selector", "#note textarea")
    assert " s at " in note.get_attribute("value")
    extra = os.environ.get("SPEAR_DEMO_OPTIONS", "").split()
    if "--asr" in extra:
        (text,) = wait_for(browser, "#text textarea")
        assert text.get_attribute("value").strip()
    if "--cls" in extra:
        (tags, *_) = wait_for(browser, "#tags")
        assert "%" in tags.text
    picture = Path(os.environ.get("SPEAR_DEMO_SCREENSHOT", tmp_path / "page.png"))
    browser.save_screenshot(str(picture))
    assert picture.stat().st_size > 10_000
