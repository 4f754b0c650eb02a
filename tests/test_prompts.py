from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bayesian_merger.data import Prompt
from bayesian_merger.errors import ConfigError
from bayesian_merger.prompts import Payload, draw_panel, n_images, read_payloads, read_wildcards


def read(
    tmp_path: Path, defaults: Mapping[str, Any] | None = None, /, **files: str
) -> tuple[Payload, ...]:
    """Payloads written as name__suffix="content"."""
    paths = []
    for name, content in files.items():
        stem, suffix = name.split("__")
        paths.append(tmp_path / f"{stem}.{suffix}")
        paths[-1].write_text(content, encoding="utf-8")
    return read_payloads(paths, defaults or {})


def drawn(payloads: tuple[Payload, ...], **options: Any) -> tuple[Prompt, ...]:
    return draw_panel(payloads, **{"wildcards": {}, "rounds": 1, "seed": "0", **options})


def mistakes(
    tmp_path: Path, defaults: Mapping[str, Any] | None = None, /, **files: str
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, defaults, **files)
    return str(caught.value).splitlines()


def keys(panel: tuple[Prompt, ...]) -> list[tuple[str, int, str, str]]:
    return [(p.payload, p.seed, p.prompt, p.negative_prompt) for p in panel]


# Payload files


def test_toml_payload_has_its_fields_and_the_usual_for_the_rest(tmp_path: Path) -> None:
    payloads = read(tmp_path, lake__toml='prompt = "a lake"\nsteps = 30\nseed = 7\n')
    assert drawn(payloads) == (Prompt(0, "lake", "a lake", seed=7, steps=30),)


def test_payload_of_the_original_is_one_name_with_the_fields_below_it(tmp_path: Path) -> None:
    text = """
    portrait:
      prompt: "a portrait, __hair__"
      negative_prompt: "blurry"
      steps: 25
      cfg: 6.5
      width: 640
      sampler_index: "DPM++ 2M"
      score_weight: 0.5
    """
    (payload,) = read(tmp_path, anything__yaml=text)
    (prompt,) = drawn((payload,), wildcards={"hair": ["red hair"]})
    assert prompt == Prompt(
        0,
        "portrait",
        "a portrait, red hair",
        seed=prompt.seed,
        negative_prompt="blurry",
        steps=25,
        cfg_scale=6.5,
        width=640,
        sampler_name="DPM++ 2M",
        weight=0.5,
    )


@pytest.mark.parametrize("suffix", ["yaml", "yml", "YAML"])
def test_yaml_payload_may_have_its_fields_at_the_top(tmp_path: Path, suffix: str) -> None:
    (payload,) = read(tmp_path, None, **{f"lake__{suffix}": "prompt: a lake\nsteps: 5\n"})
    assert (payload.name, payload.fields.steps) == ("lake", 5)


def test_text_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    payloads = read(tmp_path, many__txt="a lake\n\n  a valley  \r\na peak")
    assert [(p.name, p.fields.prompt) for p in payloads] == [
        ("many-1", "a lake"),
        ("many-2", "a valley"),
        ("many-3", "a peak"),
    ]


def test_payload_s_own_fields_go_before_the_defaults(tmp_path: Path) -> None:
    (payload,) = read(tmp_path, {"steps": 10, "width": 256}, a__toml='prompt = "x"\nsteps = 30\n')
    assert (payload.fields.steps, payload.fields.width) == (30, 256)


def test_defaults_may_give_the_prompt(tmp_path: Path) -> None:
    (payload,) = read(tmp_path, {"prompt": "a lake"}, a__toml="steps = 3\n")
    assert payload.fields.prompt == "a lake"


@pytest.mark.parametrize(
    ("defaults", "fields", "cfg_scale", "sampler_name"),
    [
        ({}, "cfg = 5.0\nsampler_index = 'DDIM'", 5.0, "DDIM"),
        ({"cfg": 5.0, "sampler_index": "DDIM"}, "", 5.0, "DDIM"),
        (
            {"cfg_scale": 4.0, "sampler_name": "Heun"},
            "cfg = 5.0\nsampler_index = 'DDIM'",
            5.0,
            "DDIM",
        ),
        (
            {"cfg": 4.0, "sampler_index": "Heun"},
            "cfg_scale = 5.0\nsampler_name = 'DDIM'",
            5.0,
            "DDIM",
        ),
        (
            {},
            "cfg = 4.0\ncfg_scale = 5.0\nsampler_name = 'DDIM'\nsampler_index = 'x'",
            5.0,
            "DDIM",
        ),
    ],
)
def test_old_names_of_fields_mean_the_present_ones(
    tmp_path: Path, defaults: Mapping[str, Any], fields: str, cfg_scale: float, sampler_name: str
) -> None:
    (payload,) = read(tmp_path, defaults, a__toml=f'prompt = "x"\n{fields}\n')
    assert payload.fields.cfg_scale == cfg_scale
    assert payload.fields.sampler_name == sampler_name
    assert not payload.fields.model_extra


def test_fields_that_we_do_not_know_go_on_to_the_back_end(tmp_path: Path) -> None:
    text = 'prompt = "x"\nenable_hr = true\n[override_settings]\nCLIP_stop_at_last_layers = 2\n'
    (prompt,) = drawn(read(tmp_path, a__toml=text))
    assert prompt.extra == {
        "enable_hr": True,
        "override_settings": {"CLIP_stop_at_last_layers": 2},
    }


def test_file_of_windows_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert read(tmp_path, a__toml='\ufeffprompt = "x"\r\n')[0].fields.prompt == "x"
    assert read(tmp_path, b__txt="\ufeffx\r\n")[0].fields.prompt == "x"


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("steps = 0", "steps"),
        ("steps = 'many'", "steps"),
        ("width = 500", "width"),
        ("width = 500", "multiple of 8"),
        ("height = -8", "height"),
        ("height = 512.5", "height"),
        ("cfg_scale = nan", "cfg_scale"),
        ("cfg = -1.0", "cfg_scale"),
        ("score_weight = -0.5", "score_weight"),
        ("score_weight = inf", "score_weight"),
        ("batch_size = 0", "batch_size"),
        ("n_iter = 0", "n_iter"),
        ("seed = 1.5", "seed"),
        ("seed = 99999999999999999999", "seed"),
        ("negative_prompt = 3", "negative_prompt"),
    ],
)
def test_field_out_of_range_is_a_mistake_of_its_file(
    tmp_path: Path, field: str, named: str
) -> None:
    (only,) = mistakes(tmp_path, a__toml=f'prompt = "x"\n{field}\n')
    assert only.startswith(f"payload {tmp_path / 'a.toml'}: ")
    assert named in only


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a__toml", ""),
        ("a__toml", "steps = 3"),
        ("a__toml", 'prompt = ""'),
        ("a__toml", "prompt = 3"),
        ("a__toml", "prompt = "),
        ("a__toml", "prompt: x"),
        ("a__yaml", ""),
        ("a__yaml", "- prompt: x"),
        ("a__yaml", "just text"),
        ("a__yaml", "prompt: [x"),
        ("a__yaml", "prompt:\n"),
        ("a__yaml", "a: {prompt: x, seed: 2020-13-45}"),
        ("a__yaml", "a: {prompt: x, 1: 2}"),
        ("a__yaml", "prompt: !!python/object/apply:os.getcwd []"),
        ("a__txt", "\n  \n"),
        ("a__json", '{"prompt": "x"}'),
    ],
)
def test_malformed_payload_is_a_mistake_of_one_line_with_its_file(
    tmp_path: Path, name: str, content: str
) -> None:
    (only,) = mistakes(tmp_path, None, **{name: content})
    assert str(tmp_path / name.replace("__", ".")) in only


def test_payload_that_is_no_text_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b'prompt = "\xff"')
    for path in (tmp_path / "a.toml", tmp_path / "no.toml", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read|not a \.toml") as caught:
            read_payloads([path], {})
        assert str(path) in str(caught.value)


def test_all_mistakes_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    found = mistakes(
        tmp_path,
        a__toml='prompt = "x"\nsteps = 0\nwidth = 3\n',
        b__yaml="",
        c__toml='prompt = "fine"',
        d__txt="",
    )
    assert [line.split("payload ")[1].split(":")[0][-6:] for line in found] == [
        "a.toml",
        "a.toml",
        "b.yaml",
        "/d.txt",
    ]


def test_mistake_in_the_defaults_is_told_once_with_its_place(tmp_path: Path) -> None:
    defaults = {"steps": 0, "width": 500, "cfg_sacle": 3, "date": {1, 2}}
    found = mistakes(
        tmp_path,
        defaults,
        a__toml='prompt = "x"\nwidth = 512\n',
        b__txt="x\ny",
        c__yaml="prompt: x\nsteps: -1\nsampler_nam: y",
    )
    assert found == [
        "panel.defaults: steps: Input should be greater than or equal to 1 (found 0)",
        "panel.defaults: unknown field 'cfg_sacle'; did you mean 'cfg_scale'?",
        "panel.defaults: field 'date' is {1, 2}, not JSON",
        "panel.defaults: width: Input should be a multiple of 8 (found 500)",
        f"payload {tmp_path / 'c.yaml'}: steps: Input should be greater than or equal to 1 (found -1)",
        f"payload {tmp_path / 'c.yaml'}: unknown field 'sampler_nam'; did you mean 'sampler_name'?",
    ]


def test_value_that_cannot_be_written_out_is_told_in_short(tmp_path: Path) -> None:
    huge = f"0x{'f' * 9000}"
    found = mistakes(
        tmp_path,
        a__toml=f'prompt = "x"\nwidth = {huge}\nnumber = {huge}\n',
        b__yaml=f"prompt: {{{', '.join(f'key {i}: {i}' for i in range(500))}}}",
        c__yaml='prompt: "half a pair, \\ud800"',
    )
    assert len(found) == 4
    assert all(len(line) < len(str(tmp_path)) + 200 for line in found)


def test_field_that_is_nested_without_end_is_a_mistake(tmp_path: Path) -> None:
    nested = ".".join("a" * 1200)
    with pytest.raises(ConfigError, match="nested too deeply"):
        read(tmp_path, deep__toml=f'prompt = "a lake"\n{nested} = 1')
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(ConfigError, match=r"panel\.defaults: field 'a' is .*, not JSON"):
        read(tmp_path, deep, lake__toml='prompt = "a lake"')


def test_two_payloads_of_one_name_are_a_mistake(tmp_path: Path) -> None:
    found = mistakes(tmp_path, lake__toml='prompt = "x"', lake__yaml="prompt: x")
    assert found == ["two payloads are called 'lake'; rename one"]


def test_payloads_that_all_weigh_nothing_are_a_mistake(tmp_path: Path) -> None:
    assert "score_weight 0" in mistakes(tmp_path, {"score_weight": 0}, a__toml='prompt = "x"')[0]
    assert read(tmp_path, {"score_weight": 0}, a__txt="x", b__toml="prompt='x'\nscore_weight=1")


# Wildcards


def test_wildcards_are_the_lines_of_text_files_in_all_folders(tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    (tmp_path / "hair.txt").write_text("\ufeffred hair\n\n# a comment\n blue hair \n", "utf-8")
    (tmp_path / "people" / "king.txt").write_text("a king")
    (tmp_path / "empty.txt").write_text("\n# only a comment\n")
    (tmp_path / "notes.md").write_text("no wildcard")
    assert read_wildcards(tmp_path) == {
        "hair": ("red hair", "blue hair"),
        "empty": (),
        "people/king": ("a king",),
    }
    assert read_wildcards(None) == {}


def test_wildcards_of_no_folder_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"panel\.wildcards_dir: .*is not a folder"):
        read_wildcards(tmp_path / "no")


def test_wildcards_are_drawn_in_both_prompts_and_within_wildcards(tmp_path: Path) -> None:
    payloads = read(
        tmp_path, a__toml='prompt = "__who__, __hair_colour__"\nnegative_prompt="__bad-1__"'
    )
    wildcards = {"who": ["a __people/king__"], "people/king": ["Lear"], "hair_colour": ["grey"]}
    (prompt,) = drawn(payloads, wildcards={**wildcards, "bad-1": ["ugly"]})
    assert prompt.prompt == "a Lear, grey"
    assert prompt.negative_prompt == "ugly"


def test_wildcard_draws_all_its_lines_in_the_long_run(tmp_path: Path) -> None:
    payloads = read(tmp_path, a__toml='prompt = "__n__"')
    panel = drawn(payloads, wildcards={"n": list("abc")}, rounds=60)
    counts = {letter: sum(p.prompt == letter for p in panel) for letter in "abc"}
    assert sum(counts.values()) == 60
    assert min(counts.values()) > 8


def test_wildcard_used_twice_in_a_prompt_is_drawn_twice(tmp_path: Path) -> None:
    payloads = read(tmp_path, a__toml='prompt = "__n__ __n__"')
    panel = drawn(payloads, wildcards={"n": list("abcdefgh")}, rounds=10)
    assert any(len(set(p.prompt.split())) == 2 for p in panel)


def test_misspelt_field_is_a_mistake_and_a_field_for_other_programs_is_not(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('prompt = "a lake"\ncfg_sacle = 3.0\n')
    with pytest.raises(ConfigError, match=r"x\.toml: .*'cfg_sacle'; did you mean 'cfg_scale'"):
        read_payloads([tmp_path / "x.toml"], {})
    (tmp_path / "x.toml").write_text('prompt = "a lake"\nsampler_index = "x"\nstyles = ["y"]\n')
    assert read_payloads([tmp_path / "x.toml"], {})


def test_wildcard_without_lines_is_a_mistake_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "hair.txt").write_text("# none yet\n")
    payloads = read(tmp_path, a__toml='prompt = "__hair__"')
    with pytest.raises(ConfigError, match=r"payload a: the file of wildcard __hair__ holds no"):
        draw_panel(payloads, read_wildcards(tmp_path), rounds=1, seed="0")


def test_unknown_wildcard_is_a_mistake_with_the_known_ones(tmp_path: Path) -> None:
    payloads = read(tmp_path, a__toml='prompt = "__hiar__"')
    with pytest.raises(ConfigError, match=r"payload a: unknown wildcard __hiar__ \(known: hair"):
        drawn(payloads, wildcards={"hair": ["red"]})
    with pytest.raises(ConfigError, match=r"set panel\.wildcards_dir"):
        drawn(payloads)


def test_wildcards_that_name_each_other_in_a_circle_are_a_mistake(tmp_path: Path) -> None:
    payloads = read(tmp_path, a__toml='prompt = "__a__"')
    with pytest.raises(ConfigError, match="payload a: wildcards name each other in a circle"):
        drawn(payloads, wildcards={"a": ["x __b__"], "b": ["__a__"]})


def test_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    secret, pack = tmp_path / "mine", tmp_path / "pack"
    secret.mkdir()
    pack.mkdir()
    (secret / "diary.txt").write_text("dear diary")
    (pack / "hair.txt").symlink_to(secret / "diary.txt")
    with pytest.raises(ConfigError, match=r"hair\.txt leads out of its folder, to .*diary\.txt"):
        read_wildcards(pack)


def test_links_within_the_folder_and_to_it_are_followed(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "hair.txt").write_text("red")
    (tmp_path / "pack" / "head.txt").symlink_to("hair.txt")
    (tmp_path / "wild").symlink_to("pack")
    assert read_wildcards(tmp_path / "wild") == {"hair": ("red",), "head": ("red",)}


@pytest.mark.parametrize("name", ["../diary", "/etc/passwd", "..\\diary", "people/../../diary"])
def test_name_of_a_wildcard_reads_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "diary.txt").write_text("dear diary")
    (tmp_path / "pack" / "people").mkdir(parents=True)
    payloads = read(tmp_path, a__txt=f"__{name}__")
    with pytest.raises(ConfigError, match="payload a-1: unknown wildcard"):
        drawn(payloads, wildcards=read_wildcards(tmp_path / "pack"))


# What is made to do harm


@pytest.mark.parametrize(
    ("wildcards", "said"),
    [
        ({"a": ["__b__" * 3999], "b": ["__c__" * 9], "c": ["x"]}, "more than 20000 characters"),
        ({"a": ["__b____b__"], "b": ["__a____a__"]}, "more than 20000 characters|in a circle"),
    ],
)
def test_wildcards_that_grow_are_a_mistake(
    tmp_path: Path, wildcards: dict[str, list[str]], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        drawn(read(tmp_path, a__txt="__a__"), wildcards=wildcards)


def test_line_that_is_too_long_is_no_wildcard(tmp_path: Path) -> None:
    (tmp_path / "hair.txt").write_text("red\n" + "x" * 20_001)
    with pytest.raises(ConfigError, match=r"hair\.txt: a line of more than 20000 characters"):
        read_wildcards(tmp_path)


def test_prompt_that_is_slow_to_look_through_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a prompt of more than 20000 characters"):
        drawn(read(tmp_path, a__txt="__a " * 500_000))


def test_file_larger_than_any_of_prompts_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "hair.txt").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match=r"hair\.txt: larger than 64 MiB"):
        read_wildcards(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes with a name")
def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hair.txt")
    with pytest.raises(ConfigError, match=r"hair\.txt: cannot be read \(it is no file\)"):
        read_wildcards(tmp_path)


# The panel


def test_panel_goes_over_all_payloads_in_turn(tmp_path: Path) -> None:
    payloads = read(
        tmp_path, a__toml="prompt='x'\nbatch_size=2\nn_iter=2", b__toml="prompt='y'\nbatch_size=1"
    )
    panel = drawn(payloads, rounds=2)
    assert "".join(p.payload for p in panel) == "aaaab" * 2
    assert [p.index for p in panel] == list(range(10))
    assert n_images(payloads) == 5


def test_panel_is_the_same_for_the_same_seed_and_another_for_another(tmp_path: Path) -> None:
    payloads = read(tmp_path, a__toml='prompt = "__n__"', b__toml='prompt = "__n__"')
    options = {"wildcards": {"n": [str(i) for i in range(100)]}, "rounds": 5}
    first = drawn(payloads, **options)
    assert drawn(payloads, **options) == first
    other = drawn(payloads, **{**options, "seed": "1"})
    assert not {p.seed for p in first} & {p.seed for p in other}
    assert [p.prompt for p in first] != [p.prompt for p in other]


def test_panel_is_the_same_on_every_machine(tmp_path: Path) -> None:
    payloads = read(tmp_path, lake__toml='prompt = "__n__"')
    (prompt,) = drawn(payloads, wildcards={"n": [str(i) for i in range(100)]})
    assert (prompt.seed, prompt.prompt) == (1663255904, "30")


def test_seeds_differ_within_a_panel_and_fit_into_32_bits(tmp_path: Path) -> None:
    payloads = read(tmp_path, a__toml="prompt='x'\nbatch_size=3", b__toml="prompt='x'")
    seeds = [p.seed for p in drawn(payloads, rounds=50)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_added_payload_moves_no_other_prompt_or_seed(tmp_path: Path) -> None:
    old = {"b__toml": 'prompt = "__n__"', "d__toml": 'prompt = "y"\nnegative_prompt = "__n__"'}
    new = {"a__toml": 'prompt = "__n__ __n__"\nbatch_size = 3', "c__toml": "prompt = 'z'"}
    options = {"wildcards": {"n": [str(i) for i in range(100)]}, "rounds": 3}
    before = drawn(read(tmp_path, None, **old), **options)
    both = drawn(read(tmp_path, None, **dict(sorted({**old, **new}.items()))), **options)
    assert keys(tuple(p for p in both if p.payload in "bd")) == keys(before)


def test_more_rounds_go_on_where_fewer_ended(tmp_path: Path) -> None:
    payloads = read(tmp_path, a__toml="prompt='x'\nbatch_size=2", b__toml="prompt='y'\nseed=3")
    assert drawn(payloads, rounds=5)[:6] == drawn(payloads, rounds=2)


def test_payload_s_own_seed_counts_up_over_the_images(tmp_path: Path) -> None:
    payloads = read(tmp_path, a__toml="prompt='x'\nseed=40\nbatch_size=2", b__toml="prompt='y'")
    panel = drawn(payloads, rounds=3)
    assert [p.seed for p in panel if p.payload == "a"] == [40, 41, 42, 43, 44, 45]
    (zero,) = drawn(read(tmp_path, c__toml="prompt='x'\nseed=0"))
    assert zero.seed == 0


def test_fresh_panel_has_new_seeds_even_where_a_payload_gives_its_own(tmp_path: Path) -> None:
    payloads = read(tmp_path, a__toml="prompt='x'\nseed=40", b__toml="prompt='y'")
    usual = drawn(payloads, rounds=3, seed="0/search")
    fresh = drawn(payloads, rounds=3, seed="0/heldout", fresh=True)
    assert not {p.seed for p in usual} & {p.seed for p in fresh}
    assert [p.prompt for p in usual] == [p.prompt for p in fresh]
    assert drawn(payloads, rounds=3, seed="0/heldout", fresh=True) == fresh


def test_prompt_is_read_back_from_plain_data(tmp_path: Path) -> None:
    panel = drawn(read(tmp_path, a__toml="prompt='x'\nenable_hr=true"), rounds=2)
    assert tuple(Prompt.from_dict(p.to_dict()) for p in panel) == panel
