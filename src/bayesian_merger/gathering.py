"""The pictures of a run that several machines work on, brought into each one's run folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bayesian_merger import album
from bayesian_merger.checkpoint import whole_file
from bayesian_merger.data import Result
from bayesian_merger.errors import TrialError
from bayesian_merger.outcome import mark_of
from bayesian_merger.pictures import decoded
from bayesian_merger.setup import Setup
from bayesian_merger.study import Trial
from bayesian_merger.study.shelf import Shelf


def gathering(setup: Setup, folder: Path) -> Gathering | None:
    """That of the run in the folder, if there is to be one; ConfigError if its place cannot be had."""
    place = setup.config.output.artifacts
    return Gathering(Shelf(place, mark_of(folder)), folder) if place else None


class Gathering:
    """Puts the pictures of a run folder onto a shelf, and takes those from there that it lacks."""

    def __init__(self, shelf: Shelf, folder: Path) -> None:
        self._shelf, self._folder = shelf, folder
        self._sent: set[str] = set()
        # What is to be sent still: also what could not be, as the shelf was away.
        self._left: dict[str, Path] = {}

    def send(self, trial: Trial) -> None:
        """Put the pictures of a trial there whose scores are recorded; OSError if that fails."""
        for index, file in album.saved(self._place(trial)).items():
            name = _name(trial, index)
            if index in trial.scores and name not in self._sent:
                self._left[name] = file
        for name, file in list(self._left.items()):
            if file.is_file():
                self._shelf.put(name, file)
            self._sent.add(name)
            del self._left[name]

    def send_left(self, results: Iterable[Result]) -> None:
        """Put those of the results there that the shelf lacks, as it was away; OSError if that fails."""
        for result in results:
            for index, file in album.saved(self._place(result)).items():
                name = _name(result, index)
                if index in result.images and not self._shelf.has(name):
                    self._shelf.put(name, file)

    def fetch(self, results: Iterable[Result], setup: Setup) -> int:
        """Take the pictures of the results that are there; how many are missing still.

        What is not the picture that was judged is none. OSError if it cannot be done.
        """
        n_missing = 0
        for result in results:
            place = self._place(result)
            had = album.saved(place)
            for index, digest in result.images.items():
                if index in had:
                    continue
                data = self._shelf.get(_name(result, index))
                if data is None or not _is_picture(data, digest):
                    n_missing += 1
                    continue
                payload = setup.judged_on(result.stage, index).payload
                own = {n: x for n, x in result.scores[index].items() if n in setup.measure.weights}
                with whole_file(place / album.file_name(index, payload, own)) as file:
                    file.write(data)
        return n_missing

    def _place(self, judged: Trial | Result) -> Path:
        return album.folder_of(self._folder, judged.stage, judged.name)


def _name(judged: Trial | Result, index: int) -> str:
    """What a picture is called on the shelf."""
    return (
        f"{album.folder_of(Path(), judged.stage, judged.name).name}-{judged.stage}-{index:03}.png"
    )


def _is_picture(data: bytes, digest: str) -> bool:
    try:
        return album.digest_of(decoded(data, None)) == digest
    except TrialError:
        return False
