"""Pages as people see them: Chromium without a screen, driven by Playwright; skipped, with the reason, where one of them is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium whose pages are opened with `look`."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e .[test-browser]")
    with driver.sync_playwright() as started:
        own = started.chromium.executable_path  # that of `playwright install chromium`
        found = [shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome")] + [own]
        path = next((p for p in found if p and Path(p).exists()), None)
        if path is None:
            pytest.skip("needs a Chromium: apt-get install chromium (or playwright install chromium)")
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has none
        with started.chromium.launch(executable_path=path, args=sandbox) as chromium:
            yield chromium


@contextmanager
def look(chromium: Any, address: str, width: int, height: int = 900, offline: bool = False) -> Iterator[Any]:
    """The page at an address; anything it complains of, on its console or of what it could not load, fails the test."""
    complaints: list[str] = []
    with chromium.new_context(viewport={"width": width, "height": height}, offline=offline) as context:
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"{request.url}: {request.failure}"))
        page.goto(address)
        yield page
    assert not complaints, complaints


def scrolls_sideways(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


def colours(screenshot: Path) -> int:
    """How many colours a picture has: one where nothing is drawn."""
    from PIL import Image

    return len(np.unique(np.asarray(Image.open(screenshot).convert("RGB")).reshape(-1, 3), axis=0))
