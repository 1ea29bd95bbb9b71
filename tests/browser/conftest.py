"""Debian's Chromium, driven by Playwright. Without it these tests are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

_axe = Axe()


# Of a module: as long as Playwright runs, there is a running event loop in this thread.
@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    # As root its sandbox cannot be; what it reads is ours alone.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    home = str(tmp_path_factory.mktemp("chromium"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=arguments, env={**os.environ, "HOME": home, "TMPDIR": home})
        yield browser
        browser.close()


@pytest.fixture
def look() -> Callable[[Page, str], None]:
    """Looks at a page as axe does, and keeps a picture of it where KACHERY_TEST_PICTURES says."""

    def look(page: Page, name: str) -> None:
        found = _axe.run(page)
        assert found.violations_count == 0, found.generate_report()
        # Nothing is wider than the window, on a phone neither.
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), name
        if directory := os.environ.get("KACHERY_TEST_PICTURES"):
            page.screenshot(path=Path(directory) / f"{name}.png", full_page=True, animations="disabled")

    return look
