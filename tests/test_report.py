from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import (
    BLOCKS,
    a_recipe,
    a_result,
    an_outcome,
    an_unfinished_outcome,
    baselines,
    followed,
    pictures,
)
from PIL import Image

from bayesian_merger import pairs, report
from bayesian_merger.blocks import FLUX
from bayesian_merger.data import (
    Compromise,
    Estimate,
    Interval,
    Outcome,
    Preference,
    Prompt,
    Slice,
)

EVIL = "<script>alert('x')</script>\" onload=\"alert(1)"
VOID = {"meta", "link", "img", "input", "br", "line", "circle", "source"}


class Page(HTMLParser):
    """A page taken apart: its elements with their attributes, and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("th", "td", "h2", "p"):
            self.text += " "

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.elements if found == tag]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return an_outcome(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def html(finished: Outcome) -> str:
    return report.html(finished)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(report.html(an_unfinished_outcome(tmp_path_factory.mktemp("pictures"))))


def figures_by_id(page: Page) -> dict[str, dict[str, str]]:
    """Id of a picture's figure -> its image."""
    ids = [a["id"] for a in page.all("figure") if a["id"].startswith("picture-")]
    images = [a for a in page.all("img") if a.get("class") not in ("light", "dark")]
    return dict(zip(ids, images, strict=True))


def bytes_of(uri: str) -> bytes:
    return base64.b64decode(uri.split(",", 1)[1])


def test_page_opens_with_the_verdict(finished: Outcome, page: Page) -> None:
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == 1
    assert "The best merge beats A, B and the even merge on held-out seeds." in page.text
    assert tags.index("h1") < tags.index("table") < tags.index("img")


def test_page_is_well_formed_and_every_id_is_unique(page: Page) -> None:
    assert page.open == []
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_page_loads_nothing_from_the_network(html: str, page: Page) -> None:
    for _, attributes in page.elements:
        for key in ("src", "href", "srcset", "action", "poster", "data"):
            assert attributes.get(key, "#").startswith(("#", "data:"))
    style = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    policy = next(a for a in page.all("meta") if a.get("http-equiv", "").startswith("Content"))
    assert policy["content"].startswith("default-src 'none'")


def test_page_can_be_used_without_its_script(page: Page) -> None:
    assert all("hidden" in button for button in page.all("button"))
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    ids = {a["id"] for _, a in page.elements if "id" in a}
    assert {a["href"][1:] for a in page.all("a")} <= ids


def test_page_gives_every_image_a_text_and_a_size(page: Page) -> None:
    for image in page.all("img"):
        assert image["alt"]
        assert int(image["width"]) > 0
        assert int(image["height"]) > 0


def test_page_shows_each_gain_with_its_interval(page: Page) -> None:
    assert "over A +1.590 +1.310 to +1.870" in page.text
    assert "over B +1.770 +1.480 to +2.060" in page.text
    assert "over even +0.930 +0.700 to +1.160" in page.text


def test_gains_are_drawn_on_one_scale_with_zero(page: Page) -> None:
    dots = [float(circle["cx"].rstrip("%")) for circle in page.all("circle")]
    lines = [line for line in page.all("line") if line.get("class") != "zero"][:3]
    zero = float(next(a for a in page.all("line") if a.get("class") == "zero")["x1"].rstrip("%"))
    for dot, line, mean, low in zip(
        dots, lines, (1.59, 1.77, 0.93), (1.31, 1.48, 0.70), strict=True
    ):
        assert (dot - zero) / (dots[0] - zero) == pytest.approx(mean / 1.59, abs=0.01)
        left = float(line["x1"].rstrip("%"))
        assert (left - zero) / (dots[0] - zero) == pytest.approx(low / 1.59, abs=0.01)


def test_unsure_gain_is_drawn_unlike_a_sure_one(tmp_path: Path) -> None:
    gain = {"over_a": Interval(0.3, 0.1, 0.5), "over_b": Interval(0.1, -0.1, 0.3)}
    rows = [a["class"] for a in Page(report.html(an_outcome(tmp_path, gain=gain))).all("tr")
            if a.get("class") in ("sure", "unsure")]  # fmt: skip
    assert rows == ["sure", "unsure"]


def test_gain_of_a_single_image_has_no_known_error(tmp_path: Path) -> None:
    gain = {"over_a": Interval(0.0, -math.inf, math.inf)}
    outcome = an_outcome(tmp_path, gain=gain)
    assert "over A +0.000 error unknown" in Page(report.html(outcome)).text
    found = report.result_json(outcome)["gain"]["over_a"]
    assert found == {"mean": 0.0, "low": None, "high": None}


def test_gain_by_pairs_is_told_in_pairs(tmp_path: Path) -> None:
    told = {"over_a": Preference(17, 3, 4), "over_b": Preference(9, 11, 0)}
    gain = {name: pairs.margin(one) for name, one in told.items()}
    outcome = an_outcome(tmp_path, gain=gain, by_pairs=True, preferences=told)
    page = Page(report.html(outcome))
    assert "over A 85 % 64 % to 95 % (17 won, 3 lost, 4 alike)" in page.text
    assert "over B 45 % 26 % to 66 % (9 won, 11 lost, 0 alike)" in page.text
    assert (
        "In how many pairs of the same prompt and seed the best merge was preferred" in page.text
    )
    assert "a lead of 1 wins 73 % of pairs" in page.text
    found = report.result_json(outcome)["pairs"]["over_a"]
    assert found == {"won": 17, "lost": 3, "alike": 4}


def test_page_shows_the_same_prompts_in_a_b_even_and_best(finished: Outcome, page: Page) -> None:
    images = figures_by_id(page)
    assert list(images) == [
        f"picture-{p.index}-{name}"
        for p in finished.heldout_panel
        for name in ("a", "b", "even", "best")
    ]
    for prompt in finished.heldout_panel:
        assert f"seed {prompt.seed} · {prompt.prompt}" in page.text


def test_small_pictures_are_embedded_as_they_are_and_crisp(finished: Outcome, page: Page) -> None:
    images = figures_by_id(page)
    for name, paths in finished.pictures.items():
        for index, path in paths.items():
            image = images[f"picture-{index}-{name}"]
            assert bytes_of(image["src"]) == path.read_bytes()
            assert image["class"] == "tiny"


def test_large_pictures_are_embedded_as_jpegs_of_at_most_1024_pixels(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.effect_noise((1200, 1800), 80).convert("RGB").save(path)
    outcome = an_outcome(tmp_path, pictures={"a": {0: path}})
    (image,) = figures_by_id(Page(report.html(outcome))).values()
    assert image["src"].startswith("data:image/jpeg;")
    with Image.open(io.BytesIO(bytes_of(image["src"]))) as found:
        assert found.size == (683, 1024)
    assert (image["width"], image["height"]) == ("683", "1024")
    assert "class" not in image


def test_pictures_of_which_a_model_has_none_make_a_sheet(tmp_path: Path) -> None:
    outcome = an_outcome(tmp_path)
    for name in ("a", "b", "even", "best"):
        some = {key: own for key, own in outcome.pictures.items() if key != name}
        assert len(report.sheet(replace(outcome, pictures=some))) == 3
    assert report.sheet(replace(outcome, pictures={})) == {}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("postgresql+psycopg://host/db?user=me&password=hunter2", "postgresql+psycopg://host/…"),
        ("postgresql://me:pa/ss@h/db", "postgresql://h/…"),
        ("postgresql://me:p@ss@h/db", "postgresql://h/…"),
        ("http://127.0.0.1:7860", "http://127.0.0.1:7860"),
        ("sqlite:////home/alice/x.db", "sqlite:///…"),
        ("python /home/alice/score.py --fast", "python …/score.py --fast"),
        ("C:\\Users\\alice\\m.safetensors: cannot be read", "…/m.safetensors: cannot be read"),
        ("payloads/*.toml", "payloads/*.toml"),
        ("scorer a/b gave 1/2", "scorer a/b gave 1/2"),
    ],
)
def test_page_tells_no_folders_users_and_passwords(tmp_path: Path, value: str, shown: str) -> None:
    trial = a_result("trial 21", reason=f"the back end: {value}")
    outcome = an_outcome(tmp_path, config={"search": {"storage": value}})
    page = Page(report.html(replace(outcome, results=(*outcome.results, trial))))
    assert f"search.storage {shown}" in page.text
    assert f"the back end: {shown}" in page.text
    for secret in ("hunter2", "alice", "p@ss", "pa/ss"):
        assert secret not in page.text


@pytest.mark.parametrize("content", [None, b"not an image"], ids=["no file", "no image"])
def test_lost_picture_is_reported_and_does_not_stop_the_report(
    tmp_path: Path, content: bytes | None
) -> None:
    outcome = an_outcome(tmp_path)
    lost = outcome.pictures["b"][2]
    lost.unlink()
    if content is not None:
        lost.write_bytes(content)
    page = Page(report.html(outcome))
    assert page.text.count("picture missing") == 1
    assert set(figures_by_id(page)).isdisjoint({"picture-2-b"})
    assert len(figures_by_id(page)) == 15


def test_picture_that_the_panel_lost_count_of_is_not_shown(tmp_path: Path) -> None:
    paths = pictures(tmp_path, ("a",), 1)
    outcome = an_outcome(tmp_path, pictures={"a": {99: paths["a"][0]}})
    assert "No pictures have been saved yet." in Page(report.html(outcome)).text


def test_page_shows_the_first_prompts_of_a_long_panel_and_says_so(tmp_path: Path) -> None:
    outcome = an_outcome(tmp_path, n_images=30)
    page = Page(report.html(outcome))
    assert "The first 24 of 30, not picked by score." in page.text
    assert len(figures_by_id(page)) == 24 * 4


def test_page_gives_held_out_means_with_error_and_count_best_first(page: Page) -> None:
    table = page.text[page.text.index("mean value") :]
    rows = ["best 8.880 0.090 64", "even 7.950 0.100 64", "A 7.290 0.110 64", "B 7.110 0.120 64"]
    places = [table.index(row) for row in rows]
    assert places == sorted(places)


def test_page_says_what_the_candidates_had_before_and_which_was_chosen(
    finished: Outcome, page: Page
) -> None:
    assert finished.best is not None
    assert finished.best.value is not None
    expected = finished.candidates[0].value
    assert expected is not None
    assert (
        f"{finished.best.name} chosen {expected.mean:.3f} ± 0.200 "
        f"{finished.best.value.mean:.3f} ± 0.150"
    ) in page.text


def test_page_holds_the_weights_and_the_recipe_as_text(finished: Outcome, html: str) -> None:
    assert finished.best is not None
    assert report.best_log(finished.best.recipe).strip() in html
    assert "method = &#34;weighted_sum&#34;" in html
    assert f"IN00 = {finished.best.recipe.weights['alpha']['IN00']}" in html


def test_page_draws_a_network_for_each_weight_of_the_method(tmp_path: Path) -> None:
    weights = {"alpha": dict.fromkeys(BLOCKS, 0.25), "beta": dict.fromkeys(BLOCKS, 1.5)}
    outcome = an_outcome(tmp_path, best=a_result("trial 3", "select", 9.0, weights=weights))
    alts = [a["alt"] for a in Page(report.html(outcome)).all("img") if a.get("class") == "light"]
    assert any("by alpha: base 0.25" in alt for alt in alts)
    assert any("by beta: base 1.50" in alt for alt in alts)


def test_page_lists_failed_and_stopped_trials_with_their_reasons(tmp_path: Path) -> None:
    results = (
        *baselines(),
        a_result("trial 1", "explore", state="failed", reason="the scorer returned nan"),
        a_result("trial 2", "explore", state="stopped", reason="could no longer win"),
        a_result("trial 3", "explore", 7.0),
    )
    page = Page(report.html(an_outcome(tmp_path, results=results)))
    assert "trial 1 failed the scorer returned nan" in page.text
    assert "trial 2 stopped could no longer win" in page.text


def test_page_tells_time_and_images(page: Page, finished: Outcome) -> None:
    assert f"{finished.images} images, 1 min 30 s." in page.text
    assert "generate 1 min 12 s 79.3 %" in page.text


def test_page_shows_the_configuration_without_folders_and_secrets(tmp_path: Path) -> None:
    config = {
        "models": {"a": "/home/someone/models/a.safetensors", "b": r"C:\Users\someone\b.ckpt"},
        "backend": {"url": "http://someone:hunter2@localhost:7860", "api_key": "hunter2"},
        "search": {"n_iters": 40, "groups": [["IN00_alpha", "IN01_alpha"]], "freeze": {}},
        "plugins": ["/home/someone/mine.py"],
    }
    text = Page(report.html(an_outcome(tmp_path, config=config))).text
    assert "someone" not in text
    assert "hunter2" not in text
    for row in (
        "models.a …/a.safetensors",
        "models.b …/b.ckpt",
        "backend.url http://localhost:7860",
        "search.n_iters 40",
        "search.groups (IN00_alpha, IN01_alpha)",
        "search.freeze none",
        "plugins …/mine.py",
    ):
        assert row in text


def test_untrusted_text_is_shown_and_never_run(tmp_path: Path, page: Page) -> None:
    prompt = Prompt(0, EVIL, EVIL, 1, negative_prompt=EVIL)
    failed = a_result("trial 2", "explore", state="failed", reason=EVIL)
    recipe = a_recipe(method=EVIL)
    outcome = an_outcome(
        tmp_path,
        title=EVIL,
        models=(EVIL, "b"),
        config={EVIL: {"x": EVIL}},
        heldout_panel=(prompt,),
        results=(*baselines(), a_result(EVIL, "explore", 9.0), failed),
        best=a_result(EVIL, "select", 9.0).but(recipe=recipe),
        leader=a_result(EVIL, "explore", 9.0),
    )
    html = report.html(outcome)
    evil = Page(html)
    assert "<script>alert" not in html
    assert len(evil.all("script")) == len(page.all("script")) == 1
    assert not any(key.startswith("on") for _, attributes in evil.elements for key in attributes)
    assert evil.text.count("alert('x')") >= 8


def test_unfinished_page_says_so_and_reloads_itself(unfinished: Page, page: Page) -> None:
    refreshes = [a for a in unfinished.all("meta") if a.get("http-equiv") == "refresh"]
    assert len(refreshes) == 1
    assert refreshes[0]["content"].isdigit()
    assert "The run is not finished: 7 of 40 trials done" in unfinished.text
    assert "The leading merge" in unfinished.text
    assert not any(a.get("http-equiv") == "refresh" for a in page.all("meta"))
    # With its script it does so by itself, but for when somebody looks closely.
    assert [tag for tag, _ in unfinished.elements].count("noscript") == 1


def test_page_of_a_stopped_run_says_so_and_does_not_reload(tmp_path: Path) -> None:
    page = Page(report.html(an_unfinished_outcome(tmp_path), is_alive=False))
    assert "The run was stopped when this page was written" in page.text
    assert not any(a.get("http-equiv") == "refresh" for a in page.all("meta"))


def test_unfinished_page_pairs_the_baselines_pictures_with_the_search_panel(
    unfinished: Page,
) -> None:
    assert len(figures_by_id(unfinished)) == 3 * 4
    assert "seed 1 · " in unfinished.text
    assert "seed 1000" not in unfinished.text


def test_page_of_a_run_that_has_just_begun_renders(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"results": (), "leader": None, "pictures": {}, "seconds": {}}
    nothing |= {"expected": {}, "candidates": ()}
    page = Page(report.html(an_unfinished_outcome(tmp_path, config={}, images=0, **nothing)))
    assert "It is too early for a recommendation." in page.text
    assert "No pictures have been saved yet." in page.text


def test_page_repeats_byte_for_byte(finished: Outcome, html: str) -> None:
    assert report.html(finished) == html


def test_result_json_has_exactly_its_keys(finished: Outcome) -> None:
    found = report.result_json(finished)
    assert set(found) == {
        "images", "trials", "seconds", "heldout", "scores", "gradient_given_up",
        "gain", "pairs", "best", "verdict", "finished",
    }  # fmt: skip
    assert found["trials"] == {"complete": 19, "stopped": 0, "failed": 1}
    assert found["heldout"]["best"] == {"mean": 8.88, "se": 0.09, "n": 64}
    assert set(found["heldout"]) == {"a", "b", "even", "best"}
    assert found["gain"]["over_even"] == {"mean": 0.93, "low": 0.70, "high": 1.16}
    assert set(found["gain"]) == {"over_a", "over_b", "over_even"}
    assert finished.best is not None
    assert found["best"] == {
        "method": "weighted_sum",
        "weights": {"alpha": dict(finished.best.recipe.weights["alpha"])},
    }
    assert found["verdict"] == finished.verdict()
    assert found["finished"] is True
    assert found["seconds"]["generate"] == 71.5


def test_result_json_of_an_unfinished_run_has_the_same_keys_with_null(tmp_path: Path) -> None:
    found = report.result_json(an_unfinished_outcome(tmp_path))
    assert found["heldout"] == {"a": None, "b": None, "even": None, "best": None}
    assert found["gain"] == {"over_a": None, "over_b": None, "over_even": None}
    assert found["best"] == {"method": None, "weights": None}
    assert found["finished"] is False


def test_result_json_is_json_even_of_values_that_are_not_finite(tmp_path: Path) -> None:
    heldout = {"a": Estimate(math.nan, math.inf, 1)}
    found = report.result_json(an_outcome(tmp_path, heldout=heldout))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_best_log_is_base_blank_line_the_25_blocks_blank_line_for_each_weight() -> None:
    alpha = {block: n / 10 for n, block in enumerate(BLOCKS)}
    beta = dict.fromkeys(reversed(BLOCKS), 1.0) | {"base": -0.25, "IN00": 0.1 + 0.2}
    ones = ",1.0" * 24
    assert report.best_log(a_recipe({"alpha": alpha, "beta": beta})) == (
        "0.0\n\n"
        "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0,1.1,1.2,"
        "1.3,"
        "1.4,1.5,1.6,1.7,1.8,1.9,2.0,2.1,2.2,2.3,2.4,2.5"
        "\n\n"
        f"-0.25\n\n0.30000000000000004{ones}\n\n"
    )


def test_page_lists_compromises_and_what_the_baselines_have(tmp_path: Path) -> None:
    names = ("taste", EVIL)
    merges = tuple(
        Compromise(a_recipe(), {n: Estimate(8.0 + i, 0.25, 60) for n in names}) for i in range(2)
    )
    known = {b: {n: Estimate(7.0, 0.125, 16) for n in names} for b in ("a", "even", "b")}
    html = report.html(an_outcome(tmp_path, front=merges, front_baselines=known))
    page = Page(html)
    assert "Compromises" in page.text
    assert "2 9.000 ± 0.250 9.000 ± 0.250 A 7.000 ± 0.125 7.000 ± 0.125 even" in page.text
    assert EVIL not in html


def test_page_without_several_objectives_says_nothing_of_compromises(page: Page) -> None:
    assert "Compromises" not in page.text


def test_page_of_a_search_by_the_gradient_shows_the_ways_of_the_weights(tmp_path: Path) -> None:
    outcome = an_outcome(tmp_path, results=followed())
    where, found = report.first_slopes(outcome)
    assert where == "the even merge"
    # Two groups of two images: 2 and 3.
    assert found["IN00_alpha"].mean == pytest.approx(2.5)
    assert found["IN00_alpha"].se == pytest.approx(0.5)
    assert found["IN00_alpha"].n == 4
    assert "following the gradient" in report.html(outcome)
    assert "following the gradient" not in report.html(an_outcome(tmp_path))


def test_page_and_result_say_why_the_gradient_was_given_up(tmp_path: Path) -> None:
    outcome = an_outcome(tmp_path, results=followed(), given_up=f"no memory {EVIL}")
    html = report.html(outcome)
    assert "given up, and the search went on by the scores alone: no memory" in html
    assert EVIL not in html
    assert report.result_json(outcome)["gradient_given_up"] == f"no memory {EVIL}"
    assert report.result_json(an_outcome(tmp_path))["gradient_given_up"] is None


def test_page_tells_which_weights_matter(tmp_path: Path) -> None:
    places = (0.0, 0.5, 1.0)
    slices = {
        "IN00_alpha": Slice(0.5, places, tuple(Estimate(g, 0.1, 0) for g in (-0.2, 0.0, -0.1))),
        "OUT11_alpha": Slice(0.5, places, tuple(Estimate(g, 0.2, 0) for g in (0.1, 0.0, -0.9))),
    }
    page = Page(report.html(an_outcome(tmp_path, slices=slices)))
    assert "Which weights matter" in page.text
    alts = [image["alt"] for image in page.all("img")]
    told = "each would lose: OUT11_alpha 0.900 ± 0.200, IN00_alpha 0.200 ± 0.100."
    assert sum(told in alt for alt in alts) == 2  # light and dark
    assert "slices" not in report.figures(an_outcome(tmp_path))


def test_page_ends_its_headline_with_the_closest_rival_and_how_sure_that_is(page: Page) -> None:
    told = "held-out seeds: +0.930 over the even merge (95 % interval +0.700 to +1.160)."
    assert told in page.text


def test_headline_of_a_single_image_says_that_its_error_is_unknown(tmp_path: Path) -> None:
    gain = {"over_a": Interval(0.5, -math.inf, math.inf)}
    assert "+0.500 over A, its error unknown" in report.certainty(an_outcome(tmp_path, gain=gain))
    assert report.certainty(an_unfinished_outcome(tmp_path)) == ""


def test_page_gives_the_weights_in_one_line_and_as_a_preset(tmp_path: Path) -> None:
    weights = {"alpha": {**dict.fromkeys(BLOCKS, 0.5), "base": 0.1234567891, "OUT11": -0.25}}
    line = ",".join(["0.123457", *["0.5"] * 24, "-0.25"])
    assert report.one_line(a_recipe(weights)) == line
    assert report.preset(a_recipe(weights), "my: run,\t2") == f"my run 2\t{line}"
    two = a_recipe({"alpha": weights["alpha"], "beta": dict.fromkeys(BLOCKS, 1.0)})
    first, second = report.preset(two, "x").splitlines()
    assert first == f"x alpha\t{line}"
    assert second == "x beta\t" + ",".join(["1"] * 26)
    html = report.html(an_outcome(tmp_path))
    assert (
        f'id="preset" tabindex="0" aria-label="preset of supermerger">demo\t{"0.5,0.5"[:1]}'
        in html
    )


def test_preset_of_sdxl_has_26_numbers_and_that_of_flux_none() -> None:
    sdxl = replace(
        a_recipe(), architecture="sdxl", weights={"alpha": {"base": 1.0, "OUT08": 0.25}}
    )
    _, _, numbers = report.preset(sdxl, "x").partition("\t")
    assert len(numbers.split(",")) == 26
    assert numbers.split(",")[BLOCKS.index("OUT08")] == "0.25"
    assert report.preset(replace(sdxl, architecture="flux"), "x") == ""


def test_page_tells_what_each_of_several_scorers_thought(tmp_path: Path) -> None:
    of_it = {
        name: {"taste": Estimate(5.0 + k, 0.25, 8), "sharpness": Estimate(0.1 * k, 0.0001, 8)}
        for k, name in enumerate(("a", "b", "best", "even"))
    }
    outcome = an_outcome(tmp_path, by_scorer=of_it)
    page = Page(report.html(outcome))
    assert "By each scorer" in page.text
    assert "best 7.000 ± 0.250 0.200 ± 0.0001" in page.text
    scores = report.result_json(outcome)["scores"]
    assert scores["best"]["taste"] == {"mean": 7.0, "se": 0.25, "n": 8}
    alone = {name: {"taste": own["taste"]} for name, own in of_it.items()}
    assert "By each scorer" not in report.html(an_outcome(tmp_path, by_scorer=alone))


def test_noise_does_not_make_the_page_too_heavy(tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    paths = {name: dict.fromkeys(range(24), path) for name in ("a", "b", "even", "best")}
    panel = tuple(Prompt(i, "things", "noise", i, width=1024, height=1024) for i in range(24))
    assert len(report.html(an_outcome(tmp_path, heldout_panel=panel, pictures=paths))) < 15e6


@pytest.mark.parametrize(
    ("scorers", "value", "told"),
    [
        (["a"], {}, ""),
        (["a"], {"normalise": "rank"}, "is the score, taken as the share"),
        (["a", "b"], {}, "is the mean of the scores of an image, each normalised by mean"),
        (
            ["a", "b"],
            {"combine": "minimum", "normalise": "none"},
            "the smallest of the scores of an image.",
        ),
        (
            ["a", "b"],
            {"combine": "geometric"},
            "the geometric mean of the scores of an image, each taken",
        ),
    ],
)
def test_page_says_what_a_value_is(
    tmp_path: Path, scorers: list[str], value: dict[str, str], told: str
) -> None:
    config = {"scorers": {name: {"weight": 1.0} for name in scorers}, "value": value}
    text = Page(report.html(an_outcome(tmp_path, config=config))).text
    assert told in text
    assert ("A value is" in text) is bool(told)


def test_page_of_another_network_names_its_own_blocks(tmp_path: Path) -> None:
    weights = {"alpha": dict.fromkeys(FLUX.blocks, 0.5)}
    best = a_result("trial 1", value=8.0, weights=weights)
    best = best.but(recipe=replace(best.recipe, architecture="flux"))
    html = report.html(an_outcome(tmp_path, blocks=FLUX.blocks, best=best))
    assert f"{FLUX.blocks[0]}, then the blocks from {FLUX.blocks[1]} on" in html
    assert "from IN00 on" not in html
    assert "supermerger" not in html


def test_single_image_is_shown_without_an_error(tmp_path: Path) -> None:
    heldout = {"a": Estimate(7.1, 0.0, 1), "best": Estimate(8.0, 0.1, 4)}
    page = Page(report.html(an_outcome(tmp_path, heldout=heldout)))
    assert "A 7.100 unknown 1" in page.text


def test_pictures_are_the_smaller_the_more_there_are(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.effect_noise((1100, 1100), 30).convert("RGB").save(path)
    paths = {name: dict.fromkeys(range(24), path) for name in ("a", "b", "even", "best")}
    panel = tuple(Prompt(i, "things", "noise", i, width=1100, height=1100) for i in range(24))
    few = {name: dict(list(own.items())[:2]) for name, own in paths.items()}
    for kept, side in ((few, 1024), (paths, 500)):
        html = report.html(an_outcome(tmp_path, heldout_panel=panel, pictures=kept))
        sizes = {int(image["width"]) for image in figures_by_id(Page(html)).values()}
        assert sizes == {side}
        assert len(html) < 15e6
