"""A run that a person judges, who here is a thread that answers what is asked."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import Command
from test_cli import command as command
from test_run import Silent, measured
from test_run import folder as folder
from toy_plugin import TARGET

from bayesian_merger import album, infotext, pairing, pairs, run, setup, tryout, warm
from bayesian_merger import config as configuration
from bayesian_merger import outcome as outcomes
from bayesian_merger.data import Outcome, Prompt, Recipe, Result, Sample
from bayesian_merger.desk import JOURNAL, Answer, Desk
from bayesian_merger.errors import ConfigError, TrialError
from bayesian_merger.scorers import scorer
from bayesian_merger.values import JUNK

OPTIONS = (
    "scorers={ manual = { undo_s = 0.0 } }",
    "search.init_points=3",
    "search.n_iters=2",
    "search.images_per_trial=2",
    "heldout.images=4",
    "heldout.select_images=2",
    "panel.batch_size=2",
)


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image).mean())


def likeness(image: Image.Image) -> float:
    """Whether it looks like the merge that the toy's scorer wants."""
    stripes = (np.asarray(image)[0, ::2, 0] - 64.0) / 128
    return -float(np.abs(stripes - np.array(list(TARGET.values()))).mean())


class Person(Silent):
    """An observer in whose place somebody marks how bright a picture is, or chooses by a `taste`."""

    def __init__(
        self,
        patience: int = 10_000,
        skips: bool = False,
        skipped: range = range(0),
        taste: Callable[[Image.Image], float] = brightness,
    ) -> None:
        super().__init__()
        self.patience, self.skips, self.skipped, self.taste = patience, skips, skipped, taste
        self.n_answered = 0
        self.answers: list[Answer] = []
        self.desk: Desk | None = None

    def asked(self, desk: Desk) -> None:
        self.desk = desk
        threading.Thread(target=self._answer, args=(desk,), daemon=True).start()

    def judged(self, images: int, made: bool) -> None:
        super().judged(images, made)
        if self.n_answered >= self.patience:
            raise KeyboardInterrupt

    def _answer(self, desk: Desk) -> None:
        version = -1
        while not (state := desk.state(version, 1.0))["over"]:
            version, asked = state["version"], state["question"]
            if not asked:
                continue
            liked = []
            for number in range(asked["pictures"]):
                data = desk.picture(asked["key"], number)
                assert data
                with Image.open(io.BytesIO(data)) as image:
                    liked.append(self.taste(image))
            answer: Answer = min(10, max(0, round((liked[0] - 64) / 12.8)))
            if len(liked) == 2:
                answer = "left" if liked[0] > liked[1] else "right"
            is_skipped = self.skips and asked["seed"] % 3 == 0
            if is_skipped or self.n_answered in self.skipped:
                answer = "skip"
            self.n_answered += desk.answer(asked["key"], answer)
            self.answers.append(answer)


def start(folder: Path, observer: Silent, *more: str, into: str = "run") -> Outcome:
    config = configuration.load(folder / "config.toml", (*OPTIONS, *more))
    # Of a table in a table an override cannot say that a key is gone.
    config = config.model_copy(update={"scorers": {"manual": config.scorers["manual"]}})
    ready = setup.prepare(config, folder, "toy")
    return run.run(ready, folder / into, observer, report=False)


def test_run_finds_what_a_person_likes(folder: Path) -> None:
    person = Person()
    outcome = start(folder, person, "search.n_iters=10")
    assert outcome.finished
    assert outcome.gain["over_a"].low > 0  # brighter
    scores = {s["manual"] for r in outcome.results for s in r.scores.values()}
    assert scores <= set(range(11))
    assert (folder / "run" / JOURNAL).exists()


def test_run_that_was_stopped_does_not_ask_again(folder: Path) -> None:
    whole = start(folder, Person(), into="whole")
    hasty = Person(patience=13)
    with pytest.raises(KeyboardInterrupt):
        start(folder, hasty)
    lines = (folder / "run" / JOURNAL).read_text().splitlines()
    assert len(lines) == hasty.n_answered >= 13
    again = Person()
    outcome = start(folder, again)
    assert measured(outcome) == measured(whole)
    n_all = len((folder / "whole" / JOURNAL).read_text().splitlines())
    assert again.n_answered == n_all - hasty.n_answered


def test_pictures_that_are_rated_are_kept_with_their_prompts(folder: Path) -> None:
    start(folder, Person())
    line = json.loads((folder / "run" / JOURNAL).read_text().splitlines()[0])
    assert line["prompt"]
    [name] = line["pictures"]
    with Image.open(folder / "run" / "rated" / name) as image:
        assert infotext.read(image.info).prompt == line["prompt"]
        assert image.height == 16


def test_skipped_pictures_have_no_score(folder: Path) -> None:
    outcome = start(folder, Person(skips=True), "heldout.select_images=6", "heldout.images=8")
    stored = outcomes.read_outcome(folder / "run", outcomes.open_study(folder / "run"))
    answers = [
        json.loads(x)["answer"] for x in (folder / "run" / JOURNAL).read_text().splitlines()
    ]
    assert "skip" in answers
    assert all("manual" in s for r in stored.results for s in r.scores.values())
    # They are shown beside the others all the same.
    assert {len(pictures) for pictures in outcome.pictures.values()} == {8}
    outcomes.write_page(outcome, folder / "run")
    report = (folder / "run" / "report.html").read_text()
    assert "picture missing" not in report.replace('class="missing"', "")
    assert outcome.finished


def test_trials_that_were_skipped_do_not_stop_the_run(folder: Path) -> None:
    # Twelve pictures of the baselines, then five trials of one each.
    person = Person(skipped=range(12, 17))
    outcome = start(folder, person, "search.images_per_trial=1", "search.n_iters=12")
    skipped = [r for r in outcome.results if r.state == "failed"]
    assert len(skipped) == 5
    assert all(r.reason == "all its images were skipped" for r in skipped)
    assert outcome.finished


def test_person_is_asked_in_a_run_only(folder: Path) -> None:
    sample = Sample(Image.new("RGB", (8, 8)), Prompt(0, "p", "a cat", 0))
    with pytest.raises(TrialError, match="you are asked in a run only"):
        scorer.build("manual", {})([sample])
    with pytest.raises(ConfigError, match="scorer manual asks a person, and here nobody"):
        start(folder, Silent())
    with pytest.raises(ConfigError, match="undo_s is -1"):
        scorer.build("manual", {"undo_s": -1})


def test_run_is_tried_without_asking_anybody(folder: Path) -> None:
    config = configuration.load(folder / "config.toml", OPTIONS)
    config = config.model_copy(update={"scorers": {"manual": config.scorers["manual"]}})
    tried = tryout.try_out(setup.prepare(config, folder, "toy"))
    assert tried.scores == {}
    assert tried.images > 0


def test_run_waits_and_tells_so_once_when_nobody_looks(tmp_path: Path) -> None:
    desk = Desk(tmp_path, undo_s=0.0)
    told: list[float] = []
    desk.away = lambda: told.append(time.monotonic())
    desk._seen_at -= 60
    sample = Sample(Image.new("RGB", (8, 8)), Prompt(0, "p", "a cat", 0))
    judge = scorer.build("manual", {"undo_s": 0.0})
    judge._desk = desk
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(judge([sample])))
    waiting.start()
    time.sleep(0.8)
    assert len(told) == 1
    desk.answer(desk.state()["question"]["key"], 4)
    waiting.join(10)
    assert found == [[4.0]]
    desk.close()


PAIRS = "scorers={ manual = { ask = 'pairs', undo_s = 0.0 } }"


def choices_of(outcome: Outcome) -> dict[tuple[str, int], dict[str, float]]:
    return {
        (result.name, image): pairs.rivals(scores)
        for result in outcome.results
        for image, scores in result.scores.items()
    }


def test_run_finds_what_a_person_prefers_of_two(folder: Path) -> None:
    more = ("search.n_iters=25", "search.init_points=15", "heldout.images=12")
    outcome = start(folder, Person(taste=likeness), PAIRS, *more)
    assert outcome.finished
    assert outcome.preferences["over_even"].won >= 10
    assert outcome.gain["over_even"].low > 0
    assert outcome.gain["over_a"] == pairs.margin(outcome.preferences["over_a"])
    leads = outcome.heldout
    assert leads["even"].mean == 0 < leads["best"].mean
    assert leads["best"].se > 0
    assert outcome.leader
    assert outcome.leader.value
    assert outcome.leader.value.mean > 0


def test_picture_meets_the_best_of_its_prompt_and_seed_or_the_latest_of_an_explorer(
    folder: Path,
) -> None:
    outcome = start(folder, Person(taste=likeness), PAIRS, "search.n_iters=6")
    made = choices_of(outcome)
    explorers = {result.name for result in outcome.results if result.stage == "explore"}
    assert explorers
    best: dict[int, str] = {}
    latest: dict[int, str] = {}
    for (name, image), found in made.items():
        # The first of a prompt and seed is compared with none.
        rivals = latest if name in explorers else best
        assert list(found) == ([rivals[image]] if image in rivals else [])
        if not found or found.get(best[image], 0) > 0.5:
            best[image] = name
        latest[image] = name
    assert sum(map(bool, made.values())) == len(made) - len(best)


def test_best_merge_is_compared_with_a_b_and_even_on_held_out_seeds(folder: Path) -> None:
    person = Person(taste=likeness)
    outcome = start(folder, person, PAIRS)
    assert outcome.best
    for scores in outcome.best.scores.values():
        assert pairs.rivals(scores).keys() == {"a", "b", "even"}
    told = outcome.preferences
    assert {t.won + t.lost + t.alike for t in told.values()} == {4}
    # 4 images of the panel twice, 2 by 5 trials, 2 of the other candidate, 4 by 3 rivals.
    assert person.n_answered == 8 + 10 + 2 + 12
    outcomes.write_page(outcome, folder / "run")
    page = (folder / "run" / "report.html").read_text()
    assert f"{told['over_a'].won} won, {told['over_a'].lost} lost, 0 alike" in page
    plain = json.loads((folder / "run" / "result.json").read_text())
    assert plain["pairs"]["over_a"]["won"] == told["over_a"].won


def test_parent_that_is_the_best_merge_is_compared_with_the_others(folder: Path) -> None:
    # The brightest merge is B itself.
    outcome = start(folder, Person(), PAIRS, "search.presets=['single']", "search.n_iters=8")
    assert outcome.finished
    assert outcome.best
    assert outcome.preferences["over_a"].won == 4
    assert set(outcome.best.recipe.weights["alpha"].values()) == {1.0}
    assert outcome.preferences["over_b"].alike == 4


def test_run_by_pairs_that_was_stopped_does_not_ask_again(folder: Path) -> None:
    whole = start(folder, Person(taste=likeness), PAIRS, into="whole")
    hasty = Person(patience=11, taste=likeness)
    with pytest.raises(KeyboardInterrupt):
        start(folder, hasty, PAIRS)
    again = Person(taste=likeness)
    outcome = start(folder, again, PAIRS)
    assert measured(outcome) == measured(whole)
    assert choices_of(outcome) == choices_of(whole)
    n_all = len((folder / "whole" / JOURNAL).read_text().splitlines())
    assert again.n_answered == n_all - hasty.n_answered


def test_sides_tell_nothing_and_are_turned_back(folder: Path) -> None:
    person = Person(taste=likeness)
    outcome = start(folder, person, PAIRS, "search.n_iters=20")
    assert {"left", "right"} == set(person.answers)
    lines = [json.loads(x) for x in (folder / "run" / JOURNAL).read_text().splitlines()]
    # What was chosen on the page is what stands in the scores: pictures are known by their pixels.
    for line in lines:
        liked = [likeness(Image.open(folder / "run" / "rated" / n)) for n in line["pictures"]]
        assert line["answer"] == ("left" if liked[0] > liked[1] else "right")
    made = choices_of(outcome)
    for (name, image), found in made.items():
        for rival, share in found.items():
            own, other = (picture(folder, outcome, n, image) for n in (name, rival))
            assert share == (likeness(own) > likeness(other))


def picture(folder: Path, outcome: Outcome, name: str, image: int) -> Image.Image:
    result = next(r for r in outcome.results if r.name == name)
    found = album.read(folder / "run", result, image)
    assert found
    return found


def test_skipped_pairs_are_left_out(folder: Path) -> None:
    outcome = start(folder, Person(skips=True, taste=likeness), PAIRS, "search.n_iters=8")
    assert outcome.finished
    skipped = {prompt.index for prompt in outcome.panel if prompt.seed % 3 == 0}
    assert skipped
    for (name, image), found in choices_of(outcome).items():
        assert bool(found) == (image not in skipped and name != "a")


def test_baseline_whose_pairs_were_all_skipped_stops_no_run(folder: Path) -> None:
    # The first four questions are of the even merge and A.
    outcome = start(folder, Person(skipped=range(4), taste=likeness), PAIRS)
    assert outcome.finished
    assert not any(choices_of(outcome)["even", image] for image in range(4))


def test_choice_holds_whichever_picture_is_named_first(folder: Path) -> None:
    prompt = Prompt(0, "p", "a cat", 0)
    chance = np.random.default_rng(0)
    for _ in range(6):
        one, other = (
            Sample(Image.fromarray(chance.integers(0, 255, (8, 8, 3), "uint8")), prompt)
            for _ in range(2)
        )
        judge = scorer.build("manual", {"ask": "pairs", "undo_s": 0.0})
        person = Person()
        person.asked(judge.attend(folder / "desk", 1))
        share = judge.compare([one], [other])
        assert share == [float(brightness(one.image) > brightness(other.image))]
        assert judge.compare([other], [one]) == [1 - share[0]]
        assert person.n_answered == 1
        judge.leave()


def test_baseline_that_is_recommended_is_confirmed(folder: Path) -> None:
    # Who likes the even merge best has it among the few.
    def middling(image: Image.Image) -> float:
        return -abs(brightness(image) - 128) - float(np.asarray(image).std())

    outcome = start(folder, Person(taste=middling), PAIRS, "heldout.candidates=4")
    assert outcome.finished
    assert not {r.name for r in outcome.candidates} & {"a", "even", "b"}
    judged = outcomes.open_study(folder / "run").judged("heldout")
    assert [r.name for r in judged][:3] == ["a", "even", "b"]
    assert outcome.best
    assert all(pairs.rivals(scores) for scores in outcome.best.scores.values())


def test_picture_that_is_lost_leaves_the_comparison_to_the_next_best(folder: Path) -> None:
    class Thief(Person):
        def started(self, stage: str, name: str, images: int) -> None:
            super().started(stage, name, images)
            if name == "trial 1":
                for lost in (folder / "run" / "images" / "baseline" / "b").glob("*.png"):
                    lost.unlink()

    outcome = start(folder, Thief(), PAIRS)
    assert outcome.finished
    # B is the brightest.
    rivals = {r for (n, _), found in choices_of(outcome).items() if "trial" in n for r in found}
    assert "b" not in rivals
    assert "even" in rivals


def test_junk_loses_without_a_question_and_equal_pictures_are_alike(folder: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 8, 3), "uint8"))
    prompt = Prompt(0, "p", "a cat", 0)
    recipe = Recipe("weighted_sum", "sd1", (), {})
    result = Result("baseline", "a", 0, "complete", recipe, {0: {}}, {0: "x"})
    fined = result.but(scores={0: {f"{JUNK}blank": 1.0}})

    class Nobody:
        compares = True

        def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
            raise AssertionError("asked for marks")

        def compare(
            self, samples: Sequence[Sample], others: Sequence[Sample]
        ) -> list[float | None]:
            assert not samples
            return []

    own = Sample(picture, prompt)
    other = Sample(Image.new("RGB", (8, 9)), prompt)

    def share(marks: list[str], rival: pairing.Rival) -> float:
        [found] = pairing.compared(Nobody(), [own], [marks], lambda _: [rival])
        assert found
        return found["over.a"]

    assert share(["junk.blank"], pairing.Rival(result, other)) == 0.0
    assert share([], pairing.Rival(fined, other)) == 1.0
    assert share(["junk.noise"], pairing.Rival(fined, other)) == 0.5
    same = Sample(picture.copy(), prompt)
    assert share([], pairing.Rival(result, same)) == 0.5
    assert share(["junk.noise"], pairing.Rival(result, same)) == 0.5
    double = result.but(scores={0: {f"{JUNK}duplicate": 1.0}})
    assert share([], pairing.Rival(double, same)) == 0.5


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["scorers={ manual = { ask = 'pairs' }, likeness = {} }"], "there are other scorers"),
        ([PAIRS, "value.combine=minimum"], "value.combine is for scores"),
        ([PAIRS, "search.objectives=payloads"], "search.objectives 'payloads' is for scores"),
        ([PAIRS, "search.optimiser=tpe"], "search.optimiser 'tpe' needs scores"),
        (
            [PAIRS, "panel.payloads=['portrait.toml', 'heavy.toml']"],
            r"payloads differ in score_weight \(portrait 1, heavy 3\)",
        ),
    ],
)
def test_what_needs_scores_is_told_of_pairs(folder: Path, more: list[str], told: str) -> None:
    (folder / "heavy.toml").write_text('prompt = "a stone"\nscore_weight = 3\n')
    config = configuration.load(folder / "config.toml", more)
    if "likeness" not in more[0]:
        config = config.model_copy(update={"scorers": {"manual": config.scorers["manual"]}})
    with pytest.raises(ConfigError, match=f"a scorer asks for pairs, but {told}"):
        setup.prepare(config, folder, "toy")


def test_choices_are_not_brought_to_another_run_but_its_best_merges_are(folder: Path) -> None:
    start(folder, Person(taste=likeness), PAIRS)
    config = configuration.load(folder / "config.toml", (*OPTIONS, PAIRS))
    config = config.model_copy(update={"scorers": {"manual": config.scorers["manual"]}})
    brought = warm.fork(folder / "run", setup.prepare(config, folder, "toy"), folder / "next")
    assert brought.scores == 0 < brought.starts
    assert "choices between two pictures are not brought" in brought.left_out


def test_run_by_pairs_that_is_extended_ranks_old_and_new_candidates_on_one_scale(
    folder: Path,
) -> None:
    start(folder, Person(taste=likeness), PAIRS)
    config = configuration.load(folder / "config.toml", (*OPTIONS, PAIRS))
    config = config.model_copy(update={"scorers": {"manual": config.scorers["manual"]}})
    again = Person(taste=likeness)
    outcome = run.run(
        setup.prepare(config, folder, "toy"), folder / "run", again, more=16, report=False
    )
    assert outcome.finished
    judged = outcomes.open_study(folder / "run").judged("select")
    assert len({result.name for result in judged}) == len(judged)
    values = [result.value.mean for result in outcome.selected if result.value]
    assert values == sorted(values, reverse=True)
    leads = pairs.leads(judged)
    assert values == [leads[result.name].mean for result in outcome.selected]
    told = outcome.preferences["over_even"]
    assert told.won + told.lost + told.alike == 4


def test_rate_takes_over_what_was_chosen_in_the_run(folder: Path, command: Command) -> None:
    outcome = start(folder, Person(taste=likeness), PAIRS)
    code, told, _ = command("rate", folder / "run", "--no-browser")
    assert code == 0
    for key, rival in (("over_a", "A"), ("over_b", "B"), ("over_even", "the even merge")):
        assert f"best over {rival}: {pairs.sentence(outcome.preferences[key])}" in told
    assert "you have chosen in all these pairs in the run itself" in told
