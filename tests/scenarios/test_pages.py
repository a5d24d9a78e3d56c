"""What people look at: a browser opens the report in every width and theme, and MLflow's pages."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

from docs.screenshots import check_page, find_browser, open_browser, take_screenshots
from pipeline.show_report import PAGE_WITH_VERDICT, show_report
from small_project import make_project, run_stages

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("embedded_store")]

NO_BROWSER = "Chromium and chromedriver are not installed: apt-get install chromium chromium-driver"


@pytest.fixture(scope="module", autouse=True)
def browser_is_installed() -> None:
    if find_browser() is None:
        assert not os.environ.get("CI"), NO_BROWSER
        pytest.skip(NO_BROWSER)


@pytest.fixture(scope="module")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_ROOT", "DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
            patch.delenv(name, raising=False)
        root = make_project(tmp_path_factory.mktemp("road"))
        run_stages(root, with_report=True)
        show_report(root)
    return root


@pytest.fixture(params=[(1200, False), (1200, True), (390, False), (390, True)], ids=str)
def browser(request: pytest.FixtureRequest) -> Iterator[webdriver.Chrome]:
    width, dark = request.param
    with open_browser(width, 900, dark=dark) as opened:
        yield opened


def test_report_is_seen_without_errors_and_requests(finished_project: Path, browser: webdriver.Chrome) -> None:
    seen = check_page(browser, finished_project / PAGE_WITH_VERDICT)
    charts = [figure for figure in seen.figures if figure["tag"] == "svg"]
    assert len(charts) >= 8
    assert any("on the frontier" in figure["alt"] and "milliseconds" in figure["alt"] for figure in charts)
    assert all(figure["width"] * figure["height"] > 100 and figure["alt"] for figure in seen.figures)
    assert (seen.errors, seen.requests) == ([], [])
    assert seen.overflow <= 0, "the page must not scroll sideways"
    for name in ("lenet", "resnet"):
        metrics = json.loads((finished_project / f"artifacts/evaluate/{name}/metrics.json").read_text())
        for metric in ("accuracy", "macro_f1", "log_loss"):
            cell = browser.find_element(By.CSS_SELECTOR, f'[data-metric="{name}/{metric}"]')
            assert cell.text == f"{metrics[f'test_{metric}']:.4f}"
    text = browser.find_element(By.TAG_NAME, "main").text
    assert "PROMOTE" in text, "the verdict is shown"
    assert "milliseconds for one image" in text
    assert "could not be drawn" not in text


def test_broken_page_is_noticed(finished_project: Path, tmp_path: Path) -> None:
    page = (finished_project / PAGE_WITH_VERDICT).read_text()
    policy = 'content="default-src'
    assert policy in page
    body = '<script>missing()</script><img src="http://127.0.0.1:9/a.png"><div style="width: 3000px">x</div></main>'
    broken = page.replace(policy, 'content="').replace("</main>", body)
    (tmp_path / "broken.html").write_text(broken)
    with open_browser(1200, 900) as browser:
        seen = check_page(browser, tmp_path / "broken.html")
    assert any("missing" in error for error in seen.errors)
    assert seen.requests == ["http://127.0.0.1:9/a.png"]
    assert seen.overflow > 0


def test_screenshots_show_the_report_and_the_pages_of_mlflow(finished_project: Path, tmp_path: Path) -> None:
    take_screenshots(finished_project, tmp_path)
    names = {file.name for file in tmp_path.glob("*.png")}
    assert {"report.png", "leaderboard.png", "curves.png"} <= names
    for name in names:
        assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 10, f"{name} is nearly empty"
