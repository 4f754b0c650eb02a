"""Where a person is asked: a web page, or the terminal. And `rate`, which asks of a finished run."""

from __future__ import annotations

import hashlib
import io
import re
import threading
import webbrowser
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import click
from PIL import Image
from rich.console import Console

from bayesian_merger import album, pairs
from bayesian_merger import outcome as outcomes
from bayesian_merger.cli.screen import out, plain
from bayesian_merger.data import RIVALS, Outcome, Preference
from bayesian_merger.desk import MOST_MARK, Answer, Choice, Desk, Question
from bayesian_merger.errors import ConfigError
from bayesian_merger.page import Page
from bayesian_merger.run import locked
from bayesian_merger.study.storage import storage_errors

_KEYS: dict[str, Choice] = {"l": "left", "r": "right", "a": "alike", "s": "skip"}


class Asking(NamedTuple):
    """How a person is asked: on a page at this port, which a browser opens, or in the terminal."""

    port: int = 0
    opens: bool = True
    in_terminal: bool = False


def asking_options(command: Any) -> Any:
    """The options of commands that may ask a person."""
    options = [
        click.option("--port", type=click.IntRange(0, 65535), default=0, help="Of the page."),
        click.option("--no-browser", is_flag=True, help="Only print the address of the page."),
        click.option("--terminal", is_flag=True, help="Ask here, without a page."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


class Shown:
    """What a desk asks, shown until it is closed."""

    def __init__(self, desk: Desk, how: Asking, console: Console, folder: Path) -> None:
        self._page: Page | None = None
        if how.in_terminal:
            _Terminal(desk, console, folder).start()
            return
        self._page = page = Page(desk, how.port)
        console.print(f"rate the pictures at {page.url}", soft_wrap=True)
        desk.away = lambda: console.print(
            f"paused, as nobody looks at the page; it goes on when you open {page.url}",
            soft_wrap=True,
        )
        if how.opens:
            open_browser(page.url)

    def close(self) -> None:
        """Show nothing more."""
        if self._page:
            self._page.close()


def open_browser(url: str) -> None:
    """Have a browser open the address, where there is one."""
    # Some open none and wait for it, others print to the terminal.
    threading.Thread(target=_open, args=(url,), daemon=True).start()


def _open(url: str) -> None:
    with suppress(webbrowser.Error, OSError):
        webbrowser.open(url)


class _Terminal(threading.Thread):
    """Asks in the terminal; the picture to look at is a file."""

    def __init__(self, desk: Desk, console: Console, folder: Path) -> None:
        super().__init__(daemon=True)
        self._desk, self._console, self._folder = desk, console, folder

    def run(self) -> None:
        version = -1
        try:
            while not (state := self._desk.state(version, 5.0))["over"]:
                version = int(state["version"])
                if state["question"]:
                    self._ask(
                        state["question"], f"{state['answered'] + 1} of about {state['total']}"
                    )
        except (EOFError, OSError):  # there is nothing more to read, or nobody who reads
            self._desk.close()

    def _ask(self, asked: Any, place: str) -> None:
        paths = []
        for number in range(asked["pictures"]):
            picture = self._desk.picture(asked["key"], number)
            if picture is None:
                return
            name = "now.png" if asked["pictures"] == 1 else ("left.png", "right.png")[number]
            paths.append(self._folder / name)
            paths[-1].write_bytes(picture)
        self._console.print(f"{place}: {plain(asked['prompt'])}", soft_wrap=True)
        self._console.print(f"seed {asked['seed']}: {', '.join(map(str, paths))}", soft_wrap=True)
        wanted = f"mark 0 to {MOST_MARK}"
        if len(paths) == 2:
            wanted = "which is better: l(eft), r(ight), a(like)"
        told = self._console.input(f"{wanted}, s(kip) or u(ndo): ").strip().lower()
        if told.startswith("u"):
            if not self._desk.undo():
                self._console.print("there is nothing to undo")
            return
        is_number = re.fullmatch(r"[0-9]{1,2}", told)
        answer: Answer | None = int(told) if is_number else _KEYS.get(told[:1])
        if answer is None or not self._desk.answer(asked["key"], answer):
            self._console.print(f"{plain(told)!r} is no answer to that; write {wanted} or s(kip)")


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path, file_okay=False))
@click.option("--storage", metavar="URL", help="The search.storage of the run, if it had one.")
@click.option("--marks", is_flag=True, help="A mark for each picture, not pairs of two.")
@click.option("--most", type=click.IntRange(1), help="Ask no more than so many.")
@asking_options
def rate_command(
    run_dir: Path,
    storage: str | None,
    marks: bool,
    most: int | None,
    port: int,
    no_browser: bool,
    terminal: bool,
) -> None:
    """Let your own eye judge the pictures of RUN_DIR: its best merge beside A, B and the even merge.

    Two pictures of one prompt and seed, sides shuffled and names hidden. What was answered is kept, and
    the same command goes on.
    """
    with storage_errors():
        found = outcomes.read_outcome(run_dir, outcomes.open_study(run_dir, storage))
    asked = list(islice(_marks(found) if marks else _pairs(found), most))
    if found.by_pairs and not marks and not asked:
        for line in _told((), found.preferences):
            out.print(line, soft_wrap=True)
        out.print("you have chosen in all these pairs in the run itself; --marks asks for marks")
        return
    if not asked:
        raise ConfigError(
            f"{run_dir}: there are no pictures to rate"
            f"{'' if found.finished or marks else '; pairs are those of a finished run'}"
        )
    keys = {one.question.key for one in asked}
    with locked(run_dir):
        desk = Desk(run_dir, total=len(keys), keys=keys)
        shown = Shown(desk, Asking(port, not no_browser, terminal), out, run_dir)
        try:
            desk.ask([one.question for one in asked])
        finally:
            # Of what was answered before somebody has stopped it too.
            desk.close()
            shown.close()
            given = [(one, desk.given(one.question)) for one in asked]
            answered = [(one, answer) for one, answer in given if answer is not None]
            for line in _told(answered, {} if marks else found.preferences):
                out.print(line, soft_wrap=True)
            if len(answered) < len(asked):
                out.print(
                    f"{len(answered)} of {len(asked)} are answered; the same command goes on"
                )


class _Asked(NamedTuple):
    """A question, and whose picture is the first and the second there."""

    question: Question
    names: tuple[str, ...]


def _pairs(found: Outcome) -> Iterator[_Asked]:
    """The best merge beside its rivals on each prompt and seed, in an order of chance."""
    if not found.finished:
        return
    every = []
    for index, best in found.pictures.get("best", {}).items():
        for rival in ("a", "b", "even"):
            other = found.pictures.get(rival, {}).get(index)
            if other is not None:
                every.append((index, rival, best, other))
    every.sort(key=lambda one: _chance(f"{found.title} {one[0]} {one[1]}"))
    for index, rival, best, other in every:
        pictures = (best.read_bytes(), other.read_bytes())
        digests = tuple(map(_pixels, pictures))
        own = found.best.scores.get(index, {}) if found.best else {}
        if digests[0] == digests[1] or rival in pairs.rivals(own):
            continue
        key = _chance(f"pair {found.title} {index} {digests}")
        # Which side is which is told by nothing that is shown.
        turned = int(_chance(f"side {key}"), 16) % 2 == 1
        names = ("best", rival)
        yield _Asked(
            _question(found, index, key, pictures[::-1] if turned else pictures),
            names[::-1] if turned else names,
        )


def _marks(found: Outcome) -> Iterator[_Asked]:
    """Each picture of the comparison by itself, in an order of chance."""
    every = [
        (name, index, path.read_bytes())
        for name, pictures in found.pictures.items()
        for index, path in pictures.items()
    ]
    keyed = [
        (_chance(f"mark {found.title} {index} {_pixels(data)}"), name, index, data)
        for name, index, data in every
    ]
    for key, name, index, data in sorted(keyed):
        yield _Asked(_question(found, index, key, (data,)), (name,))


def _question(found: Outcome, index: int, key: str, pictures: tuple[bytes, ...]) -> Question:
    panel = found.heldout_panel if found.finished else found.panel
    prompt = next(prompt for prompt in panel if prompt.index == index)
    return Question(key, pictures, prompt.prompt, prompt.seed, prompt.negative_prompt)


def _pixels(data: bytes) -> str:
    """The digest of a picture's pixels; what else its file tells is of no account."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return album.digest_of(image.convert("RGB"))


def _chance(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _told(
    given: Sequence[tuple[_Asked, Answer]], before: Mapping[str, Preference]
) -> Iterator[str]:
    """What the answers say, in lines, with the choices that a run by pairs has `before` them."""
    wins: dict[str, Counter[str]] = {}
    for rival, told in ((key.removeprefix("over_"), told) for key, told in before.items()):
        wins[rival] = Counter({"best": told.won, rival: told.lost, "alike": told.alike})
    marks: dict[str, list[int]] = {}
    for (_, names), answer in given:
        if answer == "skip":
            continue
        if isinstance(answer, int):
            marks.setdefault(names[0], []).append(answer)
            continue
        rival = next(name for name in names if name != "best")
        chosen = {"left": names[0], "right": names[1]}.get(answer, "alike")
        wins.setdefault(rival, Counter())[chosen] += 1
    for name, some in sorted(marks.items()):
        yield f"{name:<6} {sum(some) / len(some):.2f} of 10, mean of {len(some)} marks"
    for rival in sorted(wins):
        told = Preference(*(wins[rival][key] for key in ("best", rival, "alike")))
        yield f"best over {RIVALS[f'over_{rival}']}: {pairs.sentence(told)}"
    if not wins and not marks:
        yield "nothing was rated"
