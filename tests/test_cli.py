from __future__ import annotations

import io
import json
import logging
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import toy_plugin
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from test_run import folder as folder
from test_run import start

from bayesian_merger import cli, recipes
from bayesian_merger.cli import progress, screen
from bayesian_merger.cli.asking import Asking
from bayesian_merger.data import Recipe, Result
from bayesian_merger.methods import method

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Runs the command line in this process: exit code, standard output, standard error."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in (getattr(signal, n) for n in names)}

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bayesian-merger", *map(str, arguments)])
        # Consoles are made at import, before pytest's capture.
        monkeypatch.setattr(screen.out, "file", sys.stdout)
        monkeypatch.setattr(screen.err, "file", sys.stderr)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        code = stop.value.code
        assert isinstance(code, int)
        return code, out, err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def truncated(folder: Path) -> None:
    path = folder / "one.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def text_file(folder: Path) -> None:
    (folder / "one.safetensors").write_text("<html>login required</html>")


def empty_file(folder: Path) -> None:
    (folder / "one.safetensors").write_bytes(b"")


def lying_header(folder: Path) -> None:
    (folder / "one.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


class Payload:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("unpickled", "w")


def pickled_code(folder: Path) -> None:
    (folder / "one.ckpt").write_bytes(pickle.dumps({"state_dict": Payload()}))
    configure(folder, 'b = "one.safetensors"', 'b = "one.ckpt"')


def pickled_object(folder: Path) -> None:
    torch.save({"state_dict": {"weight": "not a tensor"}}, folder / "one.ckpt")
    configure(folder, 'b = "one.safetensors"', 'b = "one.ckpt"')


def other_architecture(folder: Path) -> None:
    save_file({"conditioner.embedders.0.x": torch.zeros(2)}, folder / "one.safetensors")


def other_shapes(folder: Path) -> None:
    tensors = {name: torch.zeros(2, 3) for name in toy_plugin.TENSORS.values()}
    save_file(tensors, folder / "one.safetensors")


def no_prompt(folder: Path) -> None:
    (folder / "portrait.toml").write_text('negative_prompt = "blurry"\n')


def configure(folder: Path, old: str, new: str) -> None:
    path = folder / "config.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edited(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: configure(folder, old, new)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda f: (f / "one.safetensors").unlink(), "no such file"),
    "truncated file": (truncated, "not a whole safetensors file"),
    "text file": (text_file, "such as a server sends in place of a file"),
    "empty file": (empty_file, "not a whole safetensors file"),
    "lying header": (lying_header, "not a whole safetensors file"),
    "pickled code": (pickled_code, "refused"),
    "pickled object": (pickled_object, "entry 'weight' is str, not a tensor"),
    "other architecture": (other_architecture, "this is SDXL"),
    "other shapes": (other_shapes, "another shape than in model A"),
    "same file twice": (edited('b = "one.s', 'b = "zero.s'), "are the same file"),
    "third model missing": (
        edited("[search]", '[merge]\nmethod = "add_difference"\n[search]'),
        "merges 3 models",
    ),
    "unknown key": (edited("init_points", "init_point"), "'init_points'?"),
    "unknown section": (edited("[output]", "[ouput]"), "'output'?"),
    "wrong type": (edited("init_points = 4", 'init_points = "four"'), "search.init_points"),
    "broken TOML": (edited("[panel]", "[panel"), "not valid TOML"),
    "payload without prompt": (no_prompt, "no prompt"),
    "no payload": (edited('"*e.toml", "portrait.toml"', '"nothing*.toml"'), "no file matches"),
    "unknown wildcard": (edited('"wild"', '"."'), "unknown wildcard __place__"),
    "range upside down": (
        edited("init_points = 4", "ranges = { IN00 = [0.5, 0.4] }\ninit_points = 4"),
        "upside down",
    ),
    "unknown weight": (
        edited("init_points = 4", "freeze = { IN12 = 0.5 }\ninit_points = 4"),
        "'IN12' names no weight",
    ),
    "frozen and ranged": (
        edited("init_points = 4", "freeze = {M00 = 0.5}\nranges = {M00 = [0.1, 0.2]}\ninit_points = 4"),
        "both frozen and given a range",
    ),
    "nothing to search": (
        edited("init_points = 4", 'freeze = { "*" = 0.5 }\ninit_points = 4'),
        "nothing to search",
    ),
    "unknown optimiser": (
        edited("init_points = 4", 'optimiser = "bays"\ninit_points = 4'),
        "search: unknown optimiser 'bays'; did you mean 'bayes'",
    ),
    "unknown option of an optimiser": (
        edited("init_points = 4", 'options = { kapa = 2 }\ninit_points = 4'),
        "search: optimiser bayes has no option 'kapa'",
    ),
    "no trial at all": (
        edited("init_points = 4\n        n_iters = 3", "init_points = 0\nn_iters = 0"),
        "init_points and n_iters are both 0",
    ),
    "unknown scorer": (edited("likeness", "likenes"), "'likeness'?"),
    "unknown scorer option": (
        edited("[scorers.likeness]", "[scorers.likeness]\nsharp = 1"),
        "'sharpness'?",
    ),
    "unknown method": (edited("[search]", '[merge]\nmethod = "weighted"\n[search]'), "'weighted_sum'?"),
    "unknown back end": (edited('"stripes"', '"stripe"'), "'stripes'?"),
    "broken plugin": (edited("plugins = [", 'plugins = ["portrait.toml", '), "plugin"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("verb", ["run", "check"])
def test_bad_input_is_one_line_and_exit_code_2_before_anything_is_made(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch, name: str, verb: str
) -> None:
    spoil, said = BAD[name]
    spoil(folder)
    monkeypatch.chdir(folder)
    code, out, err = command(verb, folder / "config.toml", "--run-dir", folder / "run")
    assert code == 2, err
    assert said in err.replace("\n", " ")
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in out + err
    assert not (folder / "run").exists()
    assert not (folder / "unpickled").exists()


def test_all_mistakes_are_told_at_once(folder: Path, command: Command) -> None:
    (folder / "one.safetensors").unlink()
    no_prompt(folder)
    configure(folder, "likeness", "likenes")
    code, _, err = command("check", folder / "config.toml")
    assert code == 2
    assert len(err.strip().splitlines()) == 3


def test_full_disk_is_found_before_the_first_image(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    code, _, err = command("run", folder / "config.toml", "--run-dir", folder / "run")
    assert code == 2
    assert "only 0.00 MB are free" in err
    assert not (folder / "run" / "study.db").exists()


def test_check_makes_one_merge_and_one_batch_and_leaves_nothing(
    folder: Path, command: Command
) -> None:
    code, out, err = command("check", folder / "config.toml")
    assert code == 0, err
    assert "26 weights" in out
    assert "100 images" in out
    assert not (folder / "runs").exists()


def test_run_takes_the_names_of_the_original(folder: Path, command: Command) -> None:
    code, out, _ = command(
        "run", folder / "config.toml", "--init_points", 2, "--n_iters", 1, "--batch_size", 1
    )  # fmt: skip
    assert code == 0
    assert "about 52 images in all" in out  # 3 x 2 of the baselines, 3 x 2, 2 x 4, 4 x 8
    run_dir = folder / "runs" / "config"
    for name in (
        "report.html",
        "result.json",
        "best.toml",
        "best.log",
        *(
            f"figures/{name}{suffix}"
            for name in ("convergence", "unet", "parallel", "pictures", "slices")
            for suffix in (".png", ".svg")
        ),
    ):
        assert (run_dir / name).is_file()
    (run_dir / "best.toml").unlink()
    code, out, _ = command("report", run_dir)
    assert code == 0
    assert str(run_dir / "report.html") in out.replace("\n", "")
    assert recipes.read(run_dir / "best.toml").method == "weighted_sum"


def test_figure_that_cannot_be_written_takes_nothing_from_the_verdict(
    folder: Path, command: Command
) -> None:
    (folder / "runs" / "config" / "figures").mkdir(parents=True)
    (folder / "runs" / "config" / "figures" / "unet.png").mkdir()  # no file can take its place
    code, out, err = command("run", folder / "config.toml", "--n-iters", 0)
    assert code == 0
    assert "over the even merge" in out
    assert "a figure could not be written" in err


def test_fork_begins_a_run_that_goes_on_by_the_same_settings(
    folder: Path, command: Command
) -> None:
    command("run", folder / "config.toml", "--n-iters", 0)
    old, new = folder / "runs" / "config", folder / "new"
    wider = (folder / "config.toml", "--batch-size", 4, "--run-dir", new)
    code, out, _ = command("fork", old, *wider)
    assert code == 0
    assert "7 merges with 42 scores, 42 of images of the new panel\n" in out
    following = f"bayesian-merger run {folder / 'config.toml'} --run-dir {new}"
    assert f"next: {following}, and the same further options\n" in out
    assert command("run", *wider, "--n-iters", 0)[0] == 0
    code, _, err = command("fork", old, *wider)
    assert (code, "has begun already" in err) == (2, True)


def test_import_says_how_many_merges_are_tried_first(folder: Path, command: Command) -> None:
    log = folder / "bbwm.json"
    log.write_text('{"target": 1.5, "params": {"block_3_alpha": 0.25}}\n')
    code, out, _ = command("import", log, folder / "config.toml")
    assert (code, "merges that are tried first: 1\n" in out) == (0, True)
    code, _, err = command("import", folder / "no.json", folder / "config.toml")
    assert (code, "no.json: cannot be read" in err) == (2, True)


def test_merge_replays_a_recipe_and_never_overwrites(folder: Path, command: Command) -> None:
    command("run", folder / "config.toml", "--init-points", 1, "--n-iters", 0)
    run_dir = folder / "runs" / "config"
    best, again = run_dir / "best.safetensors", folder / "again.safetensors"
    assert command("merge", run_dir / "best.toml", "-o", again)[0] == 0
    assert again.read_bytes() == best.read_bytes()
    code, _, err = command("merge", run_dir / "best.toml", "-o", again)
    assert (code, "exists" in err) == (2, True)
    code, _, err = command(
        "merge", run_dir / "best.toml", "-o", folder / "zero.safetensors", "--overwrite"
    )
    assert (code, "one of the models" in err) == (2, True)


def test_init_writes_a_configuration_that_check_reads(tmp_path: Path, command: Command) -> None:
    assert command("init", tmp_path / "new")[0] == 0
    code, _, err = command("check", tmp_path / "new" / "config.toml")
    assert code == 2
    lines = err.strip().splitlines()
    assert len(lines) == 2
    assert all("no such file" in line for line in lines)
    assert "first.safetensors: no such file" in lines[0]
    code, _, err = command("init", tmp_path / "new")
    assert (code, "exists already" in err) == (2, True)


def test_report_of_a_folder_without_a_run_is_refused(tmp_path: Path, command: Command) -> None:
    code, _, err = command("report", tmp_path)
    assert code == 2
    assert "not a run folder" in err


def test_merge_by_a_method_of_the_user_is_rebuilt_with_its_plugin(
    folder: Path, command: Command
) -> None:
    start(folder, "merge.method=between", "search.n_iters=1")
    best, again = folder / "run" / "best.toml", folder / "again.safetensors"
    code, _, err = command("merge", best, "-o", again, "--plugin", toy_plugin.__file__)
    assert code == 0, err
    assert again.read_bytes() == (folder / "run" / "best.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["methods", "scorers", "backends", "architectures"])
def test_list_names_what_there_is(command: Command, kind: str) -> None:
    known = {
        "methods": "weighted_sum",
        "scorers": "exposure",
        "backends": "diffusers",
        "architectures": "sd1",
    }
    code, out, _ = command("list", kind)
    assert code == 0
    assert known[kind] in out


def test_list_names_a_plugin_that_says_nothing_of_itself(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    method.names()
    monkeypatch.setitem(method._found, "silent", lambda a, b: a)
    code, out, err = command("list", "methods")
    assert code == 0, err
    assert "silent" in out


def test_unknown_command_exits_with_2(command: Command) -> None:
    assert command("runn")[0] == 2


def test_what_servers_tell_is_nothing_that_a_terminal_obeys() -> None:
    text, recipe = io.StringIO(), Recipe("weighted_sum", "sd1", (), {})
    with progress.Lines(Console(file=text), Asking(), Path()) as observer:
        observer.noted("its VAE is \x1b]0;evil\x07\x1b[31mred.pt")
        failed = Result("explore", "trial 1", 1, "failed", recipe, {}, reason="HTTP 500: \x1b[2J")
        observer.finished(failed, None)
    assert "\x1b" not in text.getvalue()
    assert "red.pt" in text.getvalue()
    assert "HTTP 500" in text.getvalue()


def test_what_the_log_is_told_is_nothing_that_a_terminal_obeys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(screen.err, "file", text := io.StringIO())
    log = logging.Logger("a server's")
    log.addHandler(screen.Diagnostics())
    log.warning("it will have %s", "\x1b]0;evil\x07red.safetensors\nand more")
    assert text.getvalue() == "it will have \ufffd]0;evilred.safetensors\nand more\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no such names")
def test_names_of_files_are_nothing_that_a_terminal_obeys(
    tmp_path: Path, command: Command
) -> None:
    name = "\x1b[2J\x1b]0;evil\x07"
    Image.new("RGB", (8, 8), "grey").save(tmp_path / f"{name}.png")
    (tmp_path / f"{name}x.png").write_bytes(b"no image")
    for letter, value in (("a", 0.0), ("b", 1.0)):
        toy_plugin.write_model(tmp_path / f"{name}{letter}.safetensors", value)
    models = sorted(tmp_path.glob("*.safetensors"))
    for told in (
        command("score", tmp_path, "--scorer", "exposure"),
        command("merge", *models, "--alpha", "0.5", "--dry-run", "-o", tmp_path / "c.safetensors"),
        command("merge", *models, "--alpha", "0.5", "-o", tmp_path / f"{name}c.safetensors"),
        command("check", tmp_path / f"{name}.toml"),
        command("export", tmp_path / name),
    ):
        assert "evil" in told[1] + told[2]
        assert "\x1b" not in told[1] + told[2]
        assert "\x07" not in told[1] + told[2]


def test_run_tells_its_events_as_lines_of_json(folder: Path, command: Command) -> None:
    code, out, _ = command("run", folder / "config.toml", "--json")
    assert code == 0
    events = [json.loads(line) for line in out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "planned"
    assert kinds[-1] == "done"
    assert {"started", "judged", "finished"} < set(kinds)
    finished = [event for event in events if event["event"] == "finished"]
    assert [(f["stage"], f["name"]) for f in finished[:3]] == [
        ("baseline", "a"),
        ("baseline", "even"),
        ("baseline", "b"),
    ]
    assert all(f["state"] == "complete" and f["value"]["n"] > 0 for f in finished)
    made = sum(event["images"] for event in events if event["event"] == "judged" and event["made"])
    assert events[-1]["images"] == made
    assert events[-1]["verdict"].startswith("The best merge")
    assert events[-1]["report"] == str(folder / "runs" / "config" / "report.html")


def test_quiet_run_says_its_verdict_alone(folder: Path, command: Command) -> None:
    code, out, err = command("run", folder / "config.toml", "-q")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1
    assert out.startswith("The best merge")


def test_interruption_that_python_drops_is_made_again() -> None:
    program = """
import os, signal, sys, time, weakref
from bayesian_merger import cli

# Where the tests run in the background it is not heard.
signal.signal(signal.SIGINT, signal.default_int_handler)

class One:
    pass

def work(**_):
    one = One()
    ref = weakref.ref(one, lambda _: [os.kill(os.getpid(), signal.SIGINT), time.sleep(0.1)])
    del one  # what is raised in such a callback is only printed
    print("dropped", flush=True)
    time.sleep(30)

cli.commands.main = work
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=25, check=False
    )
    assert done.stdout == "dropped\n"
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
