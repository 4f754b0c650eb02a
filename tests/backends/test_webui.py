"""A webui as the back end, over HTTP, beside servers with all their habits."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import http_fake
import httpx
import numpy as np
import pytest
import toy_plugin
from PIL import Image
from proxy_fake import Fault, Proxy, changes, cuts
from test_run import Silent
from webui_fake import A1111, FORGE, KINDS, NEXT, OLD, Answer, FakeWebUI

from bayesian_merger import config as configuration
from bayesian_merger import guard, judging, run, setup
from bayesian_merger import outcome as outcomes
from bayesian_merger import server as module
from bayesian_merger.backends.webui import WebUI
from bayesian_merger.data import Outcome, Prompt
from bayesian_merger.errors import CheckpointError, ConfigError, RunError, TrialError
from bayesian_merger.setup import Setup
from bayesian_merger.study import Trial

Begin = Callable[..., FakeWebUI]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A configuration for a webui, whose folder of checkpoints has the two models and its own."""
    models = tmp_path / "models"
    models.mkdir()
    toy_plugin.write_model(models / "own.safetensors", 0.3)
    toy_plugin.write_model(models / "zero.safetensors", 0.0)
    toy_plugin.write_model(models / "one.safetensors", 1.0)
    size = "width = 64\nheight = 64\n"
    (tmp_path / "portrait.toml").write_text(f'prompt = "a portrait"\n{size}')
    (tmp_path / "landscape.toml").write_text(f'prompt = "a lake"\n{size}')
    (tmp_path / "config.toml").write_text(
        """
        models = { a = "models/zero.safetensors", b = "models/one.safetensors" }
        search = { images = 12 }
        panel = { payloads = ["portrait.toml", "landscape.toml"] }
        heldout = { images = 4, select_images = 2, candidates = 2 }
        backend = { name = "webui" }
        scorers = { exposure = { target = 0.6 } }
        """
    )
    return tmp_path


@pytest.fixture
def begin(folder: Path) -> Iterator[Begin]:
    begun: list[FakeWebUI] = []

    def one(kind: str = A1111, **options: Any) -> FakeWebUI:
        begun.append(FakeWebUI(kind, folder / "models", **options))
        begun[-1].chosen = begun[-1].loaded = "own.safetensors"
        return begun[-1]

    yield one
    for fake in begun:
        fake.stop()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 0.05)


def ready(folder: Path, fake: FakeWebUI, *overrides: str) -> Setup:
    options = (f"backend.url={fake.url}", "backend.wait_for_server=2s", *overrides)
    return setup.prepare(configuration.load(folder / "config.toml", options), folder, "toy")


def start(folder: Path, fake: FakeWebUI, *overrides: str, into: str = "run") -> Outcome:
    chosen = ready(folder, fake, *overrides)
    try:
        return run.run(chosen, folder / into, Silent(), report=False)
    finally:
        chosen.backend.close()


def loaded(folder: Path, fake: FakeWebUI, *overrides: str, name: str = "even") -> Setup:
    """The even merge, or a parent, in the server."""
    chosen = ready(folder, fake, *overrides)
    recipe = chosen.baseline(name)
    try:
        chosen.backend.load(recipe, chosen.merger.merge(recipe))
    except Exception:
        chosen.backend.close()
        raise
    return chosen


def payload(folder: Path, text: str) -> None:
    prompt = "" if text.startswith("prompt") else 'prompt = "a portrait"\n'
    (folder / "portrait.toml").write_text(f"{prompt}width = 64\nheight = 64\n{text}\n")


def ours(folder: Path) -> list[str]:
    """What this program has in the server's folder."""
    return sorted(path.name for path in (folder / "models").rglob("*") if is_ours(path))


def is_ours(path: Path) -> bool:
    return "bayesian-merger" in str(path.relative_to(path.parents[1])) and path.name != ".lock"


def told(changes: dict[str, Any]) -> Callable[[str, Any, Answer], Answer]:
    """Images of which the server says that they were made otherwise."""

    def twist(path: str, body: Any, answer: Answer) -> Answer:
        status, found = answer
        if path.endswith("txt2img"):
            found = {**found, "info": json.dumps({**json.loads(found["info"]), **changes})}
        return status, found

    return twist


def replied(changes: dict[str, Any]) -> Callable[[str, Any, Answer], Answer]:
    """Answers to images with other entries."""

    def twist(path: str, body: Any, answer: Answer) -> Answer:
        return (200, {**answer[1], **changes}) if path.endswith("txt2img") else answer

    return twist


@pytest.mark.parametrize("kind", KINDS)
def test_run_finds_the_better_merge_and_leaves_the_server_as_it_was(
    folder: Path, begin: Begin, kind: str
) -> None:
    fake = begin(kind)
    outcome = start(folder, fake)
    assert outcome.finished
    assert fake.chosen == "own.safetensors"
    assert ours(folder) == []
    gain = outcome.gain["over_even"]
    assert gain.mean > 0


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_0_and_1_make_the_images_of_a_and_b(
    folder: Path, begin: Begin, kind: str
) -> None:
    fake = begin(kind)
    for name, model in {"a": "zero", "b": "one"}.items():
        chosen = loaded(folder, fake, "merge.precision=fp32", name=name)
        prompt = chosen.panel[0]
        (sample,) = chosen.backend.generate([prompt])
        body = {**fake.bodies[-1]}
        fake.chosen = f"{model}.safetensors"
        answer = fake.answer("/sdapi/v1/txt2img", body, "")[1]
        theirs = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
        assert sample.image.tobytes() == theirs.convert("RGB").tobytes()
        assert sample.image.size == (64, 64)
        chosen.backend.close()


@pytest.mark.parametrize(
    ("kind", "sampler", "scheduler", "sent"),
    [
        (A1111, "Euler", "Automatic", ("Euler", "Automatic")),
        (A1111, "k_euler", "Automatic", ("Euler", "Automatic")),
        (A1111, "DPM++ 2M Karras", "Automatic", ("DPM++ 2M", "Karras")),
        (A1111, "DPM++ 2M", "karras", ("DPM++ 2M", "Karras")),
        (A1111, "Euler a", "SGM Uniform", ("Euler a", "SGM Uniform")),
        (FORGE, "DPM++ 2M Karras", "Karras", ("DPM++ 2M", "Karras")),
        (OLD, "DPM++ 2M", "Karras", ("DPM++ 2M Karras", None)),
        (OLD, "DPM++ 2M Karras", "Automatic", ("DPM++ 2M Karras", None)),
        (NEXT, "UniPC", "Automatic", ("UniPC", None)),
        (NEXT, "DPM++ 2M", "Karras", ("DPM++ 2M", None)),
    ],
)
def test_samplers_go_by_the_names_that_the_server_has(
    folder: Path,
    begin: Begin,
    kind: str,
    sampler: str,
    scheduler: str,
    sent: tuple[str, str | None],
) -> None:
    payload(folder, f'sampler_name = "{sampler}"\nscheduler = "{scheduler}"')
    fake = begin(kind)
    chosen = loaded(folder, fake)
    list(chosen.backend.generate(chosen.panel[:1]))
    body = fake.bodies[-1]
    assert (body["sampler_name"], body.get("scheduler")) == sent
    chosen.backend.close()


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (A1111, 'sampler_name = "Eulr"', "no sampler 'Eulr'; did you mean 'Euler'"),
        (A1111, 'sampler_name = "DPM++ 2M Karas"', "did you mean 'DPM\\+\\+ 2M Karras'"),
        (A1111, 'scheduler = "Karas"', "no scheduler 'Karas'; did you mean 'Karras'"),
        (OLD, 'scheduler = "Karras"', "no sampler 'Euler Karras'; leave out the scheduler"),
        (A1111, 'styles = ["mody"]', "no style 'mody'; did you mean 'moody'"),
        (A1111, 'enable_hr = true\nhr_upscaler = "Latnt"', "no upscaler 'Latnt'"),
        (A1111, 'enable_hr = true\nhr_sampler_name = "Eulr"', "no sampler 'Eulr'"),
        (A1111, 'enable_hr = true\nhr_scheduler = "Karas"', "no scheduler 'Karas'"),
        (A1111, 'prompt = "a <lora:detial:0.7> lake"', "no LoRA 'detial'; did you mean 'detail'"),
        (
            A1111,
            'override_settings = { sd_vae = "brght.vae.pt" }',
            "no VAE 'brght.vae.pt'; did you",
        ),
        (A1111, "alwayson_scripts = { controlnett = {} }", "no script 'controlnett'"),
        (A1111, "tilling = true", "no field 'tilling'; did you mean 'tiling'"),
        (A1111, "send_images = false", "leave out send_images, the images are needed"),
        (A1111, "override_settings = { clip = 2 }", "no setting 'clip'"),
        (
            NEXT,
            "override_settings = { sd_vae = 2, sd_unet = 3 }",
            "sd_unet would take another model",
        ),
        (A1111, "override_settings = 2", "override_settings is no table"),
        (A1111, 'alwayson_scripts = "controlnet"', "alwayson_scripts is no table"),
        (A1111, 'styles = "moody"', "styles is no list"),
        (A1111, 'script_name = "nonesuch"', "no script 'nonesuch'"),
        (A1111, 'refiner_checkpoint = "x"', "it would take another model than the merge"),
        (
            A1111,
            'override_settings = { sd_model_checkpoint = "x" }',
            "would take another model than the merge",
        ),
    ],
)
def test_what_the_server_lacks_is_said_before_the_run(
    folder: Path, begin: Begin, kind: str, text: str, said: str
) -> None:
    payload(folder, text)
    with pytest.raises(ConfigError, match=said):
        ready(folder, begin(kind))


def test_list_that_is_empty_is_a_list(folder: Path, begin: Begin) -> None:
    payload(folder, 'styles = ["moody"]')
    fake = begin()
    fake.twist = lambda path, body, answer: (200, []) if path.endswith("prompt-styles") else answer
    with pytest.raises(ConfigError, match="no style 'moody'"):
        ready(folder, fake)


def test_what_has_come_since_the_server_was_started_is_found(folder: Path, begin: Begin) -> None:
    payload(folder, 'prompt = "a <lora:new:1> lake"')
    fake = begin()

    def twist(path: str, body: Any, answer: Answer) -> Answer:
        fake.loras += ["new"] * path.endswith("refresh-loras")
        return answer

    fake.twist = twist
    ready(folder, fake).backend.close()


@pytest.mark.parametrize(
    ("setting", "said"),
    [("sd_unet", "a U-Net of its own"), ("sd_text_encoder", "a text encoder of its own")],
)
def test_server_that_puts_its_own_part_into_every_model_is_refused(
    folder: Path, begin: Begin, setting: str, said: str
) -> None:
    fake = begin()
    fake.twist = lambda path, body, answer: (
        (200, {**answer[1], setting: "fast.trt"}) if path.endswith("options") else answer
    )
    with pytest.raises(ConfigError, match=f"{said} .*, fast.trt; choose None as .*{setting}"):
        ready(folder, fake)


def test_hires_fix_of_forge_is_what_its_page_sends(folder: Path, begin: Begin) -> None:
    """Its API lacks modules that its own code asks for, and takes a CFG scale of 1."""
    payload(folder, "enable_hr = true\ncfg_scale = 5")
    fake = begin(FORGE)
    chosen = loaded(folder, fake)
    list(chosen.backend.generate(chosen.panel[:2]))
    chosen.backend.close()
    hires, plain = fake.bodies
    assert hires["hr_additional_modules"] == ["Use same choices"]
    assert hires["hr_cfg"] == 5
    assert not plain.keys() & {"hr_additional_modules", "hr_cfg"}


def test_vae_that_cannot_be_looked_up_is_noted(folder: Path, begin: Begin) -> None:
    payload(folder, 'override_settings = { sd_vae = "bright.vae.pt" }')
    fake = begin(FORGE)
    fake.twist = lambda path, body, answer: (
        (404, {"detail": "Not Found"}) if path.endswith("sd-vae") else answer
    )
    chosen = ready(folder, fake)
    chosen.backend.close()
    assert "nothing is known of bright.vae.pt" in chosen.notes[1]


@pytest.mark.parametrize("before", [{}, {"CLIP_stop_at_last_layers": 1}])
@pytest.mark.parametrize("kind", [A1111, NEXT])
def test_setting_that_a_payload_overrides_is_its_own(
    folder: Path, begin: Begin, kind: str, before: dict[str, int]
) -> None:
    """A webui does not put back what its file of settings lacks."""
    payload(folder, "override_settings = { CLIP_stop_at_last_layers = 2 }")
    fake = begin(kind)
    fake.settings = dict(before)
    start(folder, fake)
    clip_skips: dict[str, set[int]] = {}
    for body, used in zip(fake.bodies, fake.made_with, strict=True):
        clip_skips.setdefault(body["prompt"], set()).add(used["CLIP_stop_at_last_layers"])
    if kind == A1111:
        assert clip_skips == {"a portrait": {2}, "a lake": {1}}
        assert fake.settings["CLIP_stop_at_last_layers"] == 1
    else:  # which puts it back, and tells only of what was ever changed
        assert all(
            body.get("override_settings") in (None, {"CLIP_stop_at_last_layers": 2})
            for body in fake.bodies
        )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (A1111, "stable-diffusion-webui 1.9.3 or later at http"),
        (OLD, "stable-diffusion-webui 1.6 to 1.8 at http"),
        (FORGE, "Forge at http"),
        (NEXT, "SD.Next 058a7f0 at http"),
    ],
)
def test_server_is_recognised(folder: Path, begin: Begin, kind: str, said: str) -> None:
    chosen = ready(folder, begin(kind))
    chosen.backend.close()
    assert chosen.notes[0].startswith(said)


def test_webui_that_is_too_old_is_said(folder: Path, begin: Begin) -> None:
    fake = begin()

    def twist(path: str, body: Any, answer: Answer) -> Answer:
        if path == "/openapi.json":
            del answer[1]["components"]["schemas"]["Txt2Img"]["properties"]["refiner_checkpoint"]
        return answer

    fake.twist = twist
    with pytest.raises(ConfigError, match=r"older than version 1\.6; update it"):
        ready(folder, fake)


def test_fields_of_a_payload_go_to_the_server_as_they_are(folder: Path, begin: Begin) -> None:
    settings = "override_settings = { CLIP_stop_at_last_layers = 2 }"
    payload(folder, f'{settings}\nstyles = ["Moody"]\ntiling = true\nsave_images = true')
    fake = begin()
    chosen = loaded(folder, fake)
    (sample,) = chosen.backend.generate(chosen.panel[:1])
    body = fake.bodies[-1]
    assert body["override_settings"] == {"CLIP_stop_at_last_layers": 2}
    assert body["styles"] == ["Moody"]
    assert body["tiling"] is True
    assert body["seed"] == chosen.panel[0].seed == sample.prompt.seed
    chosen.backend.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"all_seeds": [3]}, "asked for with seed .*, and made with 3"),
        ({"steps": 7}, "asked for with steps 20, and made with 7"),
        ({"cfg_scale": 5.0}, "cfg_scale 7.0, and made with 5.0"),
        ({"width": 56}, "width 64, and made with 56"),
        ({"sampler_name": "DPM++ 2M"}, "sampler_name Euler, and made with DPM"),
        (
            {"infotexts": ["a\nSteps: 20, Schedule type: Karras, Seed: 1"]},
            "scheduler Automatic, and made with Karras",
        ),
        ({"sd_model_name": "own"}, "its checkpoint is changed again and again"),
    ],
)
def test_image_that_was_made_otherwise_fails_the_trial(
    folder: Path, begin: Begin, changes: dict[str, Any], said: str
) -> None:
    fake = begin()
    chosen = loaded(folder, fake)
    fake.twist = told(changes)
    with pytest.raises(TrialError, match=said):
        list(chosen.backend.generate(chosen.panel[:1]))
    chosen.backend.close()


def test_checkpoint_that_is_changed_in_the_webui_is_changed_back(
    folder: Path, begin: Begin
) -> None:
    fake = begin()
    chosen = loaded(folder, fake)
    (before,) = chosen.backend.generate(chosen.panel[:1])
    fake.chosen = "one.safetensors"
    (after,) = chosen.backend.generate(chosen.panel[:1])
    assert after.image.tobytes() == before.image.tobytes()
    chosen.backend.close()


def image(width: int, height: int) -> str:
    data = io.BytesIO()
    Image.new("RGB", (width, height)).save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": [], "info": ""}, "answered without an image"),
        ({"images": None}, "answered without an image"),
        ({"info": ""}, "does not say what the image was made with"),
        ({"info": "[1]"}, "does not say what the image was made with"),
        ({"images": ["no picture"]}, "cannot be read"),
        ({"images": [base64.b64encode(b"GIF89a").decode()]}, "cannot be read"),
        ({"images": [image(56, 64)]}, "an image of 56 x 64, not 64 x 64"),
        ({"images": [image(9_000, 8_000)]}, "an image of 9000 x 8000"),
    ],
)
def test_answer_that_is_no_image_fails_the_trial(
    folder: Path, begin: Begin, changes: dict[str, Any], said: str
) -> None:
    fake = begin()
    chosen = loaded(folder, fake)
    fake.twist = replied(changes)
    with pytest.raises(TrialError, match=said):
        list(chosen.backend.generate(chosen.panel[:1]))
    chosen.backend.close()


def test_image_that_the_user_interrupts_is_made_again(folder: Path, begin: Begin) -> None:
    fake = begin()
    chosen = loaded(folder, fake)

    def twist(path: str, body: Any, answer: Answer) -> Answer:
        fake.interrupted = len(fake.bodies) < 2
        return answer

    fake.twist = twist
    assert len(list(chosen.backend.generate(chosen.panel[:1]))) == 1
    assert len(fake.bodies) == 2
    chosen.backend.close()


def test_image_that_is_interrupted_each_time_fails_the_trial(folder: Path, begin: Begin) -> None:
    fake = begin()
    chosen = loaded(folder, fake)
    fake.interrupted = True
    with pytest.raises(TrialError, match="images are interrupted again and again"):
        list(chosen.backend.generate(chosen.panel[:1]))
    chosen.backend.close()


def test_server_that_does_not_take_the_merge_fails_the_trial(folder: Path, begin: Begin) -> None:
    fake = begin()

    def twist(path: str, body: Any, answer: Answer) -> Answer:
        fake.chosen = "own.safetensors"
        return answer

    fake.twist = twist
    with pytest.raises(TrialError, match=r"did not take the merge, it has own\.safetensors"):
        loaded(folder, fake)
    assert ours(folder) == []


def test_failures_of_the_server_are_asked_again_and_those_of_ours_are_not(
    folder: Path, begin: Begin
) -> None:
    fake = begin()
    chosen = loaded(folder, fake)
    fake.errors = 2
    assert len(list(chosen.backend.generate(chosen.panel[:1]))) == 1
    fake.errors = 3
    with pytest.raises(TrialError, match="HTTP 500: CUDA out of memory"):
        list(chosen.backend.generate(chosen.panel[:1]))
    before = fake.asked["/sdapi/v1/txt2img"]
    fake.twist = lambda path, body, answer: (422, {"detail": [{"msg": "not a number"}]})
    with pytest.raises(TrialError, match=r"HTTP 422: .*not a number"):
        list(chosen.backend.generate(chosen.panel[:1]))
    assert fake.asked["/sdapi/v1/txt2img"] == before + 1
    fake.twist = lambda path, body, answer: answer
    chosen.backend.close()


def test_server_that_is_asked_too_often_is_asked_later(folder: Path, begin: Begin) -> None:
    """As SD.Next says after 60 images in a minute."""
    fake = begin(NEXT)
    chosen = loaded(folder, fake)
    left = 5

    def twist(path: str, body: Any, answer: Answer) -> Answer:
        nonlocal left
        left -= 1
        return (429, {"error": "rate limit"}) if left > 0 else answer

    fake.twist = twist
    assert len(list(chosen.backend.generate(chosen.panel[:1]))) == 1
    left = 50
    with pytest.raises(TrialError, match="HTTP 429: rate limit"):
        list(chosen.backend.generate(chosen.panel[:1]))
    left = 0
    chosen.backend.close()


def test_answer_that_breaks_off_is_asked_for_again(folder: Path, begin: Begin) -> None:
    fake = begin()
    chosen = loaded(folder, fake)
    (before,) = chosen.backend.generate(chosen.panel[:1])
    fake.cut = 1
    (after,) = chosen.backend.generate(chosen.panel[:1])
    assert fake.cut == 0
    assert after.image.tobytes() == before.image.tobytes()
    chosen.backend.close()


def test_answer_that_does_not_end_fails_the_trial_and_is_not_asked_for_again(
    folder: Path, begin: Begin
) -> None:
    """The server may be busy with something else, and would make the image twice."""
    fake = begin()
    chosen = loaded(folder, fake, "backend.timeout_s=1.5")
    fake.slow = 1
    with pytest.raises(TrialError, match=r"no whole answer in 1\.5 s; is the webui busy"):
        list(chosen.backend.generate(chosen.panel[:1]))
    assert fake.asked["/sdapi/v1/txt2img"] == 1
    chosen.backend.close()


def test_sdnext_whose_images_are_many_jobs_makes_each_once(folder: Path, begin: Begin) -> None:
    fake = begin(NEXT)
    chosen = loaded(folder, fake)
    fake.others = 1
    list(chosen.backend.generate(chosen.panel[:1]))
    assert len(fake.bodies) == 1
    chosen.backend.close()


def test_server_that_fails_at_the_first_merge_may_be_asked_again(
    folder: Path, begin: Begin
) -> None:
    fake = begin()
    chosen = ready(folder, fake)
    recipe = chosen.baseline("even")
    fake.errors = 3
    with pytest.raises(TrialError, match="HTTP 500"):
        chosen.backend.load(recipe, chosen.merger.merge(recipe))
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    assert "bayesian-merger" in fake.chosen
    chosen.backend.close()
    assert fake.chosen == "own.safetensors"


def test_image_whose_end_nobody_saw_is_made_twice(folder: Path, begin: Begin) -> None:
    """Once another job has begun, the server no longer tells whether ours was interrupted."""
    fake = begin()
    chosen = loaded(folder, fake)
    for others, made in ((1, 2), (2, 2)):
        before = len(fake.bodies)
        fake.others = others
        list(chosen.backend.generate(chosen.panel[:1]))
        assert len(fake.bodies) - before == made
    chosen.backend.close()


@pytest.mark.parametrize("status", [502, 503, 504])
def test_proxy_before_a_server_that_is_away_is_waited_for(
    folder: Path, begin: Begin, status: int
) -> None:
    fake = begin()
    chosen = loaded(folder, fake, "backend.wait_for_server=20s")
    left = 5

    def twist(path: str, body: Any, answer: Answer) -> Answer:
        nonlocal left
        left -= 1
        return (status, b"<html>bad gateway") if left > 0 else answer

    fake.twist = twist
    assert len(list(chosen.backend.generate(chosen.panel[:1]))) == 1
    chosen.backend.close()


def test_server_that_was_started_anew_gets_the_merge_again(folder: Path, begin: Begin) -> None:
    fake = begin()
    chosen = loaded(folder, fake, "backend.wait_for_server=20s")
    (before,) = chosen.backend.generate(chosen.panel[:1])
    fake.stop()
    again: list[FakeWebUI] = []

    def revive() -> None:
        time.sleep(0.5)
        again.append(begin(port=fake.port))

    thread = threading.Thread(target=revive)
    thread.start()
    (after,) = chosen.backend.generate(chosen.panel[:1])
    thread.join()
    assert after.image.tobytes() == before.image.tobytes()
    chosen.backend.close()
    assert again[0].chosen == "own.safetensors"


def test_server_that_stays_away_stops_the_run_which_then_goes_on(
    folder: Path, begin: Begin
) -> None:
    fake = begin()
    made = 0

    def dies(path: str, body: Any, answer: Answer) -> Answer:
        nonlocal made
        made += path.endswith("txt2img")
        if made == 15:
            threading.Thread(target=fake.stop).start()
            time.sleep(0.2)
        return answer

    whole = start(folder, fake, into="whole")
    n_whole = fake.asked["/sdapi/v1/txt2img"]
    fake.twist = dies
    with pytest.raises(
        RunError, match=r"has gone away .*; start it, and give the same command again"
    ):
        start(folder, fake, "backend.wait_for_server=0.5s")
    left = outcomes.read_outcome(folder / "run", outcomes.open_study(folder / "run"))
    assert 6 <= sum(len(r.scores) for r in left.results) <= 15
    again = begin(port=fake.port)
    outcome = start(folder, again)
    assert [r.scores for r in outcome.results] == [r.scores for r in whole.results]
    assert again.asked["/sdapi/v1/txt2img"] < n_whole - 10


KILLED = """
import os, signal, sys, time
from pathlib import Path
from bayesian_merger import config, setup
from bayesian_merger.backends.webui import WebUI

folder = Path(sys.argv[1])
chosen = setup.prepare(config.load(folder / "config.toml", [sys.argv[2]]), folder, "toy")
recipe = chosen.baseline("even")
chosen.backend.load(recipe, chosen.merger.merge(recipe))
if sys.argv[3] == "guard":
    chosen.backend._claim._guard._process.kill()
if sys.argv[3] == "run" and os.fork() == 0:
    time.sleep(20)  # a child of a scorer, say, which lives on
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("way", ["file", "memory"])
@pytest.mark.parametrize("whom", ["run", "guard"])
def test_checkpoint_of_the_server_is_given_back_when_the_run_is_killed(
    folder: Path, begin: Begin, whom: str, way: str
) -> None:
    """By its guard, or if that was killed too, by the next run."""
    payload(folder, "override_settings = { CLIP_stop_at_last_layers = 2 }")
    fake = begin(auth="me:secret", home=folder / "home" if way == "memory" else None)
    command = [sys.executable, "-c", KILLED, str(folder), f"backend.url={fake.url}", whom]
    secret = {"BAYESIAN_MERGER_AUTH": "me:secret"}
    killed = subprocess.run(command, env={**os.environ, **secret}, check=False)
    assert killed.returncode == -signal.SIGKILL
    fake.settings = {"CLIP_stop_at_last_layers": 2}
    if whom == "guard":
        assert "bayesian-merger" in fake.chosen
        # The merge, and for files their folder.
        assert len(ours(folder) + places(folder)) == (2 if way == "file" else 1)
        fake.auth = ""
        loaded(folder, fake, name="a").backend.close()
    end = time.monotonic() + 20
    while ours(folder) + places(folder) and time.monotonic() < end:
        time.sleep(0.05)
    assert fake.chosen == "own.safetensors"
    assert fake.settings == {"CLIP_stop_at_last_layers": 1}
    assert ours(folder) + places(folder) == []


def in_memory(folder: Path, begin: Begin, kind: str = A1111, **options: Any) -> FakeWebUI:
    """A webui that has our extension, and no folder of checkpoints that could be written to."""
    (folder / "models").chmod(0o500)
    return begin(kind, home=folder / "home", **options)


def places(folder: Path) -> list[str]:
    """What is in the extension's folder, but for its token."""
    return sorted(p.name for p in (folder / "home").glob("*/*") if p.name != "token")


@pytest.mark.parametrize("kind", [A1111, OLD])
def test_run_by_the_extension_is_the_same_as_by_files(
    folder: Path, begin: Begin, kind: str
) -> None:
    whole = start(folder, begin(kind), into="files")
    fake = in_memory(folder, begin, kind)
    files: list[str] = []

    def watched(path: str, body: Any, answer: Answer) -> Answer:
        files.extend(ours(folder))
        return answer

    fake.twist = watched
    outcome = start(folder, fake, into="memory")
    assert files == []
    assert [r.scores for r in outcome.results] == [r.scores for r in whole.results]
    assert [r.images for r in outcome.results] == [r.images for r in whole.results]
    assert fake.chosen == "own.safetensors"
    assert fake.asked["/sdapi/v1/refresh-checkpoints"] == 1  # at the end
    assert places(folder) == []


def test_merge_in_memory_comes_back_after_another_choice_and_a_restart(
    folder: Path, begin: Begin
) -> None:
    fake = in_memory(folder, begin)
    chosen = loaded(folder, fake, "backend.wait_for_server=20s")
    (before,) = chosen.backend.generate(chosen.panel[:1])
    fake.chosen = "one.safetensors"
    (after,) = chosen.backend.generate(chosen.panel[:1])
    assert after.image.tobytes() == before.image.tobytes()
    fake.stop()
    again = in_memory(folder, begin, port=fake.port)
    (after,) = chosen.backend.generate(chosen.panel[:1])
    assert after.image.tobytes() == before.image.tobytes()
    chosen.backend.close()
    assert again.chosen == "own.safetensors"
    assert places(folder) == []


@pytest.mark.parametrize("way", ["file", "memory"])
def test_losses_while_the_merge_is_loaded_do_not_count_for_images(
    folder: Path, begin: Begin, way: str
) -> None:
    fake = begin(home=folder / "home" if way == "memory" else None)
    chosen = ready(folder, fake, "backend.wait_for_server=20s")
    left = {"/bayesian-merger/v1/load": 2, "/sdapi/v1/options": 3}

    def twist(path: str, body: Any, answer: Answer) -> Answer:
        left[path] = left.get(path, 0) - 1
        return (502, b"<html>bad gateway") if left[path] >= 0 else answer

    fake.twist = twist
    recipe = chosen.baseline("even")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    loads = fake.asked["/bayesian-merger/v1/load"], fake.asked["/sdapi/v1/refresh-checkpoints"]
    list(chosen.backend.generate(chosen.panel[:1]))
    again = fake.asked["/bayesian-merger/v1/load"], fake.asked["/sdapi/v1/refresh-checkpoints"]
    assert again == loads
    chosen.backend.close()


def test_place_that_is_removed_meanwhile_is_made_again(folder: Path, begin: Begin) -> None:
    fake = in_memory(folder, begin)
    chosen = loaded(folder, fake)
    shutil.rmtree(next((folder / "home").iterdir()))
    recipe = chosen.baseline("b")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    (sample,) = chosen.backend.generate(chosen.panel[:1])
    assert np.asarray(sample.image).mean() == pytest.approx(192, abs=8)
    shutil.rmtree(next((folder / "home").iterdir()))
    fake.extension = None
    recipe = chosen.baseline("a")
    with pytest.raises(RunError, match="is gone, and with it the place for merges"):
        chosen.backend.load(recipe, chosen.merger.merge(recipe))
    chosen.backend.close()


def test_merge_for_which_there_is_no_room_is_said_before_the_run(
    folder: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = begin(home=folder / "home")
    asked: list[int] = []

    def twist(path: str, body: Any, answer: Answer) -> Answer:
        if path.endswith("/place"):
            asked.append(body["bytes"])
            return (507, {"detail": "no room"}) if len(asked) > 1 else answer
        return answer

    fake.twist = twist
    with pytest.raises(ConfigError, match="no place for a merge: HTTP 507: no room"):
        ready(folder, fake, "merge.precision=fp32")
    assert asked[1] == 2 * asked[0]  # of 32 bits, where 16 were thought of
    free = shutil.disk_usage(folder)._replace(free=100)
    monkeypatch.setattr("bayesian_merger.checkpoint.shutil.disk_usage", lambda path: free)
    with pytest.raises(CheckpointError, match=r"only 0\.00 MB are free"):
        ready(folder, fake, "backend.extension=false")


def test_merge_of_a_run_of_which_nothing_is_noted_is_told(
    folder: Path, begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    fake = begin()
    chosen = ready(folder, fake)
    place = folder / "models" / "bayesian-merger-01234567"
    place.mkdir()
    left = toy_plugin.write_model(place / "bayesian-merger-0123456789abcdef.safetensors", 0.4)
    fake.answer("/sdapi/v1/refresh-checkpoints", {}, "")
    fake.chosen = left.name
    recipe = chosen.baseline("b")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    assert "has a merge of an earlier run, and nothing tells what it had before" in caplog.text
    chosen.backend.close()
    assert fake.chosen == "one.safetensors"  # the first that it lists


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_settings_that_somebody_has_chosen_since_a_crash_are_kept(
    folder: Path, begin: Begin
) -> None:
    payload(folder, "override_settings = { CLIP_stop_at_last_layers = 2 }")
    fake = begin()
    command = [sys.executable, "-c", KILLED, str(folder), f"backend.url={fake.url}", "guard"]
    subprocess.run(command, check=False)
    fake.chosen, fake.settings = "zero.safetensors", {"CLIP_stop_at_last_layers": 3}
    loaded(folder, fake).backend.close()
    assert fake.chosen == "zero.safetensors"
    assert fake.settings == {"CLIP_stop_at_last_layers": 3}


def receipt(**changes: Any) -> Callable[[str, Any, Answer], Answer]:
    def twist(path: str, body: Any, answer: Answer) -> Answer:
        return (200, {**answer[1], **changes}) if path.endswith("/load") else answer

    return twist


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "own"}, "did not take the merge, it has own"),
        ({"name": None}, "did not take the merge, it has None"),
        ({"nonce": "0" * 16}, "not of this merge, but an old one"),
        ({"nonce": None}, "not of this merge, but an old one"),
        ({"live": {}}, "does not tell of its model's U-Net"),
        ({"live": None}, "does not tell of its model's U-Net"),
    ],
)
def test_wrong_receipt_fails_the_trial(
    folder: Path, begin: Begin, changes: dict[str, Any], said: str
) -> None:
    fake = in_memory(folder, begin)
    fake.twist = receipt(**changes)
    with pytest.raises(TrialError, match=said):
        loaded(folder, fake)


def test_model_that_the_webui_keeps_in_spite_of_the_merge_fails_the_trial(
    folder: Path, begin: Begin
) -> None:
    """As Forge does where only the dictionary of the weights is given to it."""
    fake = in_memory(folder, begin)
    chosen = loaded(folder, fake, name="a")
    known = fake.extension.sd_models  # type: ignore[union-attr]
    known.reload_model_weights = lambda model, info: setattr(model, "sd_checkpoint_info", info)
    recipe = chosen.baseline("b")
    with pytest.raises(TrialError, match="the server's model is not the merge"):
        chosen.backend.load(recipe, chosen.merger.merge(recipe))
    chosen.backend.close()
    assert fake.chosen == "own.safetensors"


def test_extension_of_another_machine_leaves_files_as_the_way(folder: Path, begin: Begin) -> None:
    fake = begin(home=folder / "home")

    def twist(path: str, body: Any, answer: Answer) -> Answer:
        elsewhere = {"folder": "/nowhere/bayesian-merger-01234567"}
        return (200, {**answer[1], **elsewhere}) if path.endswith("/place") else answer

    fake.twist = twist
    chosen = loaded(folder, fake)
    assert "/nowhere/bayesian-merger-01234567 cannot be seen from here" in chosen.notes[0]
    assert f"each merge is a file in {folder / 'models'}" in chosen.notes[0]
    chosen.backend.close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((507, {"detail": "no room for 2.1 GB in /dev/shm or /tmp"}), "no room for 2.1 GB"),
        ((200, []), "names no place"),
        ((200, {"folder": "/tmp", "token_sha256": "0" * 64}), "names no place"),
        ((200, {"folder": "//far/bayesian-merger-01234567"}), "names no place"),
        ((200, {"folder": "\\\\far\\bayesian-merger-01234567"}), "names no place"),
        ((405, {"detail": "Method Not Allowed"}), ""),
        ((200, b"<html>"), ""),
    ],
)
def test_extension_without_a_place_leaves_files_as_the_way(
    folder: Path, begin: Begin, answer: Answer, said: str
) -> None:
    fake = begin()
    fake.twist = lambda path, body, found: answer if path.endswith("/place") else found
    chosen = ready(folder, fake)
    chosen.backend.close()
    assert f"each merge is a file in {folder / 'models'}" in chosen.notes[0]
    assert said in chosen.notes[0]
    assert ("our extension" in chosen.notes[0]) == bool(said)


@pytest.mark.parametrize(
    ("url", "name"),
    [("http://192.0.2.1:7860", "own.safetensors"), ("http://127.0.0.1:1", "notes")],
)
def test_server_elsewhere_or_with_other_files_names_no_folder_for_merges(
    tmp_path: Path, url: str, name: str
) -> None:
    (tmp_path / name).touch()
    backend = WebUI(url)
    with pytest.raises(ConfigError, match=r"name it as backend\.models_dir"):
        backend._folder([{"filename": str(tmp_path / name)}])
    backend.close()


def test_extension_may_be_left_aside(folder: Path, begin: Begin) -> None:
    chosen = ready(folder, begin(home=folder / "home"), "backend.extension=false")
    chosen.backend.close()
    assert "each merge is a file" in chosen.notes[0]


def order(folder: Path, url: str, wait_s: float = 0.5) -> str:
    settings = {"sd_model_checkpoint": "own.safetensors"}
    (folder / guard.JOURNAL).write_text(json.dumps({"token": "x", "settings": settings}))
    places = {"folder": str(folder), "home": str(folder)}
    about = {
        "parent": os.getppid(),
        "url": url,
        "path": "/sdapi/v1/options",
        "token": "x",
        **places,
    }
    more = {"auth_env": "X", "verify": True, "wait_s": wait_s, "options": {}}
    return json.dumps({**about, **more, "settings": settings})


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without a signal")
def test_ctrl_c_says_what_it_waits_for(folder: Path, begin: Begin) -> None:
    fake = begin()
    is_asked = threading.Event()

    def slow(path: str, body: Any, answer: Answer) -> Answer:
        if path.endswith("txt2img"):
            is_asked.set()
            time.sleep(1)
        return answer

    fake.twist = slow
    command = [sys.executable, "-m", "bayesian_merger", "run", str(folder / "config.toml")]
    with subprocess.Popen(
        [*command, "--set", f"backend.url={fake.url}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert is_asked.wait(60)
        process.terminate()  # as Ctrl-C, which a process in the background is told to ignore
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in told.splitlines() if line] == [
        "stopping, when the server has ended what it is at ...",
        "stopped; the same command goes on from here",
    ]
    assert fake.chosen == "own.safetensors"


def test_guard_tries_again_where_an_answer_breaks_off(
    folder: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_PAUSE_S", 0.1)
    fake = begin()
    fake.chosen = "one.safetensors"
    fake.broken = 3
    guard.watch(io.StringIO(order(folder, fake.url, wait_s=20)))
    assert fake.chosen == "own.safetensors"
    assert not (folder / guard.JOURNAL).exists()


def test_guard_that_is_dismissed_ends_though_a_child_holds_its_pipe_open(folder: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as orders, os.fdopen(writing, "w") as held:
        held.write(order(folder, "http://127.0.0.1:9") + "\nnull\n")
        held.flush()
        start = time.monotonic()
        guard.watch(orders)
        assert time.monotonic() - start < 5
        held.close()  # for the thread that still reads


def test_guards_that_were_left_are_no_zombies(folder: Path, begin: Begin) -> None:
    fake = begin()
    for _ in range(2):
        chosen = loaded(folder, fake)
        process = chosen.backend._claim._guard._process  # type: ignore[attr-defined]
        chosen.backend._claim.abandon()  # type: ignore[attr-defined]
        chosen.backend._claim = None  # type: ignore[attr-defined]
        process.wait()
        chosen.backend.close()
    loaded(folder, fake).backend.close()
    assert guard._left == []


@pytest.mark.parametrize(
    ("title", "is_ours"),
    [
        (
            "bayesian-merger-0123abcd/bayesian-merger-0123456789abcdef.safetensors [0123456789]",
            True,
        ),
        (r"C:\models\bayesian-merger-0123abcd\bayesian-merger-0123456789abcdef.safetensors", True),
        ("bayesian-merger-0123456789abcdef", True),
        ("bayesian-merger-best.safetensors", False),
        ("/src/bayesian-merger-main/models/own.safetensors", False),
        ("bayesian-merger-0123456789abcdef0.safetensors", False),
        ("", False),
    ],
)
def test_merges_of_ours_are_told_from_what_is_called_alike(title: str, is_ours: bool) -> None:
    assert guard.is_ours(title) == is_ours


@pytest.mark.parametrize(
    ("now", "before", "is_same"),
    [
        ("own.safetensors [0123456789]", "own.safetensors [abcdef0123]", True),
        ("own.safetensors", "own.safetensors [abcdef0123]", True),
        ("real [v3].safetensors", "real [v2].safetensors", False),
        ("real [v3]", "real [v2]", False),
    ],
)
def test_checkpoints_are_the_same_but_for_their_hash(now: str, before: str, is_same: bool) -> None:
    assert guard.is_given({"model": now}, {"model": before}) == is_same


def test_checkpoint_that_is_called_like_ours_is_given_back(folder: Path, begin: Begin) -> None:
    toy_plugin.write_model(folder / "models" / "bayesian-merger-best.safetensors", 0.4)
    fake = begin()
    fake.chosen = "bayesian-merger-best.safetensors"
    loaded(folder, fake).backend.close()
    assert fake.chosen == "bayesian-merger-best.safetensors"


def test_server_is_known_by_any_address_of_this_machine() -> None:
    near = [f"http://{host}:7860" for host in ("localhost", "127.0.0.1", "127.1.2.3", "0.0.0.0")]
    near += ["http://[::1]:7860/", f"http://{socket.gethostname()}:7860"]
    assert len({module.key_of(url) for url in near}) == 1
    others = ["http://127.0.0.1:7861", "http://192.0.2.7:7860", "http://127.0.0.1:7860/sub"]
    assert len({module.key_of(url) for url in (near[0], *others)}) == 4
    assert module.key_of("https://127.0.0.1") == module.key_of("https://localhost:443")


@pytest.mark.parametrize("path", ["options", "progress", "txt2img"])
@pytest.mark.parametrize("answer", [[1], "x", 7, None])
def test_answer_of_another_kind_is_no_stack_trace(
    folder: Path, begin: Begin, path: str, answer: Any
) -> None:
    fake = begin()
    chosen = loaded(folder, fake)
    fake.twist = lambda at, body, found: (200, answer) if path in at else found
    recipe = chosen.baseline("a")
    # A webui that tells no progress may make images, and others may not.
    with suppress(TrialError, RunError):
        chosen.backend.load(recipe, chosen.merger.merge(recipe))
        list(chosen.backend.generate(chosen.panel[:1]))
    fake.twist = lambda at, body, found: found
    chosen.backend.close()
    assert fake.chosen == "own.safetensors"


@pytest.mark.parametrize("answer", [None, (500, {"errors": "starting"}), (200, {"updated": []})])
def test_guard_leaves_to_the_next_run_what_the_server_does_not_take(
    folder: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch, answer: Answer | None
) -> None:
    monkeypatch.setattr(guard, "_PAUSE_S", 0.1)
    fake = begin()
    if answer:
        fake.twist = lambda path, body, found: answer
    merge = folder / "bayesian-merger-0123456789abcdef.safetensors"
    merge.write_bytes(b"")
    guard.watch(
        io.StringIO(
            order(folder, "http://127.0.0.1:9")
            + "\n"
            + order(folder, fake.url if answer else "http://127.0.0.1:9")
        )
    )
    assert not merge.exists()
    assert guard.journal_of(folder)["settings"] == {"sd_model_checkpoint": "own.safetensors"}


def test_guard_of_a_run_leaves_the_next_run_alone(folder: Path, begin: Begin) -> None:
    fake = begin()
    text = order(folder, fake.url)
    (folder / guard.JOURNAL).write_text(json.dumps({"token": "of another"}))
    guard.watch(io.StringIO(text))
    assert not fake.asked
    assert (folder / guard.JOURNAL).exists()


def test_run_ends_well_though_its_guard_was_killed(folder: Path, begin: Begin) -> None:
    fake = begin()
    chosen = loaded(folder, fake)
    process = chosen.backend._claim._guard._process  # type: ignore[attr-defined]
    process.kill()
    process.wait()
    recipe = chosen.baseline("a")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    chosen.backend.close()
    assert fake.chosen == "own.safetensors"
    assert ours(folder) == []


def test_files_of_others_are_left_alone(folder: Path, begin: Begin) -> None:
    fake = begin()
    mine = folder / "models" / "bayesian-merger-best.safetensors"
    toy_plugin.write_model(mine, 0.4)
    chosen = loaded(folder, fake)
    place = next(path for path in (folder / "models").iterdir() if path.is_dir())
    (place / "notes.txt").write_text("mine")
    (place / ".bayesian-merger-0123456789abcdef.safetensors.17.part").write_bytes(b"half")
    recipe = chosen.baseline("a")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    assert not list(place.glob(".*.part"))
    chosen.backend.close()
    assert mine.exists()
    assert [path.name for path in place.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("by", ["run", "guard"])
def test_checkpoint_whose_hash_has_changed_is_given_back(
    folder: Path, begin: Begin, by: str
) -> None:
    """As after a restart in which the server has computed it, or the file was written anew."""
    fake = begin()
    chosen = loaded(folder, fake)
    fake.salt = "2"
    if by == "guard":
        process = chosen.backend._claim._guard._process  # type: ignore[attr-defined]
        chosen.backend._claim._guard.leave()  # type: ignore[attr-defined]
        process.wait()
        assert fake.chosen == "own.safetensors"
        chosen.backend._claim._guard = None  # type: ignore[attr-defined]
    chosen.backend.close()
    assert fake.chosen == "own.safetensors"
    assert ours(folder) == []


def test_schedule_that_the_server_does_not_choose_is_noted(folder: Path, begin: Begin) -> None:
    payload(folder, 'scheduler = "Karras"')
    chosen = ready(folder, begin(NEXT))
    chosen.backend.close()
    assert "so its own setting holds, not Karras" in chosen.notes[1]


@pytest.mark.parametrize("way", ["file", "memory"])
def test_two_runs_do_not_share_a_server(folder: Path, begin: Begin, way: str) -> None:
    """Whatever ways they take to it, and however they spell its address."""
    fake = begin(home=folder / "home")
    chosen = loaded(folder, fake, f"backend.extension={str(way == 'file').lower()}")
    with pytest.raises(ConfigError, match="another run has the server"):
        start(folder, fake, "search.seed=3")
    assert not outcomes.has_study(folder / "run", None)  # so it may begin otherwise
    for address in (fake.url, f"{fake.url.replace('127.0.0.1', 'localhost')}/"):
        for extension in ("true", "false"):
            with pytest.raises(ConfigError, match="another run has the server"):
                loaded(folder, fake, f"backend.url={address}", f"backend.extension={extension}")
    other = loaded(folder, begin(FORGE))  # on a port of its own, in the same folder
    other.backend.close()
    assert len(list(chosen.backend.generate(chosen.panel[:1]))) == 1
    chosen.backend.close()


def test_image_of_which_no_model_is_told_is_asked_for_in_the_settings(
    folder: Path, begin: Begin
) -> None:
    fake = begin()
    chosen = loaded(folder, fake)
    fake.twist = told({"sd_model_name": None, "infotexts": ["a portrait\nSteps: 20"]})
    fake.chosen = "one.safetensors"
    (sample,) = chosen.backend.generate(chosen.panel[:1])
    assert "bayesian-merger" in fake.chosen
    assert np.asarray(sample.image).mean() == pytest.approx(128, abs=8)
    chosen.backend.close()


@pytest.mark.parametrize("secret", ["Bearer s3cret\n", "Bearer s3cr\u00e9t", "s3cret"])
def test_secret_is_never_shown(
    folder: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("BAYESIAN_MERGER_AUTH", secret)
    fake = begin(auth="me:other")
    with pytest.raises(ConfigError) as error:
        ready(folder, fake)
    assert "s3cr" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, {"detail": "Not Found"}), "has no API; start the webui with --api"),
        ((401, {"detail": "no"}), "asks for a user and a password; .* BAYESIAN_MERGER_AUTH"),
        ((200, b"<html>a router</html>"), "is no webui: .* the answer is text/html, not JSON"),
        ((200, {"hello": 1}), "is no webui that is known"),
        ((503, b"<html>busy"), "nothing answers"),
        ((418, {"detail": "tea"}), "options: HTTP 418: tea"),
    ],
)
def test_something_else_at_the_address_is_said(
    folder: Path, begin: Begin, answer: Answer, said: str
) -> None:
    fake = begin()
    fake.twist = lambda path, body, found: answer
    with pytest.raises(ConfigError, match=said):
        ready(folder, fake)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("backend.url=http://127.0.0.1:9", "nothing answers at http://127.0.0.1:9"),
        ("backend.url=127.0.0.1", "is no address"),
        ("backend.url=http://me:secret@127.0.0.1:7860", "holds a password"),
        ("backend.url=http://me:secret", "has no number from 1 to 65535 as its port"),
        ("backend.auth_env=DATABASE_URL", "a variable that begins with BAYESIAN_MERGER_"),
        ("backend.timeout_s=0", "timeout_s is 0"),
        ("backend.wait_for_server=soon", "write a time as '90s'"),
        ("backend.models_dir=nowhere", "is no folder"),
        ("backend.models_dir=empty", r"none of the 3 checkpoints .*first: one\.safetensors"),
    ],
)
def test_bad_options_are_said(folder: Path, begin: Begin, option: str, said: str) -> None:
    fake = begin()
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError, match=said) as caught:
        ready(folder, fake, option)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("path", ["samplers", "sd-models"])
def test_server_without_its_lists_is_said(folder: Path, begin: Begin, path: str) -> None:
    fake = begin()
    fake.twist = lambda asked, body, answer: (500, None) if asked.endswith(path) else answer
    with pytest.raises(ConfigError, match=f"/sdapi/v1/{path}: HTTP 500"):
        ready(folder, fake)


def test_folder_of_another_machine_must_be_named(folder: Path, begin: Begin) -> None:
    fake = begin()
    fake.twist = lambda path, body, answer: (
        (200, [{"title": "x", "filename": "/data/models/own.safetensors"}])
        if path.endswith("sd-models")
        else answer
    )
    with pytest.raises(ConfigError, match=r"cannot be seen from here .*backend\.models_dir"):
        ready(folder, fake)


def test_folder_that_the_server_does_not_look_into_stops_the_run(
    folder: Path, begin: Begin
) -> None:
    fake = begin()
    other = folder / "copy"
    other.mkdir()
    toy_plugin.write_model(other / "own.safetensors", 0.3)
    with pytest.raises(RunError, match=r"does not see .*name the folder in which it finds"):
        loaded(folder, fake, f"backend.models_dir={other}")
    assert [path.name for path in other.glob("*.safetensors")] == ["own.safetensors"]


def test_password_is_sent_and_left_nowhere(
    folder: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = begin(auth="me:se%cr:et")
    with pytest.raises(ConfigError, match="asks for a user and a password"):
        ready(folder, fake)
    monkeypatch.setenv("BAYESIAN_MERGER_AUTH", "me:se%cr:et")
    assert start(folder, fake).finished
    for path in (folder / "run").rglob("*"):
        assert not path.is_file() or b"se%cr:et" not in path.read_bytes()


def test_password_is_not_sent_on_to_where_a_server_leads(
    folder: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAYESIAN_MERGER_AUTH", "me:secret")
    asked: list[str] = []

    class Elsewhere(http_fake.FakeServer):
        def reply(self, to: BaseHTTPRequestHandler, body: Any) -> None:
            asked.append(to.path)
            to.wfile.write(http_fake.head(to, 200, {}))

    class Leading(http_fake.FakeServer):
        def reply(self, to: BaseHTTPRequestHandler, body: Any) -> None:
            to.send_response(307)
            to.send_header("location", f"{elsewhere.url}{to.path}")
            to.send_header("content-length", "0")
            to.end_headers()

    elsewhere, leading = Elsewhere(), Leading()
    elsewhere.serve()
    leading.serve()
    try:
        with pytest.raises(ConfigError, match="HTTP 307"):
            ready(folder, begin(), f"backend.url={leading.url}")
    finally:
        leading.stop()
        elsewhere.stop()
    assert not asked


@pytest.mark.parametrize("zipped", [False, True])
def test_answer_larger_than_any_of_a_webui_is_cut_off(
    folder: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 2**20)

    class Huge(http_fake.FakeServer):
        def reply(self, to: BaseHTTPRequestHandler, body: Any) -> None:
            to.send_response(200)
            if zipped:
                to.send_header("content-encoding", "gzip")
            to.end_headers()
            to.close_connection = True
            data = bytes(2**22)
            to.wfile.write(gzip.compress(data) if zipped else data)

    huge = Huge()
    huge.serve()
    try:
        with pytest.raises(ConfigError, match="an answer of more than 1 MiB"):
            ready(folder, begin(), f"backend.url={huge.url}")
    finally:
        huge.stop()


def test_where_the_server_is_may_change_between_two_starts(folder: Path, begin: Begin) -> None:
    first = start(folder, begin())
    assert start(folder, begin(), "backend.timeout_s=99").images == first.images


@pytest.mark.parametrize(
    ("text", "found"), [("90s", 90), ("10m", 600), ("2h", 7200), ("5", 5), ("0.5s", 0.5)]
)
def test_times(text: str, found: float) -> None:
    assert module._seconds(text, "x") == found


PATIENT = """
import threading
from bayesian_merger.scorers import scorer

is_next_begun = threading.Event()

@scorer
class Patient:
    'Waits with its first score until the next image is begun.'

    def __init__(self):
        self.is_first = True

    def __call__(self, samples):
        is_first, self.is_first = self.is_first, False
        return [float(is_next_begun.wait(20) if is_first else 2)]
"""


def test_image_is_scored_while_the_next_is_made(folder: Path, begin: Begin) -> None:
    (folder / "patient.py").write_text(PATIENT)
    fake = begin()
    chosen = loaded(folder, fake, 'plugins=["patient.py"]', "scorers.patient.weight=1")
    asked = 0

    def twist(path: str, body: Any, answer: Answer) -> Answer:
        nonlocal asked
        asked += path.endswith("txt2img")
        if asked == 2:
            sys.modules["bayesian_merger_plugin_patient"].is_next_begun.set()
        return answer

    fake.twist = twist
    trial = booked(folder, chosen)
    judging.judge(trial, chosen.panel, chosen, Silent(), None)
    assert [scores["patient"] for scores in trial.scores.values()] == [1.0, 2.0]
    chosen.backend.close()


def booked(folder: Path, chosen: Setup) -> Trial:
    (folder / "run").mkdir()
    study = outcomes.open_study(folder / "run", create=True)
    return study.book("baseline", "even", chosen.baseline("even"))


def test_image_is_kept_though_the_next_cannot_be_made(folder: Path, begin: Begin) -> None:
    fake = begin()
    chosen = loaded(folder, fake)
    fake.twist = lambda path, body, answer: (
        (422, None) if path.endswith("txt2img") and len(fake.bodies) == 2 else answer
    )
    trial = booked(folder, chosen)
    with pytest.raises(TrialError, match="HTTP 422"):
        judging.judge(trial, chosen.panel, chosen, Silent(), None)
    assert len(trial.scores) == 1
    chosen.backend.close()


def test_check_says_how_merges_reach_the_server(folder: Path, begin: Begin) -> None:
    chosen = ready(folder, begin(FORGE))
    chosen.backend.close()
    (note,) = chosen.notes
    assert note.startswith("Forge at http://127.0.0.1:")
    assert note.endswith(f"; each merge is a file in {folder / 'models'}")


def test_back_end_by_itself_needs_no_server() -> None:
    prompts: list[Prompt] = []
    back_end = WebUI("http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="nothing answers"):
        back_end.check(prompts, "sd1", {})
    back_end.close()


def several(*fakes: FakeWebUI) -> str:
    return f"backend.url={json.dumps([fake.url for fake in fakes])}"


def test_several_servers_make_the_images_of_one(folder: Path, begin: Begin) -> None:
    whole = start(folder, begin(), into="whole")
    fakes = [begin(), begin(), begin(home=folder / "home")]
    outcome = start(folder, fakes[0], several(*fakes))
    assert [r.scores for r in outcome.results] == [r.scores for r in whole.results]
    assert [r.images for r in outcome.results] == [r.images for r in whole.results]
    for i, fake in enumerate(fakes):
        seeds = {body["seed"] for body in fake.bodies}
        others = {b["seed"] for other in fakes if other is not fake for b in other.bodies}
        assert seeds, i
        assert not seeds & others  # an image has one server, whatever the merge
        assert fake.chosen == "own.safetensors"
    assert ours(folder) + places(folder) == []


def test_images_of_several_servers_are_made_side_by_side(folder: Path, begin: Begin) -> None:
    fakes = [begin(), begin()]
    chosen = loaded(folder, fakes[0], several(*fakes), "panel.batch_size=4")
    barrier = threading.Barrier(2, timeout=20)

    def together(path: str, body: Any, answer: Answer) -> Answer:
        if path.endswith("txt2img"):
            barrier.wait()  # breaks, if only one server is at work
        return answer

    for fake in fakes:
        fake.twist = together
    made = list(chosen.backend.generate(chosen.panel))
    assert [sample.prompt for sample in made] == list(chosen.panel)
    chosen.backend.close()


def test_one_of_several_servers_that_fails_fails_the_trial(folder: Path, begin: Begin) -> None:
    fakes = [begin(), begin()]
    chosen = loaded(folder, fakes[0], several(*fakes))
    fakes[1].twist = replied({"images": []})
    samples = chosen.backend.generate(chosen.panel)
    assert next(samples).prompt == chosen.panel[0]
    with pytest.raises(TrialError, match="answered without an image"):
        list(samples)
    chosen.backend.close()
    assert [fake.chosen for fake in fakes] == ["own.safetensors"] * 2


def test_images_of_other_servers_are_kept_though_one_fails(folder: Path, begin: Begin) -> None:
    fakes = [begin(), begin(), begin()]
    chosen = loaded(folder, fakes[0], several(*fakes), "panel.batch_size=2")
    is_late = threading.Event()

    def late(path: str, body: Any, answer: Answer) -> Answer:
        if path.endswith("txt2img"):
            is_late.wait(20)
        return answer

    def refuses(path: str, body: Any, answer: Answer) -> Answer:
        is_late.set()
        return (422, None) if path.endswith("txt2img") else answer

    fakes[0].twist, fakes[1].twist, fakes[2].twist = late, refuses, late
    trial = booked(folder, chosen)
    with pytest.raises(TrialError, match="HTTP 422"):
        judging.judge(trial, chosen.panel, chosen, Silent(), None)
    assert {0, 2} <= trial.scores.keys()
    chosen.backend.close()


FAILING = """
from bayesian_merger.scorers import scorer

@scorer
class Failing:
    '''A scorer that cannot score.'''

    def __call__(self, samples):
        raise ValueError("no taste")
"""


def test_no_image_is_made_any_more_when_a_scorer_has_failed(folder: Path, begin: Begin) -> None:
    (folder / "failing.py").write_text(FAILING)
    fakes = [begin(), begin()]
    more = ('plugins=["failing.py"]', "scorers.failing.weight=1", "panel.batch_size=20")
    chosen = loaded(folder, fakes[0], several(*fakes), *more)
    trial = booked(folder, chosen)
    with pytest.raises(TrialError, match="no taste") as caught:
        judging.judge(trial, chosen.panel, chosen, Silent(), None)
    time.sleep(0.3)
    n_asked = [len(fake.bodies) for fake in fakes]
    time.sleep(0.5)
    assert [len(fake.bodies) for fake in fakes] == n_asked
    assert sum(n_asked) < len(chosen.panel)
    assert caught.value.__traceback__  # which holds on to what failed
    chosen.backend.close()


def test_servers_that_are_away_are_not_waited_for_at_the_end(folder: Path, begin: Begin) -> None:
    fakes = [begin(), begin()]
    chosen = loaded(folder, fakes[0], several(*fakes), "backend.wait_for_server=1m")
    samples = chosen.backend.generate(chosen.panel)
    fakes[1].stop()
    next(samples)
    samples.close()  # type: ignore[attr-defined]
    begun = time.monotonic()
    chosen.backend.close()
    assert time.monotonic() - begun < 30
    assert fakes[0].chosen == "own.safetensors"


def test_mistakes_for_several_servers_are_told_of_each(folder: Path, begin: Begin) -> None:
    payload(folder, 'sampler_name = "Nonesuch"')
    fakes = [begin(), begin(OLD)]
    with pytest.raises(ConfigError, match=r"(?s)Nonesuch.*it has: .*\n.*Nonesuch.*2M Karras"):
        ready(folder, fakes[0], several(*fakes))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("backend.url=[]",), "names no server"),
        (('backend.url=["http://localhost:1", "http://127.0.0.1:1/"]',), "names a server twice"),
        (("backend.url=http://127.0.0.1:1/?token=x",), r"goes on after a \? or #"),
        (('backend.url=["http://x", 3]',), "url"),
        (
            ('backend.url=["http://x", "http://y"]', 'backend.models_dir=["a"]'),
            "backend.models_dir has 1 entries, backend.url 2",
        ),
    ],
)
def test_lists_of_servers_that_cannot_be_are_refused(
    folder: Path, begin: Begin, options: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        ready(folder, begin(), *options)


def real_url() -> str:
    """The address of a webui that runs."""
    url = os.environ.get("WEBUI_URL", "")
    if not url:
        pytest.skip("WEBUI_URL names no running webui")
    return url


def real_models(url: str) -> list[Path]:
    """The first two checkpoints of the server, by their files."""
    found = httpx.get(f"{url}/sdapi/v1/sd-models").json()
    files = [Path(one["filename"]) for one in found if "bayesian-merger" not in one["title"]]
    return [file for file in files if file.suffix == ".safetensors" and file.is_file()][:2]


def real_image(url: str, model: Path, prompt: Prompt) -> Image.Image:
    """What the server makes of a prompt with a checkpoint of its folder."""
    with httpx.Client(base_url=f"{url}/sdapi/v1", timeout=600) as client:
        client.post("/refresh-checkpoints").raise_for_status()
        models = client.get("/sd-models").json()
        title = next(one["title"] for one in models if Path(one["filename"]) == model)
        client.post("/options", json={"sd_model_checkpoint": title}).raise_for_status()
        asked = {
            **{"prompt": prompt.prompt, "seed": prompt.seed, "steps": prompt.steps},
            **{"width": prompt.width, "height": prompt.height, "cfg_scale": prompt.cfg_scale},
            "sampler_name": prompt.sampler_name,
        }
        answer = client.post("/txt2img", json=asked).raise_for_status().json()
    return Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).convert("RGB")


@pytest.mark.webui
@pytest.mark.parametrize("way", ["memory", "file"])
def test_real_server_makes_the_images_of_its_models_and_of_their_merge(
    folder: Path, way: str
) -> None:
    """To the bit; afterwards it has the checkpoint that it had, and no file of ours."""
    url = real_url()
    a, b = real_models(url)
    text = 'prompt = "a cat"\nwidth = 64\nheight = 64\nsteps = 2\nsampler_name = "Euler"\n'
    (folder / "portrait.toml").write_text(text)
    options = [f"backend.url={url}", f"models.a={a}", f"models.b={b}", "backend.timeout_s=600"]
    options.append(f"backend.extension={str(way == 'memory').lower()}")
    chosen = setup.prepare(configuration.load(folder / "config.toml", options), folder, "toy")
    assert ("our extension there takes" in chosen.notes[0]) == (way == "memory"), chosen.notes
    prompt, ours = chosen.panel[0], {}
    for name in ("a", "even", "b"):
        recipe = chosen.baseline(name)
        chosen.backend.load(recipe, chosen.merger.merge(recipe))
        (sample,) = chosen.backend.generate([prompt])
        ours[name] = sample.image
    chosen.backend.close()
    even = a.parent / "even-of-a-test.safetensors"
    chosen.merger.merge(chosen.baseline("even")).save(even)
    try:
        for name, model in {"a": a, "even": even, "b": b}.items():
            assert ours[name].tobytes() == real_image(url, model, prompt).tobytes(), name
    finally:
        even.unlink()
        real_image(url, a, prompt)
    assert not list(a.parent.glob("bayesian-merger-*/*"))


@pytest.mark.webui
def test_real_server_keeps_to_itself_what_a_payload_overrides(folder: Path) -> None:
    """Though its file of settings may lack what is overridden."""
    url = real_url()
    a, b = real_models(url)
    size = "width = 64\nheight = 64\nsteps = 1\n"
    (folder / "landscape.toml").write_text(f'prompt = "a red lake, at night"\n{size}')
    text = f"{size}override_settings = {{ CLIP_stop_at_last_layers = 2 }}\n"
    (folder / "portrait.toml").write_text(f'prompt = "a red lake, at night"\n{text}')
    options = [f"backend.url={url}", f"models.a={a}", f"models.b={b}"]
    before = httpx.get(f"{url}/sdapi/v1/options").json()
    chosen = setup.prepare(configuration.load(folder / "config.toml", options), folder, "toy")
    if chosen.notes[0].startswith("SD.Next"):
        chosen.backend.close()
        pytest.skip("SD.Next takes clip skip as a field of a payload")
    recipe = chosen.baseline("even")
    chosen.backend.load(recipe, chosen.merger.merge(recipe))
    skipped, whole = (
        replace(next(p for p in chosen.panel if p.payload == name), seed=1)
        for name in ("portrait", "landscape")
    )
    one, two, three = chosen.backend.generate([whole, skipped, whole])
    chosen.backend.close()
    assert one.image.tobytes() == three.image.tobytes()
    assert one.image.tobytes() != two.image.tobytes()
    after = httpx.get(f"{url}/sdapi/v1/options").json()
    known = ("sd_model_checkpoint", "CLIP_stop_at_last_layers")
    assert [after.get(name) for name in known] == [before.get(name) for name in known]


@pytest.mark.webui
def test_real_server_behind_a_bad_proxy_is_searched_as_without_it(folder: Path) -> None:
    """Three merges and the parents; what breaks is made again, what is false fails its trial only."""
    url = real_url()
    a, b = real_models(url)
    for name in ("portrait", "landscape"):
        text = f'prompt = "a {name}"\nwidth = 64\nheight = 64\nsteps = 1\n'
        (folder / f"{name}.toml").write_text(text)
    options = [f"models.a={a}", f"models.b={b}", "search.images=4", "search.images_per_trial=1"]
    options += ["heldout.images=2", "heldout.select_images=2", "heldout.candidates=1"]

    def searched(into: str, **faults: Fault) -> tuple[Outcome, Proxy]:
        proxy = Proxy(url, **faults)
        own = [*options, f"backend.url={proxy.url}", "backend.wait_for_server=2m"]
        try:
            chosen = setup.prepare(configuration.load(folder / "config.toml", own), folder, "toy")
            with closing(chosen.backend):
                return run.run(chosen, folder / into, Silent(), report=False), proxy
        finally:
            proxy.stop()

    whole, _ = searched("whole")
    broken, proxy = searched("broken", txt2img=cuts(5), options=cuts(4), load=cuts(3))
    assert proxy.met["txt2img"] >= 4
    assert [r.images for r in broken.results] == [r.images for r in whole.results]
    assert [r.scores for r in broken.results] == [r.scores for r in whole.results]
    # Six images are of the parents and the even merge, each later one of a trial.
    another = {"sd_model_name": "another", "infotexts": ["a\nSteps: 1, Model: another"]}
    lies: dict[int, dict[str, Any]] = {
        7: {"images": []},
        9: {"info": {"sampler_name": "DPM++ 2M"}},
        10: {"info": another},  # which is then made again by the merge
    }
    false, proxy = searched("false", txt2img=changes(lies))
    assert proxy.met["txt2img"] == 3
    assert false.finished
    faults = [r.reason for r in false.results if r.state == "failed"]
    assert len(faults) == 2
    assert "answered without an image" in faults[0]
    assert "sampler_name Euler, and made with DPM++ 2M" in faults[1]
