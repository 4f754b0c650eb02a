from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError

import bayesian_merger
from bayesian_merger.config import Config, as_plain, load
from bayesian_merger.errors import ConfigError
from bayesian_merger.prompts import draw_panel, read_payloads, read_wildcards
from bayesian_merger.scorers import scorer

SMALLEST = """
[models]
a = "a.safetensors"
b = "b.safetensors"
[panel]
payloads = ["*.toml"]
[scorers.exposure]
"""


def config(tmp_path: Path, text: str = SMALLEST, overrides: Sequence[str] = ()) -> Config:
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    return load(tmp_path / "config.toml", overrides)


def mistakes(tmp_path: Path, text: str = SMALLEST, overrides: Sequence[str] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, text, overrides)
    return str(caught.value).splitlines()


def changed(old: str, new: str) -> str:
    assert old in SMALLEST
    return SMALLEST.replace(old, new)


# Reading


def test_models_payloads_and_a_scorer_are_enough(tmp_path: Path) -> None:
    found = config(tmp_path)
    assert (found.merge.method, found.merge.vae, found.merge.precision) == (
        "weighted_sum",
        "a",
        "fp16",
    )
    search = found.search
    assert (search.images, search.init_points, search.n_iters, search.seed) == (
        None,
        None,
        None,
        0,
    )
    assert found.models.c is None
    assert found.scorers["exposure"].weight == 1.0
    assert found.plugins == []


def test_file_that_init_writes_is_valid_with_its_payloads_and_wildcards() -> None:
    folder = Path(bayesian_merger.__file__).parent / "templates" / "init"
    found = load(folder / "config.toml")
    payloads = read_payloads(found.payload_files(folder), found.panel.defaults)
    wildcards = read_wildcards(found.panel.wildcards_dir)
    assert draw_panel(payloads, wildcards, rounds=found.panel.batch_size, seed="0")
    for name, chosen in found.scorers.items():
        scorer.check(name, chosen.options)


def test_nothing_writes_to_the_configuration_after_loading(tmp_path: Path) -> None:
    found = config(tmp_path)
    for section, key in ((found, "plugins"), (found.search, "seed"), (found.backend, "name")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


def test_one_configuration_leaves_nothing_in_the_next(tmp_path: Path) -> None:
    config(tmp_path).search.freeze["base"] = 0.5
    assert config(tmp_path).search.freeze == {}


def test_other_keys_of_the_back_end_and_of_a_scorer_are_their_options(tmp_path: Path) -> None:
    found = config(
        tmp_path, SMALLEST + 'weight = 2\ntarget = 0.4\n[backend]\nname = "toy"\nbatch = 3\n'
    )
    assert (found.backend.name, found.backend.options) == ("toy", {"batch": 3})
    assert (found.scorers["exposure"].weight, found.scorers["exposure"].options) == (
        2.0,
        {"target": 0.4},
    )


def test_configuration_is_plain_data_for_the_record(tmp_path: Path) -> None:
    plain = as_plain(config(tmp_path, SMALLEST + "target = 0.4\n"))
    again = json.loads(json.dumps(plain))
    assert again == plain
    own = {"scorer": None, "weight": 1.0, "payloads": None, "target": 0.4}
    assert again["scorers"]["exposure"] == own
    assert again["models"]["a"] == str(tmp_path / "a.safetensors")


# Paths


def test_paths_are_relative_to_the_file_and_not_to_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "config.toml").write_text('plugins = ["mine.py"]\n' + SMALLEST)
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = load(Path("../config.toml"), ["panel.wildcards_dir=wild", "models.c=/data/c.ckpt"])
    assert found.models.a.resolve() == tmp_path / "a.safetensors"
    assert found.plugins[0].resolve() == tmp_path / "mine.py"
    assert found.panel.wildcards_dir is not None
    assert found.panel.wildcards_dir.resolve() == tmp_path / "wild"
    assert found.models.c == Path("/data/c.ckpt")


def test_tilde_is_the_user_s_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    found = config(tmp_path, changed("a.safetensors", "~/a.safetensors"))
    assert found.models.a == tmp_path / "home" / "a.safetensors"


def test_home_of_an_unknown_user_is_a_mistake(tmp_path: Path) -> None:
    (only,) = mistakes(tmp_path, changed("a.safetensors", "~nobody-of-this-name/a.safetensors"))
    assert only.startswith("config.toml: models.a: ")
    with pytest.raises(ConfigError, match=r"panel\.payloads: '~nobody"):
        config(tmp_path, changed("*.toml", "~nobody-of-this-name/*.toml")).payload_files(tmp_path)


@pytest.mark.parametrize("path", ["C:\\models\\a", "C:\\Users\\me\\a", "D:\\x", "C:\\u"])
def test_windows_path_with_backslashes_is_answered_with_how_to_write_it(
    tmp_path: Path, path: str
) -> None:
    (only,) = mistakes(tmp_path, changed('"a.safetensors"', f'"{path}.safetensors"'))
    assert "line 3" in only
    assert "write Windows paths with / or in 'single quotes'" in only
    assert config(tmp_path, changed('"a.safetensors"', f"'{path}.safetensors'")).models.a


@pytest.mark.parametrize(
    ("link", "to", "pattern"),
    [
        ("lake.toml", "../home/id_rsa", "*.toml"),
        ("lake.toml", "{}/home/id_rsa", "lake.toml"),
        ("more", "../home", "*/*.toml"),
        ("more", "{}/home", "more/lake.toml"),
    ],
)
def test_link_beside_the_configuration_leads_to_no_prompts_elsewhere(
    tmp_path: Path, link: str, to: str, pattern: str
) -> None:
    home, pack = tmp_path / "home", tmp_path / "pack"
    home.mkdir()
    pack.mkdir()
    for name in ("id_rsa", "lake.toml", "hair.txt"):
        (home / name).write_text("secret")
    (pack / link).symlink_to(to.format(tmp_path))
    found = config(pack, changed("*.toml", pattern))
    with pytest.raises(ConfigError, match=r"panel\.payloads: .* leads out of the configuration's"):
        found.payload_files(pack)
    if link == "more":
        with pytest.raises(ConfigError, match=r"wildcards_dir: .*more is a link that leads out"):
            load(pack / "config.toml", ["panel.wildcards_dir=more"])


def test_payloads_and_wildcards_may_lie_elsewhere_and_be_links_beside(tmp_path: Path) -> None:
    home, pack = tmp_path / "home", tmp_path / "pack"
    home.mkdir()
    (pack / "own").mkdir(parents=True)
    (home / "lake.toml").touch()
    (home / "sea.toml").symlink_to("lake.toml")
    (pack / "own" / "hill.toml").touch()
    (pack / "near").symlink_to("own")
    (tmp_path / "linked").symlink_to("pack")
    for folder in (pack, tmp_path / "linked"):
        config(pack, changed("*.toml", "near/*.toml"))
        for given in ("../home", str(home), "near", "own"):
            found = load(folder / "config.toml", [f"panel.wildcards_dir={given}"])
            assert found.panel.wildcards_dir == folder / given
            found = load(folder / "config.toml", [f"panel.payloads=['{given}/*.toml']"])
            assert found.payload_files(folder)


def test_payload_files_are_found_by_pattern_in_order_and_once(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yaml", "sub/c.txt", "sub/d.txt", "sub/e.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "folder.yaml").mkdir()
    absolute = (tmp_path / "sub" / "[c-d].txt").as_posix()
    patterns = f'["b.yaml", "*.yaml", "sub/*.txt", "**/*.md", "./b.yaml", "{absolute}"]'
    found = config(tmp_path, changed('["*.toml"]', patterns)).payload_files(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in found] == [
        "b.yaml",
        "a.yaml",
        "sub/c.txt",
        "sub/d.txt",
        "sub/e.md",
    ]


@pytest.mark.parametrize(
    "pattern", ["no.toml", "no/*.toml", "/no/*.toml", "", ".", "**x", "/", ".."]
)
def test_payload_pattern_without_a_file_is_a_mistake(tmp_path: Path, pattern: str) -> None:
    found = config(tmp_path, changed("*.toml", pattern))
    with pytest.raises(ConfigError, match=r"^panel\.payloads: ") as caught:
        found.payload_files(tmp_path / "nothing here")
    assert repr(pattern) in str(caught.value)
    assert "\n" not in str(caught.value)


# Overrides


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("search.n_iters=20", "search.n_iters", 20),
        ("search.n_iters = 20", "search.n_iters", 20),
        ("merge.method=add_difference", "merge.method", "add_difference"),
        ("merge.method='add_difference'", "merge.method", "add_difference"),
        ("output.save_best=true", "output.save_best", True),
        ("search.freeze={base = 0.5}", "search.freeze", {"base": 0.5}),
        ("search.freeze.base=0.5", "search.freeze", {"base": 0.5}),
        ("search.ranges.OUT*=[0.2, 0.4]", "search.ranges", {"OUT*": (0.2, 0.4)}),
        ('search.groups=[["IN00", "IN01"]]', "search.groups", [["IN00", "IN01"]]),
        ("backend.name=web=ui", "backend.name", "web=ui"),
        ("backend.name=some words", "backend.name", "some words"),
        ("backend.name=", "backend.name", ""),
        ("models.b=C:\\Users\\me\\b.ckpt", "models.b", "C:\\Users\\me\\b.ckpt"),
        ("panel.payloads=['a.txt']", "panel.payloads", ["a.txt"]),
    ],
)
def test_override_is_a_toml_value_or_else_plain_text(
    tmp_path: Path, override: str, place: str, value: object
) -> None:
    section, key = place.split(".")
    found = getattr(getattr(config(tmp_path, overrides=[override]), section), key)
    assert found == (tmp_path / str(value) if section == "models" else value)


def test_last_override_counts_and_an_option_may_be_new(tmp_path: Path) -> None:
    found = config(tmp_path, overrides=["search.seed=1", "search.seed=2", "backend.batch=5"])
    assert found.search.seed == 2
    assert found.backend.options == {"batch": 5}


@pytest.mark.parametrize("override", ["search.n_iters", "=3", "search..seed=3", ".=3", ""])
def test_override_without_key_or_value_is_a_mistake(tmp_path: Path, override: str) -> None:
    assert mistakes(tmp_path, overrides=[override]) == [
        f"--set {override.replace('3', '...')}: write it as section.key=value"
    ]


@pytest.mark.parametrize("key", ["search.storage", "search.storage.url", "search..storage"])
def test_storage_that_is_none_is_told_without_its_password(tmp_path: Path, key: str) -> None:
    held = "search.storage='x'"
    (line,) = mistakes(tmp_path, overrides=[held, f"{key}=['postgresql://me:hunter2@host/db']"])
    assert "search." in line
    assert "hunter2" not in line


def test_override_below_a_value_is_a_mistake(tmp_path: Path) -> None:
    (only,) = mistakes(tmp_path, overrides=["models.a.x=1"])
    assert only == "--set models.a.x=...: 'a' is a value, not a section"


def test_override_is_checked_like_the_file(tmp_path: Path) -> None:
    (only,) = mistakes(tmp_path, overrides=["search.n_iterz=20"])
    assert only == "config.toml: unknown key 'search.n_iterz'; did you mean 'n_iters'?"
    (only,) = mistakes(tmp_path, overrides=["search.seed=soon"])
    assert only.startswith("config.toml: search.seed: ")
    assert "(found 'soon')" in only


# Mistakes


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        (SMALLEST + "[serach]\nn_iters = 3\n", "serach", "search"),
        (SMALLEST + "[search]\ninit_point = 3\n", "search.init_point", "init_points"),
        (SMALLEST + "[output]\nsave_image = true\n", "output.save_image", "save_images"),
        (changed("[panel]", "[panel]\nbatchsize = 2"), "panel.batchsize", "batch_size"),
        (SMALLEST + "[heldout]\nimage = 3\n", "heldout.image", "images"),
    ],
)
def test_unknown_key_is_a_mistake_with_the_nearest_known(
    tmp_path: Path, text: str, key: str, meant: str
) -> None:
    found = mistakes(tmp_path, text)
    assert found == [f"config.toml: unknown key {key!r}; did you mean {meant!r}?"]


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("[merge]\nvae = 'c'", "merge.vae"),
        ("[merge]\nprecision = 16", "merge.precision"),
        ("[search]\ninit = 'grid'", "search.init"),
        ("[search]\nimages = 0", "search.images"),
        ("[search]\nimages_per_trial = 0", "search.images_per_trial"),
        ("[search]\nn_iters = -1", "search.n_iters"),
        ("[search]\nseed = 2.5", "search.seed"),
        ("[search]\nseed = -1", "search.seed"),
        ("[search]\nfreeze = ['base']", "search.freeze"),
        ("[search]\nfreeze = {base = 'x'}", "search.freeze.base"),
        ("[search]\nranges = {base = [0.0]}", "search.ranges.base"),
        ("[heldout]\nimages = 1", "heldout.images"),
        ("[backend]\nname = 3", "backend.name"),
        ("[output]\nsave_best = 'perhaps'", "output.save_best"),
    ],
)
def test_value_of_the_wrong_kind_is_a_mistake_with_its_place(
    tmp_path: Path, more: str, key: str
) -> None:
    for line in mistakes(tmp_path, SMALLEST + more):
        assert line.startswith(f"config.toml: {key}")
        assert "(found " in line or "is missing" in line


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "'much'"])
def test_scorer_s_weight_is_a_positive_number(tmp_path: Path, weight: str) -> None:
    (only,) = mistakes(tmp_path, SMALLEST + f"weight = {weight}\n")
    assert only.startswith("config.toml: scorers.exposure.weight: ")


def test_what_must_be_given_is_named(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "") == [
        "config.toml: models is missing",
        "config.toml: panel is missing",
        "config.toml: scorers is missing",
    ]
    assert mistakes(tmp_path, changed('b = "b.safetensors"\n', "")) == [
        "config.toml: models.b is missing"
    ]
    (only,) = mistakes(tmp_path, changed("[scorers.exposure]", "[scorers]"))
    assert only.startswith("config.toml: scorers: ")
    (only,) = mistakes(tmp_path, changed('["*.toml"]', "[]"))
    assert only.startswith("config.toml: panel.payloads: ")


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = (
        SMALLEST + "wieght = 2\n[search]\nseed = 'x'\nn_iter = 3\n[merge]\nvae = 'q'\n[outputs]\n"
    )
    found = mistakes(tmp_path, text, ["heldout.images=0"])
    places = ["merge.vae", "search.seed", "search.n_iter", "heldout.images", "outputs"]
    assert len(found) == len(places)
    assert all(any(place in line for line in found) for place in places)


def test_long_value_is_shown_in_short(tmp_path: Path) -> None:
    (only,) = mistakes(tmp_path, SMALLEST + f"[search]\nseed = '{'x' * 500}'\n")
    assert len(only) < 250
    (only,) = mistakes(tmp_path, SMALLEST + f"[search]\nseed = 0x{'f' * 9000}\n")
    assert only.endswith("(found a number too long to tell)")


def test_file_that_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'title = "\xff"')
    (tmp_path / "text.toml").write_text("this is\nno TOML\n")
    for path, saying in (
        (tmp_path / "no.toml", "no such file; write one with `bayesian-merger init"),
        (tmp_path, "a folder; name the configuration file in it"),
        (tmp_path / "latin.toml", "cannot be read"),
        (tmp_path / "text.toml", r"not valid TOML: .*line 1"),
    ):
        with pytest.raises(ConfigError, match=saying) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_file_of_windows_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert config(tmp_path, "\ufeff" + SMALLEST.replace("\n", "\r\n")).models.a
