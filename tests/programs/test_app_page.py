"""The page of app.py in a real Chromium, without a window, driven by Debian's chromium-driver.

    python -m tests.programs.test_app_page examples/app.png       draws the README's picture of it
"""

import base64
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from tests.runs import MEADOW, ROOT

DRIVER = shutil.which("chromedriver")
BALL = [[106, 90], [74, 108]]  # in the meadow: from where, and to where it is dragged


class Browser:
    """One window, by the WebDriver protocol: JSON over HTTP"""

    def __init__(self, downloads, width=1360, height=900):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.root = f"http://127.0.0.1:{s.getsockname()[1]}"
        port = self.root.rpartition(":")[2]
        self.driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait(lambda: answers(f"{self.root}/status"))
        chrome = {"args": ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                           f"--window-size={width},{height + 200}"]}  # the mouse does not leave the window
        wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self.send("/session", {"capabilities": {"alwaysMatch": wanted}})
        self.root += f"/session/{made['sessionId']}"
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.order("Emulation.setDeviceMetricsOverride", **metrics)
        self.order("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    def send(self, path, said):
        body = json.dumps(said).encode()
        request = urllib.request.Request(self.root + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["value"]

    def order(self, name, **params):
        return self.send("/goog/cdp/execute", {"cmd": name, "params": params})

    def run(self, script, *given):
        return self.send("/execute/sync", {"script": script, "args": given})

    def until(self, condition, patience=100):
        wait(lambda: self.run(f"return Boolean({condition})"), patience)

    def click(self, *selectors):
        for selector in selectors:
            self.run("document.querySelector(arguments[0]).click()", selector)

    def drag(self, *points):
        """The mouse, over points of the picture"""
        places = [self.run("const r = view.getBoundingClientRect(), [x, y] = arguments;"
                           "return [r.left + pad + k * x, r.top + pad + k * y].map(Math.round)", *p) for p in points]
        moves = [{"type": "pointerMove", "duration": 40, "x": x, "y": y} for x, y in places]
        steps = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        self.send("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": steps}]})

    def keys(self, text):
        self.run("view.focus()")
        steps = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self.send("/actions", {"actions": [{"type": "key", "id": "keys", "actions": steps}]})

    def open_file(self, path):
        found = self.send("/element", {"using": "css selector", "value": "#file"})
        self.send(f"/element/{next(iter(found.values()))}/value", {"text": str(path)})

    def save_picture(self, path):
        shot = self.order("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        urllib.request.urlopen(urllib.request.Request(self.root, method="DELETE"), timeout=60).close()
        self.driver.terminate()
        self.driver.wait()


def wait(condition, patience=100):
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def answers(address):
    try:
        urllib.request.urlopen(address, timeout=10).close()
    except OSError:
        return False
    return True


def start(folder):
    """-> the program, its address"""
    argv = [sys.executable, "app.py", "--port", "0", "--folder", folder, "--device", "cpu", "--precision", "fp32"]
    program = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return program, program.stdout.readline().split()[-1]


def open_meadow(browser, address):
    browser.send("/url", {"url": address})
    browser.until("picture && polygons.length")
    browser.open_file(MEADOW)
    browser.until("polygons.length > 12")  # the first scene has fewer


def finish(browser, **form):
    """Run what is on the page -> the job"""
    for name, value in form.items():
        browser.run("$(arguments[0]).value = arguments[1]", name, value)
    before = browser.run("return shown")
    browser.click("#run")
    browser.until(f"shown !== {json.dumps(before)} && /done|failed/.test(jobs.get(shown)?.state)")
    return browser.run("return jobs.get(shown)")


@pytest.mark.slow
@pytest.mark.skipif(not DRIVER, reason="needs chromium and chromium-driver")
def test_both_tabs_from_a_photo_to_a_result(tmp_path):
    gallery, downloads = tmp_path / "gallery", tmp_path / "downloads"
    downloads.mkdir()
    program, address = start(gallery)
    browser = Browser(downloads)
    try:
        open_meadow(browser, address)

        # A collage: dragged, mirrored by a key, undone and redone; its preview is the server's
        browser.drag(*BALL)
        browser.keys("m")
        browser.keys("\ue013")  # arrow up
        edits = browser.run("return pieces.map(p => p.edits)")
        assert [[*{*edit} - {"about"}] for edit in edits[0]] == [["translate"], ["mirror"], ["translate"]]
        browser.click("[data-do=undo]", "[data-do=undo]", "[data-do=redo]")
        assert browser.run("return pieces.map(p => p.edits)") == [edits[0][:2]]
        browser.until("truth")
        browser.click("[data-do=exportEdits]", "[data-do=exportPicture]")
        wait(lambda: (downloads / "edits.json").exists() and (downloads / "picture.png").exists())
        collage = finish(browser, steps=3)
        assert collage["state"] == "done" and browser.run("return !$('slide').hidden")
        sample.main(["--collage", str(downloads / "edits.json"), "--steps=3", "--precision=fp32", "--device=cpu",
                     f"--out={tmp_path / 'out.png'}"])
        ours = np.asarray(Image.open(tmp_path / "out.png"))
        assert np.abs(ours - np.asarray(Image.open(gallery / collage["id"] / "out.png"), int)).max() <= 1

        # A change map: a stroke of the brush is black where it passed
        browser.click("#tab-map")
        browser.drag((20, 20), (60, 20), (100, 20))
        browser.run("pressed({x: 20, y: 100}); moved({x: 60, y: 100})")
        browser.keys("\ue00c")  # Escape: the stroke is given up
        made = finish(browser, steps=3)
        drawn = np.asarray(Image.open(gallery / made["id"] / "map.png"))
        assert made["state"] == "done" and (drawn[20, 20:100] == 0).all() and (drawn[60:] == 255).all()

        # An error is said in the page; a job that runs is cancelled
        browser.run("$('guidance').value = ''")
        browser.click("#run", "[data-do=fan]")
        assert browser.run("return jobs.size") == 2  # an empty field is not 0
        browser.run("$('guidance').value = 1; $('negative').value = 'snow'")
        browser.click("#run")
        browser.until("/guidance/.test($('error').textContent) && !$('error').hidden")
        browser.click("[data-do=closeError]")
        browser.run("$('steps').value = 1000; $('guidance').value = 2; $('negative').value = ''")
        browser.click("#run")
        browser.until("jobs.get(shown)?.state === 'running' && $('samples').querySelector('img')")
        browser.click("[data-do=cancel]")
        browser.until("jobs.get(shown).state === 'cancelled'")

        # What is not here is not saved; an edit is not replaced unasked; one finger paints
        said = browser.run("return fetchBlob('/pictures/none').catch(error => error.message)")
        assert said.startswith("this picture")
        browser.run("window.confirm = text => { window.asked = text; }")
        browser.click("#show-edit", "[data-do=scene]")
        assert browser.run("return Boolean(asked) && picture.width === 128 && done.map.length === 1")
        for more in ({"isPrimary": False}, {"isPrimary": True, "button": 2}):
            browser.run("view.dispatchEvent(new PointerEvent('pointerdown', arguments[0]))", more)
            assert browser.run("return press") is None
        browser.run("$(arguments[0]).firstChild.focus(); showCard(jobs.get(arguments[0]))", made["id"])
        assert browser.run("return document.activeElement.parentNode.id") == made["id"]

        # A reload, and the collage as it was
        browser.send("/url", {"url": address})
        browser.until("picture && jobs.size === 3")
        browser.run("document.getElementById(arguments[0]).firstChild.click()", collage["id"])
        browser.until("shown && pieces.length")
        assert browser.run("return pieces.map(p => p.edits)") == [edits[0][:2]]
        assert browser.run("return [tab, $('steps').value]") == ["collage", "3"]
        assert [line for line in browser.send("/se/log", {"type": "browser"}) if "400" not in line["message"]] == []
    finally:
        browser.close()
        program.terminate()
        assert program.wait(60) == 143


def draw_page(path, folder):
    """The README's picture: both tabs' results, and a collage in the making"""
    program, address = start(folder)
    browser = Browser(folder)
    try:
        open_meadow(browser, address)
        browser.click("#tab-map")
        browser.run("fillGradient({x: 10, y: 60}, {x: 118, y: 60})")
        finish(browser, steps=30)
        browser.click("#tab-collage")
        browser.drag(*BALL)
        finish(browser, steps=30)
        browser.click("#show-edit")
        browser.until("truth")
        time.sleep(1)
        browser.save_picture(path)
    finally:
        browser.close()
        program.terminate()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        draw_page(Path(sys.argv[1]), folder)
