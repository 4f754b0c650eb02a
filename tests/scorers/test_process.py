"""Scorers that are programs: each test runs a real one."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bayesian_merger.data import Prompt, Sample
from bayesian_merger.errors import ConfigError, TrialError
from bayesian_merger.scorers import process, scorer

HEAD = "import json, os, sys, time\nfrom PIL import Image\n"
LOOP = """
for line in sys.stdin:
    asked = json.loads(line)
    with Image.open(asked["image"]) as image:
        grey = image.convert("L").getpixel((0, 0))
"""


def program(folder: Path, body: str, before: str = "", **options: Any) -> Any:
    """A scorer whose program does `body` for each line, which has the grey of the image in it."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    (folder / "judge.py").write_text(HEAD + before + "\n" + LOOP + lines, encoding="utf-8")
    given = {"command": ["python", "judge.py"], "folder": ".", **options}
    return scorer.build("process", given, folder)


def samples(*greys: int, prompt: str = "a cat") -> list[Sample]:
    return [
        Sample(Image.new("RGB", (8, 8), (g, g, g)), Prompt(i, "cats", prompt, seed=100 + i))
        for i, g in enumerate(greys)
    ]


ANSWER = 'print(json.dumps({"id": asked["id"], "score": grey / 2}))'


def test_scores_are_what_the_program_answers(tmp_path: Path) -> None:
    judge = program(tmp_path, ANSWER)
    assert judge(samples(10, 30)) == [5.0, 15.0]
    assert judge(samples(7)) == [3.5]
    assert judge([]) == []


def test_program_is_told_all_of_an_image(tmp_path: Path) -> None:
    told = 'with open("told.txt", "a") as file: file.write(line)\n' + ANSWER
    judge = program(tmp_path, told)
    prompt = 'ünï "quoted" \\ line\nbreak <b>'
    judge(samples(10, prompt=prompt))

    last = json.loads((tmp_path / "told.txt").read_text().splitlines()[-1])
    assert last["prompt"] == prompt
    assert (last["seed"], last["payload"], last["negative_prompt"]) == (100, "cats", "")
    assert not Path(last["image"]).exists()  # by now


def test_answers_may_come_in_any_order_and_between_chatter(tmp_path: Path) -> None:
    backwards = """\
print("loading 37%")
print('{"id": "x"}')
print(json.dumps({"id": asked["id"], "progress": 1}))
kept = globals().setdefault("kept", []); kept.append((asked["id"], grey))
if asked["payload"] == "first" or len(kept) == 3:
    for number, one in reversed(kept): print(json.dumps({"id": number, "score": one}))
    kept.clear()"""
    judge = program(tmp_path, backwards)
    assert judge(samples(1, 2, 3)) == [1.0, 2.0, 3.0]


def test_program_is_started_once(tmp_path: Path) -> None:
    judge = program(tmp_path, ANSWER, before='open("starts", "a").write("x")')
    for _ in range(3):
        judge(samples(1, 2))
    assert (tmp_path / "starts").read_text() == "x"


def test_program_that_dies_is_started_anew_and_asked_for_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dying = (
        f"{ANSWER}\nif grey == 2 and not os.path.exists('dead'): open('dead', 'w'); os._exit(3)"
    )
    judge = program(tmp_path, dying, before='open("starts", "a").write("x")')
    assert judge(samples(1, 2, 3)) == [0.5, 1.0, 1.5]
    assert "judge.py has died, and is started anew (exit code 3)" in caplog.text
    assert judge(samples(4)) == [2.0]
    assert (tmp_path / "starts").read_text() == "xx"


def test_program_that_always_dies_fails_the_trial_with_its_last_words(tmp_path: Path) -> None:
    judge = program(tmp_path, f"if grey == 2: raise OSError('no eyes')\n{ANSWER}")
    with pytest.raises(TrialError, match=r"died again and again: exit code 1: OSError: no eyes"):
        judge(samples(1, 2))
    assert judge(samples(1)) == [0.5]


def test_error_fails_the_trial_and_not_the_next(tmp_path: Path) -> None:
    said = 'print(json.dumps({"id": asked["id"], "error": "no\\nface"})) if grey == 2 else '
    judge = program(tmp_path, said + ANSWER)
    with pytest.raises(TrialError, match=r"judge.py: no face"):
        judge(samples(2, 1, 2))
    assert judge(samples(6)) == [3.0]


def test_scorer_that_wants_another_picture_than_the_first_can_be_had(tmp_path: Path) -> None:
    said = 'print(json.dumps({"id": asked["id"], "error": "grey"})) if grey == 128 else '
    assert program(tmp_path, said + ANSWER)(samples(4)) == [2.0]


def test_program_that_hangs_is_stopped_and_started_anew(tmp_path: Path) -> None:
    hanging = f"if grey == 2: time.sleep(60)\n{ANSWER}"
    judge = program(tmp_path, hanging, timeout_s=0.5)
    start = time.monotonic()
    with pytest.raises(TrialError, match=r"has not answered in 0.5 s; raise timeout_s"):
        judge(samples(1, 2))
    assert time.monotonic() - start < 20
    assert judge(samples(6)) == [3.0]


@pytest.mark.parametrize("score", ["'high'", "None", "True", "[1]"])
def test_answer_without_a_number_fails_the_trial(tmp_path: Path, score: str) -> None:
    body = f'print(json.dumps({{"id": asked["id"], "score": {score} if grey == 2 else 1}}))'
    judge = program(tmp_path, body)
    with pytest.raises(TrialError, match="answered without a score"):
        judge(samples(2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"command": []}, "names no program"),
        ({"command": ["no-such-program-here"]}, "there is no program 'no-such-program-here'"),
        ({"command": ["python", "none.py"]}, r"has died: exit code 2.*none\.py"),
        ({"timeout_s": 0}, "must be more than 0"),
        ({"command": "python judge.py"}, "option 'command'"),
    ],
)
def test_program_that_cannot_be_is_told_before_the_run(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        program(tmp_path, ANSWER, **options)


def test_program_that_does_not_even_read_is_stopped(tmp_path: Path) -> None:
    judge = program(tmp_path, f"{ANSWER}\nif grey != 128: time.sleep(60)", timeout_s=0.5)
    with pytest.raises(TrialError, match="has not answered in"):
        judge(samples(*range(20), prompt="x" * 20_000))


@pytest.mark.skipif(sys.platform == "win32", reason="a script of a shell")
@pytest.mark.parametrize("name", ["judge.sh", "./judge.sh", "bin/../judge.sh"])
def test_program_is_found_from_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "judge.sh"
    script.write_text(
        '#!/bin/sh\nn=0\nwhile read -r _; do n=$((n+1)); echo "{\\"id\\": $n, \\"score\\": 4}"; done\n'
    )
    script.chmod(0o755)
    judge = scorer.build("process", {"command": [name], "folder": "."}, tmp_path)
    assert judge(samples(1, 2)) == [4.0, 4.0]


def test_program_that_never_answers_is_told_before_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_SILENT_S", 0.5)
    said = r"has not answered in 2 s: loading 37%; raise start_timeout_s"
    with pytest.raises(ConfigError, match=said):
        program(tmp_path, "print('loading 37%')", start_timeout_s=2)
    assert caplog.text.count("waiting for judge.py, up to 2 s") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="processes are looked for by signal 0")
def test_program_ends_with_its_scorer(tmp_path: Path) -> None:
    judge = program(tmp_path, ANSWER, before='open("pid", "w").write(str(os.getpid()))')
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)
    del judge
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
