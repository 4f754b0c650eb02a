"""The commands of scorers: score, scorer-worker."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click
from PIL import Image

from bayesian_merger import checkpoint, devices, hub, infotext, judging, taste, toml, towers
from bayesian_merger.cli.options import plugin_option
from bayesian_merger.cli.screen import err, out, plain
from bayesian_merger.data import Prompt, Sample
from bayesian_merger.errors import ConfigError, RunError, TrialError, one_line
from bayesian_merger.hub import CLIP_L14
from bayesian_merger.pictures import pillow_errors
from bayesian_merger.registry import import_file
from bayesian_merger.scorers import Attended, Scorer, scorer

_TYPES = (".png", ".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "JPEG", "WEBP")
_AT_ONCE = 16

_option = click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="[NAME.]KEY=VALUE",
    help="An option of the scorer (of several, of that of this name); may be repeated.",
)


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--scorer", "names", multiple=True, required=True, help="May be repeated.")
@_option
@click.option("--prompt", help="The prompt of images that do not tell theirs.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON for each image.")
@plugin_option
def score_command(
    images: Sequence[Path],
    names: Sequence[str],
    options: Sequence[str],
    prompt: str | None,
    as_json: bool,
    plugins: Sequence[Path],
) -> None:
    """Score IMAGES, files or folders of them, from anywhere; prompts are read from the files."""
    for plugin in plugins:
        import_file(plugin)
    paths = _files(images)
    prompts, unread = _prompts(paths, images, prompt)
    chosen = {name: _options(name, options, len(names) == 1) for name in dict.fromkeys(names)}
    _require_owners(options, chosen)
    judges = {name: scorer.build(name, given) for name, given in chosen.items()}
    for name, judge in judges.items():
        if isinstance(judge, Attended):
            raise ConfigError(f"--scorer {name} asks you, in a run; see bayesian-merger rate")
    _require_prompts(judges, prompts)
    width = max(len(name) for name in judges)
    if not as_json:
        out.print("  ".join(f"{name:>{max(width, 8)}}" for name in judges) + "  image")
    failed = len(unread)
    for told in unread:
        err.print(plain(told), soft_wrap=True)
    totals = dict.fromkeys(judges, 0.0)
    for prompt_of, path, scores in _scored(judges, prompts):
        if isinstance(scores, str):
            failed += 1
            err.print(f"{path}: {plain(scores)}", soft_wrap=True)
        elif as_json:
            out.print(
                json.dumps({"image": str(path), "scores": scores, "prompt": prompt_of.prompt}),
                soft_wrap=True,
            )
        else:
            shown = "  ".join(f"{value:>{max(width, 8)}.4g}" for value in scores.values())
            out.print(f"{shown}  {plain(str(path))}", soft_wrap=True)
        if not isinstance(scores, str):
            totals = {name: total + scores[name] for name, total in totals.items()}
    n_scored = len(paths) - failed
    if n_scored > 1 and not as_json:
        shown = "  ".join(f"{t / n_scored:>{max(width, 8)}.4g}" for t in totals.values())
        out.print(f"{shown}  mean of {n_scored}")
    if failed:
        raise RunError(f"{failed} of {len(paths)} images could not be scored")


@click.command()
@click.argument("name")
@_option
@plugin_option
def scorer_worker_command(name: str, options: Sequence[str], plugins: Sequence[Path]) -> None:
    """Answer lines of JSON with the scores of NAME: a scorer in an environment of its own.

    For `scorers.process` of a run elsewhere, whose lines it reads. NAME:MODEL is short for the option
    `model`.
    """
    for plugin in plugins:
        import_file(plugin)
    name, _, model = name.partition(":")
    given = _options(name, options, True)
    with _own_output() as answers:
        judge = scorer.build(name, {**given, **({"model": model} if model else {})})
        for asked in _orders(sys.stdin):
            for told in _answers(judge, asked):
                answers.write(json.dumps(told) + "\n")
                answers.flush()


@click.command()
@click.argument(
    "run_dirs", nargs=-1, required=True, type=click.Path(path_type=Path, file_okay=False)
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The file to write."
)
@click.option("--repository", default=CLIP_L14, show_default=True, help="A model of the hub.")
@click.option("--tower", type=click.Path(path_type=Path), help="A folder with a model instead.")
@click.option("--device", default="auto", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def train_scorer_command(
    run_dirs: Sequence[Path],
    output: Path,
    repository: str,
    tower: Path | None,
    device: str,
    overwrite: bool,
) -> None:
    """Learn your taste from what you have rated in RUN_DIRS: a scorer of your own, ready to use."""
    import torch
    from torch.nn.functional import normalize

    if output.suffix != ".safetensors":
        raise ConfigError(f"{output}: give it the ending .safetensors")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; choose another name or give --overwrite")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"{output}: the folder {output.absolute().parent} does not exist")
    ratings = taste.read(run_dirs)
    place = tower or hub.folder(repository, "--tower")
    encoder = towers.tower(place, devices.device(device, "--device"), "fp32")
    features = []
    for start in range(0, len(ratings.pictures), _AT_ONCE):
        images = []
        for path in ratings.pictures[start : start + _AT_ONCE]:
            with Image.open(path, formats=["PNG"]) as file:
                images.append(file.convert("RGB"))
        features.append(normalize(encoder.of_images(images)).cpu().double())
    found = taste.learn(ratings, torch.cat(features).numpy())
    tensors = {
        "weight": torch.from_numpy(found.weight[None]).float(),
        "bias": torch.tensor([found.bias], dtype=torch.float32),
    }
    told = {"format": "pt", "made_by": "bayesian-merger", "ratings": str(ratings.n)}
    checkpoint.write(
        output,
        {name: checkpoint.Layout(tuple(one.shape), one.dtype) for name, one in tensors.items()},
        lambda name: [tensors[name]],
        {**told, **({"tower": tower.absolute().name} if tower else {"repository": repository})},
    )
    out.print(f"learnt from {len(ratings.marks)} marks and {len(ratings.pairs)} pairs")
    if found.rank_correlation is not None:
        out.print(
            f"on prompts and seeds left out: rank correlation {found.rank_correlation:.2f} of its "
            f"marks with yours"
        )
    if found.agreement is not None:
        out.print(f"on prompts and seeds left out: it chooses as you in {found.agreement:.0%}")
    out.print(f"wrote {output}; as a scorer:", soft_wrap=True)
    more = f'\ntower = "{_plain_path(tower)}"' if tower else ""
    out.print(
        f'[scorers.taste]\nscorer = "head"\nweights = "{_plain_path(output)}"{more}',
        soft_wrap=True,
    )


def _plain_path(path: Path) -> str:
    """It from the root on, without any ".." and backslash."""
    return Path(os.path.normpath(path.absolute())).as_posix()


def _files(images: Iterable[Path]) -> list[Path]:
    """The image files; of a folder those in it, of a run those it has made. ConfigError if none."""
    found: list[Path] = []
    for path in images:
        if path.is_dir():
            # Beside them are its figures, and what was rated is there twice.
            made = path / "images" if (path / "result.json").is_file() else path
            inside = sorted(p for p in made.rglob("*") if p.suffix.lower() in _TYPES)
            if not inside:
                raise ConfigError(
                    f"{path}: there is no image in this folder ({', '.join(_TYPES)})"
                )
            found += inside
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def _prompts(
    paths: Sequence[Path], named: Sequence[Path], prompt: str | None
) -> tuple[dict[Path, Prompt], list[str]]:
    """The prompt that each image tells, or else this one, and what is wrong with those that are none.

    ConfigError with all mistakes if one of them was named itself, or if there is no image left.
    """
    found: dict[Path, Prompt] = {}
    mistakes: dict[Path, str] = {}
    for index, path in enumerate(paths):
        try:
            with _opened(path) as file:
                told = infotext.read({str(key): text for key, text in file.info.items()})
        except ConfigError as error:
            mistakes[path] = str(error)
            continue
        words = told.prompt or prompt or ""
        found[path] = Prompt(index, path.stem, words, told.seed or 0, told.negative_prompt)
    if mistakes and (not found or mistakes.keys() & set(named)):
        raise ConfigError("\n".join(mistakes.values()))
    return found, list(mistakes.values())


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file, whose pixels are still to be read; ConfigError if it is none."""
    try:
        with pillow_errors(), Image.open(path, formats=_FORMATS) as file:
            yield file
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: not an image that can be read ({one_line(error)})") from error


def _options(name: str, options: Sequence[str], is_only: bool) -> dict[str, Any]:
    """Those of the options that are this scorer's."""
    found: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        owner, dot, own = key.strip().rpartition(".")
        if not equals or not own:
            raise ConfigError(f"--option {option}: write it as KEY=VALUE")
        if (dot and owner == name) or (not dot and is_only):
            try:
                found[own] = toml.loads(f"value = {text}")["value"]
            except toml.TOMLDecodeError:
                found[own] = text
    return found


def _require_owners(options: Sequence[str], chosen: Iterable[str]) -> None:
    names = list(chosen)
    for option in options:
        owner = option.partition("=")[0].strip().rpartition(".")[0]
        if (owner and owner not in names) or (not owner and len(names) > 1):
            raise ConfigError(f"--option {option}: write it as {names[0]}.KEY=VALUE")


def _require_prompts(judges: Mapping[str, Scorer], prompts: Mapping[Path, Prompt]) -> None:
    """ConfigError where a scorer needs prompts that the images do not tell."""
    needing = [n for n, one in judges.items() if "prompt" in getattr(_about(one), "sees", "")]
    mute = [path for path, prompt in prompts.items() if not prompt.prompt]
    if needing and mute:
        raise ConfigError(
            f"{len(mute)} of {len(prompts)} images tell no prompt (first: {mute[0]}), which "
            f"{' and '.join(needing)} needs; give it by --prompt"
        )


def _about(judge: Scorer) -> Any:
    return getattr(judge, "about", None)


def _scored(
    judges: dict[str, Scorer], prompts: Mapping[Path, Prompt]
) -> Iterator[tuple[Prompt, Path, dict[str, float] | str]]:
    """Each image with its scores, or with why it has none."""
    files = list(prompts.items())
    for start in range(0, len(files), _AT_ONCE):
        found: dict[Path, dict[str, float] | str] = {}
        some: dict[Path, Sample] = {}
        for path, prompt in files[start : start + _AT_ONCE]:
            try:
                with _opened(path) as file:
                    some[path] = Sample(file.convert("RGB"), prompt)
            except ConfigError as error:
                found[path] = str(error).removeprefix(f"{path}: ")
        samples = list(some.values())
        try:
            found |= zip(some, judging.score(judges, samples), strict=True)
        except TrialError:
            found |= {path: _alone(judges, sample) for path, sample in some.items()}
        yield from ((p, path, found[path]) for path, p in files[start : start + _AT_ONCE])


def _alone(judges: dict[str, Scorer], sample: Sample) -> dict[str, float] | str:
    try:
        return judging.score(judges, [sample])[0]
    except TrialError as error:
        return str(error)


@contextmanager
def _own_output() -> Iterator[IO[str]]:
    """The standard output for answers alone: what anybody else prints goes to the standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
        try:
            yield answers
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def _orders(lines: IO[str]) -> Iterator[list[dict[str, Any]]]:
    """What is asked, as much at once as is there already."""
    heard: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in lines:
            heard.put(line)
        heard.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        some = [heard.get()]
        while len(some) < _AT_ONCE and some[-1] is not None:
            try:
                some.append(heard.get_nowait())
            except queue.Empty:
                break
        asked = [told for line in some if line and (told := _order_in(line))]
        if asked:
            yield asked
        if some[-1] is None:
            return


def _order_in(line: str) -> dict[str, Any] | None:
    """What a line asks for; None for one that is no table of JSON, which is passed over."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _answers(judge: Scorer, asked: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """An answer to each; an image that cannot be scored does not spoil the others."""
    numbers: list[Any] = []
    samples: list[Sample] = []
    for one in asked:
        try:
            with pillow_errors(), Image.open(one["image"], formats=_FORMATS) as file:
                image = file.convert("RGB")
            texts = {
                key: str(one.get(key, "")) for key in ("payload", "prompt", "negative_prompt")
            }
            samples.append(
                Sample(
                    image,
                    Prompt(
                        len(samples),
                        texts["payload"],
                        texts["prompt"],
                        int(one.get("seed", 0)),
                        texts["negative_prompt"],
                    ),
                )
            )
            numbers.append(one["id"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            yield {"id": one.get("id"), "error": f"{type(error).__name__}: {one_line(error)}"}
    try:
        found = [row["it"] for row in judging.score({"it": judge}, samples)]
        yield from ({"id": n, "score": s} for n, s in zip(numbers, found, strict=True))
    except TrialError:
        for number, sample in zip(numbers, samples, strict=True):
            told = _alone({"it": judge}, sample)
            if isinstance(told, str):
                yield {"id": number, "error": told}
            else:
                yield {"id": number, "score": told["it"]}
