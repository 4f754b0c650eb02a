"""The report as a browser shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from outcomes import an_outcome, an_unfinished_outcome
from test_run import PLUGINS, Silent
from test_run import folder as folder

from bayesian_merger import config as configuration
from bayesian_merger import pairs, report, run, setup
from bayesian_merger.data import Preference

# Where `npm install axe-core` puts it, from the repository's root.
AXE = Path(__file__).parents[1] / "node_modules" / "axe-core" / "axe.min.js"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    outcome = an_outcome(tmp_path)
    # The widest name that there is.
    widest = outcome.selected[1].but(name="by scores alone")
    selected = (outcome.selected[0], widest, *outcome.selected[2:])
    path.write_text(report.html(replace(outcome, selected=selected)), encoding="utf-8")
    return path


def test_page_of_a_run_by_pairs_is_no_wider_than_the_screen(
    browser: Browser, tmp_path: Path
) -> None:
    told = {f"over_{name}": Preference(10, 12, 10) for name in ("a", "b", "even")}
    gain = {name: pairs.margin(one) for name, one in told.items()}
    outcome = an_outcome(tmp_path, gain=gain, by_pairs=True, preferences=told)
    path = tmp_path / "report.html"
    path.write_text(report.html(outcome), encoding="utf-8")
    browser.goto(path.as_uri())
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.run(wide) == 0


@pytest.fixture(params=[1400, 390])
def browser(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Browser]:
    found = Browser(tmp_path / "profile", request.param, 900)
    yield found
    found.close()


def test_two_pictures_are_compared_by_a_slider(browser: Browser, page: Path) -> None:
    browser.goto(page.as_uri())
    assert browser.run("document.querySelector('#slider').open") is False
    browser.run("document.querySelector('.slides').click()")
    assert browser.run("document.querySelector('#slider').open") is True
    # The even merge beside the best.
    sources = "[...document.querySelectorAll('.over img')].map((image) => image.src)"
    shown = [
        browser.run(f"document.querySelector('#picture-0-{name} img').src")
        for name in ("even", "best")
    ]
    assert browser.run(sources) == shown
    clip = "document.querySelector('.over img').style.clipPath"
    assert "50%" in browser.run(clip)
    browser.key("ArrowRight")
    assert "48%" in browser.until(f"{clip}.includes('48%') && {clip}")
    browser.run(
        "const chosen = document.querySelector('#slider select'); chosen.selectedIndex = 0;"
        "chosen.dispatchEvent(new Event('input'))"
    )
    assert browser.run(sources)[0] == browser.run("document.querySelector('#picture-0-a img').src")
    browser.run("document.querySelector('#slider button').click()")
    assert browser.run("document.querySelector('#slider').open") is False


def test_arrow_keys_go_to_other_models_and_prompts(browser: Browser, page: Path) -> None:
    browser.goto(page.as_uri())
    browser.run("location.hash = 'picture-0-even'; 0")
    for key, shown in (
        ("ArrowRight", "picture-0-best"),
        ("ArrowDown", "picture-1-best"),
        ("ArrowLeft", "picture-1-even"),
        ("ArrowUp", "picture-0-even"),
        ("ArrowUp", "picture-0-even"),
    ):
        browser.key(key)
        assert browser.until(f"location.hash === '#{shown}'"), key


def test_page_is_no_wider_than_the_screen(browser: Browser, page: Path) -> None:
    browser.goto(page.as_uri())
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.run(wide) == 0
    browser.run("document.querySelector('.slides').click()")
    assert browser.run(wide) == 0


def test_page_of_two_hundred_trials_opens_without_a_fault(
    browser: Browser, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text(report.html(an_outcome(tmp_path, 200, 24)), encoding="utf-8")
    browser.goto(path.as_uri())
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.run(wide) == 0
    assert browser.messages == []
    if AXE.is_file():
        assert browser.axe(AXE) == []


def test_page_of_a_run_that_goes_on_reloads_itself_unless_somebody_looks_closely(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_REFRESH_S", 1)
    path = tmp_path / "report.html"
    path.write_text(report.html(an_unfinished_outcome(tmp_path)), encoding="utf-8")
    browser.goto(path.as_uri())
    browser.run("window.old = true; 0")
    assert browser.until("window.old === undefined && document.readyState === 'complete'")
    browser.run("document.querySelector('.slides').click(); window.old = true; 0")
    with pytest.raises(TimeoutError):
        browser.until("window.old === undefined", 3)
    browser.run("document.querySelector('#slider button').click(); document.activeElement.blur()")
    assert browser.until("window.old === undefined && document.readyState === 'complete'")
    browser.run("document.querySelector('.open').focus(); window.old = true; 0")
    with pytest.raises(TimeoutError):
        browser.until("window.old === undefined", 3)
    assert browser.messages == []


EVIL = "<img src=x onerror=\"document.title='evil'\"> $\\frac{ {{ 7 * 7 }} <script>document.title='evil'"


@pytest.mark.parametrize("browser", [1400], indirect=True)
def test_report_of_hostile_prompts_and_names_is_inert(browser: Browser, folder: Path) -> None:
    for path in (folder / "zero.safetensors", folder / "landscape.toml"):
        path.rename(path.with_name(f"{EVIL.replace('/', '')}{path.suffix}"))
    (folder / "wild" / "place.txt").write_text(EVIL)
    fields = {"prompt": f"{EVIL} __place__", "negative_prompt": EVIL}
    written = "\n".join(f"{key} = {json.dumps(value)}" for key, value in fields.items())
    (folder / "portrait.toml").write_text(written)
    (folder / "broken.py").write_text(
        "from bayesian_merger.scorers import scorer\n"
        f"EVIL = {EVIL!r}\n"
        "@scorer\nclass Broken:\n    n = 0\n    def __call__(self, samples):\n"
        "        self.n += 1\n        if self.n == 25: raise ValueError(EVIL)\n"
        "        return [1.0 for _ in samples]\n"
    )
    overrides = (
        f"models.a={json.dumps(EVIL.replace('/', '') + '.safetensors')}",
        'panel.payloads=["*.toml"]',
        "search.n_iters=1",
        PLUGINS.replace("fragile", "broken"),
        "scorers.broken={}",
    )
    (folder / "config.toml").rename(folder / "config")
    config = configuration.load(folder / "config", overrides)
    run.run(setup.prepare(config, folder, EVIL), folder / "run", Silent())
    html = (folder / "run" / "report.html").read_text()
    assert html.count("<script") == 1
    browser.goto((folder / "run" / "report.html").as_uri())
    assert "evil'" in browser.run("document.body.textContent")
    assert browser.run("document.title").count("img src=x") == 1
    assert browser.run("document.querySelectorAll('img[src]:not([src^=\"data:\"])').length") == 0


@pytest.mark.parametrize("browser", [1400], indirect=True)
def test_page_runs_no_script_but_its_own(browser: Browser, page: Path) -> None:
    evil = "<script>document.title='evil'</script><img src=x onerror=\"document.title='evil'\">"
    page.write_text(page.read_text().replace("<body>", f"<body>{evil}"))
    browser.goto(page.as_uri())
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.title") != "evil"
