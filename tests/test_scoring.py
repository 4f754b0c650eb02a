"""The commands score and scorer-worker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from PIL import Image
from test_cli import Command
from test_cli import command as command

from bayesian_merger import infotext
from bayesian_merger.data import Prompt, Sample
from bayesian_merger.errors import ConfigError, TrialError
from bayesian_merger.scorers import scorer

WORKER = [str(Path(sys.executable).parent / "bayesian-merger"), "scorer-worker"]
PLUGIN = """
import sys
from bayesian_merger.errors import TrialError
from bayesian_merger.scorers import scorer

print("loading the plugin ...")

@scorer
class Picky:
    def __init__(self, model: str = "", factor: float = 1.0) -> None:
        print("model", model)
        self.model, self.factor = model, factor

    def __call__(self, samples):
        print("scoring", len(samples))
        if any(sample.image.width == 9 for sample in samples):
            raise TrialError("nine is no width")
        return [self.factor * len(self.model + sample.prompt.prompt) for sample in samples]
"""


def pictures(folder: Path, *prompts: str, width: int = 8) -> list[Path]:
    paths = []
    for i, text in enumerate(prompts):
        grey = Image.new("RGB", (width, 8), (51 * (i + 1),) * 3)
        paths.append(folder / f"{i:03}.png")
        paths[-1].write_bytes(infotext.png(Sample(grey, Prompt(i, "p", text, seed=i))))
    return paths


def test_files_and_folders_are_scored(tmp_path: Path, command: Command) -> None:
    paths = pictures(tmp_path, "a cat", "a dog")
    Image.new("RGB", (8, 8), "white").save(tmp_path / "z.jpg")
    code, told, _ = command(
        "score", str(paths[0]), str(tmp_path), "--scorer", "exposure", "-o", "target=0.2"
    )
    assert code == 0
    assert [line.split() for line in told.splitlines()] == [
        ["exposure", "image"],
        ["1", str(paths[0])],
        ["0.8", str(paths[1])],
        ["0.2", str(tmp_path / "z.jpg")],
        ["0.6667", "mean", "of", "3"],
    ]


def test_several_scorers_have_their_own_options(tmp_path: Path, command: Command) -> None:
    [path] = pictures(tmp_path, "a cat")
    scorers = ("--scorer", "exposure", "--scorer", "contrast", "-o", "exposure.target=0.2")
    code, told, _ = command("score", str(path), *scorers, "--json")
    assert code == 0
    found = json.loads(told)
    assert (found["image"], found["prompt"]) == (str(path), "a cat")
    assert found["scores"] == pytest.approx({"exposure": 1.0, "contrast": 0.0})


def test_prompts_are_read_from_the_files(tmp_path: Path, command: Command) -> None:
    tower = tiny_models.clip(tmp_path / "clip")
    paths = pictures(tmp_path, "a cat", "a dog")
    options = ("--scorer", "clipscore", "-o", f"tower={tower}", "--json")
    code, told, _ = command("score", *map(str, paths), *options)
    assert code == 0
    judge = scorer.build("clipscore", {"tower": str(tower)})
    with Image.open(paths[1]) as image:
        expected = judge([Sample(image.convert("RGB"), Prompt(0, "p", "a dog", 0))])
    assert json.loads(told.splitlines()[1])["scores"]["clipscore"] == pytest.approx(
        expected[0], abs=1e-3
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "mute.png")
    code, _, said = command("score", *map(str, paths), str(tmp_path / "mute.png"), *options)
    assert code == 2
    assert "1 of 3 images tell no prompt" in said
    assert "give it by --prompt" in said
    code, told, _ = command("score", str(tmp_path / "mute.png"), *options, "--prompt", "a cow")
    assert json.loads(told)["prompt"] == "a cow"


def test_image_that_cannot_be_scored_is_told_and_the_others_are(
    tmp_path: Path, command: Command
) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    good = pictures(tmp_path, "a cat", "a dog")
    (tmp_path / "bad").mkdir()
    [bad] = pictures(tmp_path / "bad", "a cow", width=9)
    code, told, said = command(
        *("score", str(good[0]), str(bad), str(good[1]), "--scorer", "picky"),
        *("--plugin", str(tmp_path / "plugin.py")),
    )
    assert code == 1
    assert f"{bad}: scorer picky: nine is no width" in said
    assert "1 of 3 images could not be scored" in said
    assert f"{good[1]}" in told
    assert "mean of 2" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("none.png", "--scorer", "exposure"), "none.png: no such file"),
        ((".", "--scorer", "exposure"), "there is no image in this folder"),
        (("text.png", "--scorer", "exposure"), "text.png: not an image that can be read"),
        (("ok.png", "--scorer", "exposur"), "did you mean 'exposure'"),
        (("ok.png", "--scorer", "exposure", "-o", "target"), "write it as KEY=VALUE"),
        (("ok.png", "--scorer", "exposure", "-o", "x.target=1"), "write it as exposure.KEY=VALUE"),
        (("ok.png", "--scorer", "exposure", "-o", "targ=1"), "unknown option 'targ'"),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "text.png":
        (tmp_path / "text.png").write_text("no image")
    if arguments[0] == "ok.png":
        Image.new("RGB", (8, 8)).save(tmp_path / "ok.png")
    code, _, told = command("score", *arguments)
    assert code == 2
    assert said in told


def test_worker_passes_over_what_is_no_order() -> None:
    lines = 'garbage\n7\n{"id": 5, "image": "none.png"}\n'
    done = subprocess.run(
        [*WORKER, "exposure"], input=lines, capture_output=True, text=True, check=True, timeout=120
    )
    told = json.loads(done.stdout)
    assert (told["id"], "none.png" in told["error"]) == (5, True)
    assert done.stderr == ""


def test_scorer_of_another_environment_is_a_worker_there(tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    orders = [*WORKER, "picky:abc", "-o", "factor=2.0", "--plugin", "plugin.py"]
    judge = scorer.build("process", {"command": orders, "folder": "."}, tmp_path)
    image = Image.new("RGB", (8, 8))
    samples = [Sample(image, Prompt(i, "p", "x" * i, seed=i)) for i in range(40)]
    # "model" and the prompt's letters, twice, whatever the plugin prints.
    assert judge(samples) == [2.0 * (3 + i) for i in range(40)]
    with pytest.raises(TrialError, match="nine is no width"):
        judge([samples[0], Sample(Image.new("RGB", (9, 8)), Prompt(0, "p", "x", 0))])
    assert judge(samples[:1]) == [6.0]


def test_worker_that_has_no_such_scorer_is_told_before_the_run(tmp_path: Path) -> None:
    orders = [*WORKER, "exposur"]
    with pytest.raises(ConfigError, match="unknown scorer 'exposur'; did you mean 'exposure'"):
        scorer.build("process", {"command": orders, "folder": "."}, tmp_path)


def test_file_of_a_folder_that_is_no_image_does_not_stop_the_others(
    tmp_path: Path, command: Command
) -> None:
    good = pictures(tmp_path, "a", "b")
    (tmp_path / "note.png").write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(good[0].read_bytes()[:-30])
    code, told, said = command("score", str(tmp_path), "--scorer", "exposure")
    assert code == 1
    assert "mean of 2" in told
    assert "note.png: not an image that can be read" in said
    assert "cut.png: not an image that can be read" in said
    assert "2 of 4 images could not be scored" in said
    # One that is named itself is a mistake.
    code, _, said = command(
        "score", str(tmp_path / "note.png"), str(good[0]), "--scorer", "exposure"
    )
    assert code == 2


def test_folder_of_a_run_is_scored_without_its_figures(tmp_path: Path, command: Command) -> None:
    (tmp_path / "images" / "heldout").mkdir(parents=True)
    pictures(tmp_path / "images" / "heldout", "a", "b")
    pictures(tmp_path, "figure")
    (tmp_path / "result.json").write_text("{}")
    code, told, _ = command("score", str(tmp_path), "--scorer", "exposure")
    assert code == 0
    assert "mean of 2" in told


def test_person_is_no_scorer_of_files(tmp_path: Path, command: Command) -> None:
    code, told, said = command("score", *map(str, pictures(tmp_path, "a")), "--scorer", "manual")
    assert (code, told) == (2, "")
    assert "--scorer manual asks you, in a run" in said
