"""The settings of sd-webui-bayesian-merger as a configuration of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import toy_plugin
from test_cli import command as command

from bayesian_merger import adopt, config, prompts
from bayesian_merger.errors import ConfigError
from bayesian_merger.scorers import scorer

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
scorer_method: exotic
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
    assert (found.output.save_best, found.output.save_images) == (True, "all")


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
    assert "'exotic' is not here: put a scorer where the configuration says" in notes
    assert "keeps model A's VAE" in notes
    assert "left out" not in notes
    more = """
rebasin: True
bounds_transformer: True
prune: False
shiny: 3
best_format: ckpt
draw_unet_weights: "0.1,0.2"
weights_clip: True
"""
    path = there / "conf" / "config.yaml"
    path.write_text(SETTINGS.replace("wildcards_dir: w", "wildcards_dir: x/w") + more)
    notes = "\n".join(adopt.adopted(path).notes)
    assert "rebasin is left out" in notes
    assert "bounds_transformer is left out" in notes
    assert "shiny is left out: not known" in notes
    assert "best_format is left out" in notes
    assert "wildcards_dir is left out" in notes
    assert "draw_unet_weights is left out" in notes
    assert "weights_clip is left out: it had no effect" in notes
    assert "prune" not in notes
    assert read(there, scorer="[scorers.exposure]\n").merge.clip is False


@pytest.mark.parametrize(
    ("optimiser", "here", "said"),
    [("atpe", "tpe", "optimiser atpe is tpe here"), ("ga", "auto", "optimiser ga is not here")],
)
def test_optimiser_that_is_another_here_is_told(
    there: Path, optimiser: str, here: str, said: str
) -> None:
    path = there / "conf" / "config.yaml"
    path.write_text(SETTINGS.replace("optimiser: bayes", f"optimiser: {optimiser}"))
    assert read(there, scorer="[scorers.exposure]\n").search.optimiser == here
    assert said in "\n".join(adopt.adopted(path).notes)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("exotic", "'exotic' is not here"),
        ("[exotic, odd]", "'exotic', 'odd' are not here"),
        ('"x\\n[models]"', "'x\\n[models]' is not here"),
        ("", "scorer_method names none"),
    ],
)
def test_place_of_a_scorer_that_is_missing_is_kept(there: Path, method: str, said: str) -> None:
    path = there / "conf" / "config.yaml"
    path.write_text(SETTINGS.replace("scorer_method: exotic", f"scorer_method: {method}"))
    text, notes = adopt.adopted(path)
    assert f"# A scorer belongs here ({said})." in text
    assert f"{said}: put a scorer where" in notes[-1]
    for told in (text, notes[-1]):
        assert ", ".join(scorer.names()) in told
    (there / "new.toml").write_text(text.replace("# [scorers.NAME]", "[scorers.exposure]"))
    assert list(config.load(there / "new.toml").scorers) == ["exposure"]


def test_scorers_that_are_here_are_taken(there: Path) -> None:
    path = there / "conf" / "config.yaml"
    path.write_text(SETTINGS.replace("method: exotic", "method: [exposure, contrast, exposure]"))
    assert list(read(there).scorers) == ["exposure", "contrast"]
    assert "scorer" not in "\n".join(adopt.adopted(path).notes)


@pytest.mark.parametrize(
    ("file", "here"),
    [
        ("sac+logos+ava1-l14-linearMSE.pth", "chad"),
        ("ava+logos-l14-linearMSE.pth", "ava_logos"),
        ("ava+logos-l14-reluMSE.pth", "ava_logos_relu"),
        ("", "chad"),
    ],
)
def test_chad_is_the_scorer_of_its_file(there: Path, file: str, here: str) -> None:
    path = there / "conf" / "config.yaml"
    path.write_text(
        SETTINGS.replace("method: exotic", f"method: chad\nscorer_model_name: '{file}'")
    )
    assert list(read(there).scorers) == [here]
    told = "in the last versions it was ava+logos" in "\n".join(adopt.adopted(path).notes)
    assert told == (not file)


def test_search_makes_as_many_images_as_payloads_asked_for(there: Path) -> None:
    payloads = there / "conf" / "payloads"
    (payloads / "cargo.yaml").write_text(CARGO.replace("n_iter: 1", "n_iter: 3"))
    (payloads / "cargo" / "lake.yaml").write_text("lake:\n  prompt: x\n  batch_size: 4\n")
    # 25 points, each 2 times 3 images of one payload and 3 of 4 of the other
    found = read(there, scorer="[scorers.exposure]\n")
    assert found.search.images == 25 * 2 * (3 + 3 * 4)
    assert "mistakes" not in "\n".join(adopt.adopted(there / "conf" / "config.yaml").notes)
    (payloads / "cargo" / "lake.yaml").write_text("lake:\n  prompt: x\n  steps: 0\n")
    assert read(there, scorer="[scorers.exposure]\n").search.images == 25 * 2 * 2
    assert "there are mistakes in them" in adopt.adopted(there / "conf" / "config.yaml").notes[-1]


def test_text_says_what_comes_on_top_of_the_search(there: Path) -> None:
    first, second, *_ = adopt.adopted(there / "conf" / "config.yaml").text.splitlines()
    assert first.startswith(
        "# From 'config.yaml' of sd-webui-bayesian-merger. The search makes as"
    )
    assert second.endswith("of the proof at the end, come on top.")


def test_files_may_be_named_with_their_suffix(there: Path) -> None:
    before = read(there, scorer="[scorers.exposure]\n")
    cargo = there / "conf" / "payloads" / "cargo.yaml"
    cargo.write_text(CARGO.replace("- lake", "- lake.yaml"))
    named = SETTINGS.replace("payloads: cargo", "payloads: cargo.yaml")
    (there / "conf" / "config.yaml").write_text(named.replace("guide: guide", "guide: guide.yaml"))
    assert read(there, scorer="[scorers.exposure]\n") == before


def test_folder_whose_name_is_a_pattern_is_found(there: Path) -> None:
    moved = there / "old [2023]"
    (there / "conf").rename(moved)
    found = read(there, "old [2023]/config.yaml", scorer="[scorers.exposure]\n")
    files = found.payload_files(there)
    assert files == [moved / "payloads" / "cargo" / f"{n}.yaml" for n in ("portrait", "lake")]


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
    assert found.output.save_images == "best"
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
    with pytest.raises(ConfigError, match="`defaults` names no payloads, as"):
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


def test_dates_are_texts_and_keys_may_be_anything(there: Path) -> None:
    fields = """
since: 2023-04-18
my key: [2023-04-18 12:00:00, 3]
a.b: {"c d": {e"f: null, 1: true}}
"": x
none:
"""
    (there / "conf" / "payloads" / "cargo.yaml").write_text(CARGO + fields)
    found = read(there, scorer="[scorers.exposure]\n").panel.defaults
    assert found["since"] == "2023-04-18"
    assert found["my key"] == ["2023-04-18 12:00:00", 3]
    assert found["a.b"] == {"c d": {'e"f': "", "1": True}}
    assert found[""] == "x"
    assert "none" not in found


@pytest.mark.parametrize(
    "value",
    ["!!timestamp 2023-04-18", "!!binary aGk=", "!!set {a}", ".inf"],
)
@pytest.mark.parametrize("file", ["payloads/cargo.yaml", "config.yaml"])
def test_value_that_is_none_of_json_is_refused_with_its_place(
    there: Path, file: str, value: str
) -> None:
    path = there / "conf" / file
    path.write_text(path.read_text() + f"\nodd: {value}\n")
    with pytest.raises(ConfigError) as caught:
        adopt.adopted(there / "conf" / "config.yaml")
    assert str(caught.value).startswith(f"{path}: odd is ")
    assert str(caught.value).count("\n") == 0


def test_command_writes_the_configuration_once(
    there: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    target = there / "new.toml"
    code, out, _ = command("import", there / "conf" / "config.yaml", target)
    assert code == 0
    assert f"wrote {target}" in out
    assert f"next: look it over, then bayesian-merger check {target}" in out
    before = target.read_bytes()
    code, _, err = command("import", there / "conf" / "config.yaml", target)
    assert (code, target.read_bytes()) == (2, before)
    assert "exists already and is left as it is" in err
    code, _, err = command(
        "import", there / "conf" / "config.yaml", there / "x.toml", "--images", 9
    )
    assert code == 2
    assert "settings take no options" in err
    code, _, err = command("import", there / "conf" / "config.yaml", target / "x.toml")
    assert (code, target.read_bytes()) == (2, before)
    assert "cannot be written" in err


def test_command_makes_the_folder_of_the_configuration(
    there: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    target = there / "my" / "merges" / "x.toml"
    assert command("import", there / "conf" / "config.yaml", target)[0] == 0
    assert target.is_file()
    assert command("import", there / "conf" / "no.yaml", there / "other" / "x.toml")[0] == 2
    assert not (there / "other").exists()


def test_command_takes_a_folder_for_the_settings_in_it(
    there: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    for number, folder in enumerate((there / "conf", there)):
        target = there / f"{number}.toml"
        assert command("import", folder, target)[0] == 0
        assert "From 'config.yaml'" in target.read_text()
    (there / "conf" / "config.yaml").unlink()
    code, _, err = command("import", there, there / "x.toml")
    assert code == 2
    assert f"{there}: a folder without config.yaml, conf/config.yaml, config.ini;" in err
    (there / "config.ini").write_text(INI)
    (there / "payloads").mkdir()
    (there / "payloads" / "cat.yaml").write_text('prompt: "a cat"\n')
    assert command("import", there, there / "x.toml")[0] == 0


def test_command_refuses_what_is_neither_settings_nor_a_log(
    there: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    (there / "other.toml").write_text("[models]\n")
    for name, said in {
        "other.toml": "neither settings (.yaml, .yml, .ini) nor a log (.json) of sd-webui-",
        "conff": "no such file",
        "conf/payloads/cargo.yaml": "model_a names no file; are these the settings of sd-webui-",
    }.items():
        code, _, err = command("import", there / name, there / "x.toml")
        assert (code, err.count("\n")) == (2, 1)
        assert f"{there / name}: {said}" in err
    assert not (there / "x.toml").exists()


def test_line_that_is_no_setting_is_told_in_short(tmp_path: Path) -> None:
    (tmp_path / "config.ini").write_text(f"{'x' * 5000}\n")
    with pytest.raises(ConfigError, match="no section headers") as caught:
        adopt.adopted(tmp_path / "config.ini")
    assert len(str(caught.value)) < len(str(tmp_path)) + 350
