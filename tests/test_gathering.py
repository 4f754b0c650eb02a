"""Pictures that machines of one run hand on to each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import boto3
import pytest
from moto import mock_aws
from PIL import Image
from test_run import Silent
from test_run import folder as folder

from bayesian_merger import album, run, setup
from bayesian_merger import config as configuration
from bayesian_merger.data import Result, Sample
from bayesian_merger.errors import ConfigError
from bayesian_merger.gathering import Gathering
from bayesian_merger.outcome import open_study
from bayesian_merger.study import Trial
from bayesian_merger.study.shelf import Shelf


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of the test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        boto3.client("s3").create_bucket(Bucket="merges")
        yield "merges"


@pytest.fixture(params=["folder", "bucket", "prefix"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    if request.param == "folder":
        return Shelf(str(tmp_path / "shelf"), "run-1")
    name = request.getfixturevalue("bucket")
    return Shelf(f"s3://{name}" + ("/my/merges/" if request.param == "prefix" else ""), "run-1")


@pytest.fixture
def ready(folder: Path) -> setup.Setup:
    return setup.prepare(configuration.load(folder / "config.toml"), folder, "toy")


def judged(ready: setup.Setup, into: Path) -> Trial:
    """The even merge with the pictures of three images."""
    into.mkdir(parents=True)
    with closing(open_study(into, create=True)) as study:
        trial = study.book("baseline", "even", ready.baseline("even"))
        for prompt in ready.panel[:3]:
            image = Image.new("RGB", (8, 8), (prompt.index, 0, 0))
            place = album.folder_of(into, "baseline", "even")
            album.save(Sample(image, prompt), place, {"likeness": 0.5})
            trial.record(prompt.index, {"likeness": 0.5}, album.digest_of(image))
    return trial


def names(run_dir: Path) -> list[str]:
    return sorted(path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*.png"))


def test_pictures_of_one_machine_come_to_another(
    ready: setup.Setup, shelf: Shelf, tmp_path: Path
) -> None:
    trial = judged(ready, tmp_path / "one")
    Gathering(shelf, tmp_path / "one").send(trial)
    other = Gathering(shelf, tmp_path / "two")
    assert other.fetch([trial.result()], ready) == 0
    assert len(names(tmp_path / "one")) == 3
    assert names(tmp_path / "two") == names(tmp_path / "one")
    for index in range(3):
        assert album.read(tmp_path / "two", trial.result(), index)


def test_pictures_of_another_run_are_not_taken(ready: setup.Setup, tmp_path: Path) -> None:
    trial = judged(ready, tmp_path / "one")
    Gathering(Shelf(str(tmp_path / "shelf"), "run-1"), tmp_path / "one").send(trial)
    other = Gathering(Shelf(str(tmp_path / "shelf"), "run-2"), tmp_path / "two")
    assert other.fetch([trial.result()], ready) == 3
    assert not names(tmp_path / "two")


def test_what_is_not_the_picture_that_was_judged_is_not_taken(
    ready: setup.Setup, tmp_path: Path
) -> None:
    trial = judged(ready, tmp_path / "one")
    shelf = Shelf(str(tmp_path / "shelf"), "run-1")
    Gathering(shelf, tmp_path / "one").send(trial)
    forged, cut, _ = sorted((tmp_path / "shelf").iterdir())
    Image.new("RGB", (8, 8), (99, 0, 0)).save(forged, format="PNG")
    cut.write_bytes(cut.read_bytes()[:40])
    assert Gathering(shelf, tmp_path / "two").fetch([trial.result()], ready) == 2
    assert len(names(tmp_path / "two")) == 1


def test_picture_that_is_there_is_not_fetched_again(ready: setup.Setup, tmp_path: Path) -> None:
    trial = judged(ready, tmp_path / "one")
    shelf = Shelf(str(tmp_path / "shelf"), "run-1")
    gathering = Gathering(shelf, tmp_path / "one")
    results: list[Result] = [trial.result()]
    assert gathering.fetch(results, ready) == 0
    assert not list((tmp_path / "shelf").iterdir())


def test_pictures_that_were_not_sent_are_sent_in_the_end(
    ready: setup.Setup, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = judged(ready, tmp_path / "one")
    one, two = (Gathering(shelf, tmp_path / name) for name in ("one", "two"))
    one.send_left([trial.result()])
    assert two.fetch([trial.result()], ready) == 0
    monkeypatch.setattr(shelf, "put", None)  # what is there is not sent again
    one.send_left([trial.result()])


def test_pictures_that_could_not_be_sent_go_with_the_next(
    ready: setup.Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = judged(ready, tmp_path / "one")
    shelf = Shelf(str(tmp_path / "shelf"), "run-1")
    one, two = (Gathering(shelf, tmp_path / name) for name in ("one", "two"))

    def away(name: str, file: Path) -> None:
        raise OSError("the bucket is away")

    monkeypatch.setattr(shelf, "put", away)
    with pytest.raises(OSError, match="away"):
        one.send(trial)
    monkeypatch.undo()
    monkeypatch.setattr(album, "saved", lambda place: {})  # of another trial, which has none
    one.send(trial)
    monkeypatch.undo()
    assert two.fetch([trial.result()], ready) == 0


def test_bucket_that_cannot_be_had_is_told_in_one_line(bucket: str) -> None:
    with pytest.raises(ConfigError, match=r"output\.artifacts: s3://none cannot be had") as said:
        Shelf("s3://none/x", "run-1")
    assert len(str(said.value).splitlines()) == 1


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output\.artifacts: .*file.* cannot be made"):
        Shelf(str(tmp_path / "file" / "shelf"), "run-1")


def test_artifacts_without_a_server_for_the_study_are_a_mistake(folder: Path) -> None:
    config = configuration.load(folder / "config.toml", ["output.artifacts=s3://merges"])
    ready = setup.prepare(config, folder, "toy")
    with pytest.raises(ConfigError, match=r"search\.storage names no server"):
        run.run(ready, folder / "run", Silent())
