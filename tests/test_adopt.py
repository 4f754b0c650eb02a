"""The settings of sd-webui-bayesian-merger as a configuration of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import toy_plugin
from test_cli import command as command

from bayesian_merger import adopt, config, prompts
from bayesian_merger.errors import ConfigError

SETTINGS = """
defaults:
  - _self_
  - payloads: cargo
  - optimisation_guide: guide
run_name: ${optimiser}_${scorer_method}
hydra: {run: {dir: logs}}
url: http://127.0.0.1:7861
device: cpu
wildcards_dir: wildcards
scorer_model_dir: models
model_a: models/zero.safetensors
model_b: models/one.safetensors
model_c: models/none.safetensors
merge_mode: weighted_sum
optimiser: bayes
guided_optimisation: True
latin_hypercube_sampling: True
batch_size: 2
init_points: 10
n_iters: 15
save_imgs: True
scorer_method: chad
save_best: True
best_format: safetensors
best_precision: 16
draw_unet_weights: False
"""
CARGO = """
defaults:
  - cargo:
    - portrait
    - lake
prompt: ""
neg_prompt: "blurry"
n_iter: 1
batch_size: 1
steps: 25
cfg_scale: 7
sampler_name: Euler
sampler_index: Euler
seed: -1
enable_hr: false
hr_upscaler: ""
styles: []
"""
GUIDE = """
frozen_params: {base_alpha: 0.5}
custom_ranges: {block_3_alpha: [0.2, 0.8]}
"""
INI = """
[options]
url = http://127.0.0.1:7860
payloads_dir = payloads
wildcards_dir = wildcards
model_a = models/zero.safetensors
model_b = models/one.safetensors
skip_position_ids = 0
optimiser = tpe
batch_size = 1
init_points = 2
n_iters = 3
scorer_method = exposure
save_best = yes
best_precision = 32
save_imgs = no
"""


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The folder of the tool, with conf/ in it as its users have it."""
    cargo = tmp_path / "conf" / "payloads" / "cargo"
    cargo.mkdir(parents=True)
    (tmp_path / "conf" / "config.yaml").write_text(SETTINGS)
    (cargo.parent / "cargo.yaml").write_text(CARGO)
    (cargo / "portrait.yaml").write_text('portrait:\n  prompt: "a __hair__ woman"\n  cfg: 5\n')
    (cargo / "lake.yaml").write_text('lake:\n  prompt: "a lake"\n  width: 768\n')
    guide = tmp_path / "conf" / "optimisation_guide"
    guide.mkdir()
    (guide / "guide.yaml").write_text(GUIDE)
    (tmp_path / "models").mkdir()
    for name, value in {"zero": 0.0, "one": 1.0}.items():
        toy_plugin.write_model(tmp_path / "models" / f"{name}.safetensors", value)
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards" / "hair.txt").write_text("red\nblond\n")
    return tmp_path


def read(there: Path, name: str = "conf/config.yaml", scorer: str = "") -> config.Config:
    """The settings as a configuration that is read."""
    written = there / "elsewhere" / "config.toml"
    written.parent.mkdir(exist_ok=True)
    written.write_text(adopt.adopted(there / name).text + scorer)
    return config.load(written)


def test_settings_are_a_configuration_that_does_the_same(there: Path) -> None:
    found = read(there, scorer="[scorers.exposure]\n")
    assert found.models.a == there / "models" / "zero.safetensors"
    assert found.models.b == there / "models" / "one.safetensors"
    assert found.models.c is None  # which weighted_sum has no use for
    assert (found.merge.method, found.merge.precision) == ("weighted_sum", "fp16")
    # 25 points, each of 2 images of 2 payloads
    assert (found.search.images, found.search.optimiser) == (100, "bayes")
    assert found.search.init == "lhs"
    assert found.search.guide == there / "conf" / "optimisation_guide" / "guide.yaml"
    assert found.panel.wildcards_dir == there / "wildcards"
    assert found.panel.batch_size == 2
    assert found.backend.name == "webui"
    assert found.backend.options == {"url": "http://127.0.0.1:7861"}
    assert (found.output.save_best, found.output.save_imgs) == (True, True)


def test_payloads_are_read_where_they_are(there: Path) -> None:
    found = read(there, scorer="[scorers.exposure]\n")
    files = found.payload_files(there / "elsewhere")
    portrait, lake = prompts.read_payloads(files, found.panel.defaults)
    assert (portrait.name, lake.name) == ("portrait", "lake")
    assert portrait.fields.negative_prompt == lake.fields.negative_prompt == "blurry"
    assert (portrait.fields.cfg_scale, lake.fields.cfg_scale) == (5.0, 7.0)
    assert (portrait.fields.steps, lake.fields.width) == (25, 768)
    assert portrait.fields.model_extra == {}  # nothing but what differs from the usual


def test_what_has_no_place_here_is_told(there: Path) -> None:
    notes = "\n".join(adopt.adopted(there / "conf" / "config.yaml").notes)
    assert "scorer_method 'chad' is not here: put another" in notes
    assert "keeps model A's VAE" in notes
    assert "left out" not in notes
    more = "rebasin: True\nbounds_transformer: True\nprune: False\nshiny: 3\nbest_format: ckpt\n"
    path = there / "conf" / "config.yaml"
    path.write_text(SETTINGS.replace("wildcards_dir: w", "wildcards_dir: x/w") + more)
    notes = "\n".join(adopt.adopted(path).notes)
    assert "rebasin is left out" in notes
    assert "bounds_transformer is left out" in notes
    assert "shiny is left out: not known" in notes
    assert "best_format is left out" in notes
    assert "wildcards_dir is left out" in notes
    assert "prune" not in notes


def test_older_settings_are_read_too(there: Path) -> None:
    (there / "config.ini").write_text(INI)
    (there / "payloads").mkdir()
    (there / "payloads" / "payload.tmpl.yaml").write_text('prompt: "of the template"\n')
    (there / "payloads" / "cat.yaml").write_text(
        'prompt: "a cat"\nneg_prompt: "dog"\ncfg: 9\nsampler: "Euler a"\n'
    )
    found = read(there, "config.ini")
    assert (found.search.images, found.search.optimiser) == (5, "tpe")
    assert (found.merge.precision, found.output.save_best) == ("fp32", True)
    assert found.output.save_imgs is False
    assert list(found.scorers) == ["exposure"]
    (cat,) = prompts.read_payloads(found.payload_files(there), found.panel.defaults)
    assert (cat.fields.negative_prompt, cat.fields.cfg_scale) == ("dog", 9.0)
    assert cat.fields.sampler_name == "Euler a"


def test_method_of_three_models_takes_the_third(there: Path) -> None:
    path = there / "conf" / "config.yaml"
    path.write_text(SETTINGS.replace("weighted_sum", "add_difference"))
    found = read(there, scorer="[scorers.exposure]\n")
    assert found.models.c == there / "models" / "none.safetensors"
    path.write_text(path.read_text().replace("model_c:", "model_d:"))
    with pytest.raises(ConfigError, match="model_c names no file"):
        adopt.adopted(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no table of settings"),
        ("- a", "no table of settings"),
        ("a: [", "not valid YAML"),
        (SETTINGS.replace("model_a:", "model_x:"), "model_a names no file"),
        (SETTINGS.replace("weighted_sum", "mix"), "unknown merge method 'mix'"),
        (SETTINGS.replace("n_iters: 15", "n_iters: many"), "n_iters is 'many', no count"),
        (SETTINGS.replace("batch_size: 2", "batch_size: -1"), "batch_size is -1, no count"),
        (SETTINGS.replace("payloads: cargo", "payloads: ship"), "ship.yaml: no such file"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(there: Path, text: str, said: str) -> None:
    path = there / "conf" / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        adopt.adopted(path)


def test_payload_that_is_missing_is_said(there: Path) -> None:
    (there / "conf" / "payloads" / "cargo" / "lake.yaml").unlink()
    with pytest.raises(ConfigError, match=r"cargo\.yaml: there is no .*lake\.yaml"):
        adopt.adopted(there / "conf" / "config.yaml")
    (there / "conf" / "payloads" / "cargo.yaml").write_text("steps: 20\n")
    with pytest.raises(ConfigError, match="no payload is named"):
        adopt.adopted(there / "conf" / "config.yaml")


@pytest.mark.parametrize("text", ["", "[other]\n", "[options\n", "[options]\nmodel_a = x\n"])
def test_ini_that_is_none_is_refused(there: Path, text: str) -> None:
    (there / "config.ini").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.ini: "):
        adopt.adopted(there / "config.ini")


def test_texts_survive_as_toml(there: Path) -> None:
    cargo = there / "conf" / "payloads" / "cargo.yaml"
    nasty = 'a "quoted" \\ back\tslash \x7f é\n'
    cargo.write_text(CARGO.replace('"blurry"', repr("x")) + "\n")
    text = cargo.read_text().replace("'x'", '"' + nasty.encode("unicode_escape").decode() + '"')
    cargo.write_text(text.replace('a "quoted"', 'a \\"quoted\\"'))
    found = read(there, scorer="[scorers.exposure]\n")
    assert found.panel.defaults["neg_prompt"] == nasty


def test_command_writes_the_configuration_once(
    there: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    target = there / "new.toml"
    code, out, _ = command("import", there / "conf" / "config.yaml", target)
    assert code == 0
    assert f"wrote {target}" in out
    assert f"next: bayesian-merger check {target}" in out
    before = target.read_bytes()
    code, _, err = command("import", there / "conf" / "config.yaml", target)
    assert (code, target.read_bytes()) == (2, before)
    assert "exists already and is left as it is" in err
    code, _, err = command(
        "import", there / "conf" / "config.yaml", there / "x.toml", "--images", 9
    )
    assert code == 2
    assert "settings take no options" in err
    code, _, err = command("import", there / "conf" / "config.yaml", there / "none" / "x.toml")
    assert code == 2
    assert "cannot be written" in err
