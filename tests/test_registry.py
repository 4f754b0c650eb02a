from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from bayesian_merger.backends import backend
from bayesian_merger.errors import ConfigError
from bayesian_merger.methods import method
from bayesian_merger.registry import Registry, import_file, nearest
from bayesian_merger.scorers import scorer

_numbers = itertools.count()

TASTE = """
from bayesian_merger.scorers import scorer

@scorer
class Taste:
    def __init__(self, target: float = 0.5, *, hidden: int = 0) -> None:
        self.target, self.hidden = target, hidden
"""


@pytest.fixture
def toys() -> Registry[Any]:
    """A registry of three plugins."""
    toys: Registry[Any] = Registry("toy", "bayesian_merger.methods")
    toys._discovered = True

    @toys
    class Plain:
        """Has no options."""

    @toys
    class Server:
        """Has options of many types."""

        def __init__(
            self,
            url: str,
            folder: Path = Path(),
            timeout_s: float = 300,
            n: int = 1,
            *,
            test: int = 0,
        ) -> None:
            self.seen = (url, folder, timeout_s, n, test)

    @toys
    class Untyped:
        """Is written in haste."""

        def __init__(self, target, sharp=3) -> None:  # type: ignore[no-untyped-def]
            self.seen = (target, sharp)

    return toys


@pytest.fixture
def scorers(monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    """The registry of scorers, as it was again afterwards."""
    scorer.names()
    monkeypatch.setattr(scorer, "_found", dict(scorer._found))
    return scorer


def plugin(tmp_path: Path, text: str) -> Path:
    # Python keeps modules by name, so each file has its own.
    path = tmp_path / f"plugin_{next(_numbers)}.py"
    path.write_text(text, encoding="utf-8")
    return path


def mistake(toys: Registry[Any], name: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        toys.check(name, options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Names


@pytest.mark.parametrize("registry", [method, backend, scorer], ids=lambda r: r.kind)
def test_plugins_of_each_kind_are_found_in_their_package(registry: Registry[Any]) -> None:
    assert registry.names()
    assert registry.names() == sorted(registry.names())
    for name in registry.names():
        assert name == name.lower()
        assert callable(registry.get(name))
        assert (registry.get(name).__doc__ or "").strip()


def test_plugin_is_registered_under_its_lower_case_name(toys: Registry[Any]) -> None:
    assert toys.names() == ["plain", "server", "untyped"]
    assert toys.get("plain").__name__ == "Plain"


def test_new_file_in_the_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = f"toys_{next(_numbers)}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(
        f"from bayesian_merger.registry import Registry\ntoy = Registry('toy', '{package}')\n"
    )
    (tmp_path / package / "added.py").write_text(
        f"from {package} import toy\n\n@toy\nclass Added:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    assert importlib.import_module(package).toy.names() == ["added"]


def test_unknown_name_suggests_the_nearest_or_lists_all(toys: Registry[Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        toys.get("Sever")
    assert str(caught.value) == "unknown toy 'Sever'; did you mean 'server'?"
    with pytest.raises(ConfigError) as caught:
        toys.get("car")
    assert str(caught.value) == "unknown toy 'car'; known: plain, server, untyped."


def test_nearest_says_nothing_where_nothing_is_near() -> None:
    assert nearest("precison", ["vae", "precision"]) == "; did you mean 'precision'?"
    assert nearest("zzz", ["vae", "precision"]) == ""
    assert nearest("x", []) == ""


# Options


def test_options_are_converted_by_the_constructor_s_annotations(toys: Registry[Any]) -> None:
    built = toys.build("server", {"url": "http://x", "folder": "a/b", "timeout_s": 3, "n": 2})
    assert built.seen == ("http://x", Path("a/b"), 3.0, 2, 0)
    assert toys.build("server", {"url": "http://x"}).seen == ("http://x", Path(), 300, 1, 0)


def test_only_given_options_are_handed_on(toys: Registry[Any]) -> None:
    assert toys.check("server", {"url": "x", "n": "2"}) == {"url": "x", "n": 2}
    assert toys.check("plain", {}) == {}


def test_constructor_without_annotations_takes_its_options_as_they_are(
    toys: Registry[Any],
) -> None:
    assert toys.build("untyped", {"target": 0.4}).seen == (0.4, 3)
    assert "option 'target' is missing" in mistake(toys, "untyped")


def test_unknown_option_is_a_mistake_with_the_nearest_known(toys: Registry[Any]) -> None:
    assert mistake(toys, "server", url="x", timeout=3) == (
        "toy server: unknown option 'timeout'; did you mean 'timeout_s'? "
        "(known: url, folder, timeout_s, n)"
    )
    assert mistake(toys, "plain", size=1) == "toy plain: unknown option 'size' (known: none)"


def test_option_of_another_plugin_is_told_as_such(toys: Registry[Any]) -> None:
    assert mistake(toys, "plain", url="x", target=1, size=3) == (
        "toy plain: unknown option 'size' (known: none); "
        "toy plain: unknown option 'url' (of server), 'target' (of untyped); "
        "take out what belongs to another toy (known: none)"
    )
    with pytest.raises(
        ConfigError, match=r"^back end webui: unknown option 'clip_skip' \(of .*diffu"
    ):
        backend.check("webui", {"url": "http://x", "clip_skip": 2})


def test_what_follows_the_star_is_no_option(toys: Registry[Any]) -> None:
    assert "unknown option 'test'" in mistake(toys, "server", url="x", test=1)


def test_missing_and_wrong_options_are_told_at_once(toys: Registry[Any]) -> None:
    told = mistake(toys, "server", n="many", timeout_s=[3], sise=1)
    assert "option 'url' is missing" in told
    assert "option 'n'" in told
    assert "(found 'many')" in told
    assert "option 'timeout_s'" in told
    assert "unknown option 'sise'" in told


@pytest.mark.parametrize("registry", [backend, scorer], ids=lambda r: r.kind)
def test_misspelt_option_of_every_plugin_is_a_mistake(registry: Registry[Any]) -> None:
    for name in registry.names():
        with pytest.raises(ConfigError, match=f"{registry.kind} {name}: unknown option 'optoin'"):
            registry.check(name, {"optoin": 1})


# Files of users


def test_plugin_file_of_a_user_adds_its_scorer(tmp_path: Path, scorers: Registry[Any]) -> None:
    import_file(plugin(tmp_path, TASTE))
    assert "taste" in scorers.names()
    assert scorers.build("taste", {"target": 0.25}).target == 0.25


def test_plugin_file_may_be_imported_twice(tmp_path: Path, scorers: Registry[Any]) -> None:
    path = plugin(tmp_path, TASTE)
    import_file(path)
    import_file(path)
    assert scorers.names().count("taste") == 1


def test_plugin_file_is_imported_before_the_others_are_listed(tmp_path: Path) -> None:
    text = TASTE.replace(
        "bayesian_merger.scorers import scorer", "bayesian_merger.registry import Registry"
    )
    text = text.replace("@scorer", "toys = Registry('toy', 'bayesian_merger.methods')\n\n@toys")
    import_file(plugin(tmp_path, text))


def test_plugin_with_the_name_of_another_is_a_mistake(
    tmp_path: Path, scorers: Registry[Any]
) -> None:
    import_file(plugin(tmp_path, TASTE))
    with pytest.raises(ConfigError, match="two scorers are called 'taste'"):
        import_file(plugin(tmp_path, TASTE))
    with pytest.raises(ConfigError, match="two scorers are called 'exposure'"):
        import_file(plugin(tmp_path, TASTE.replace("Taste", "Exposure")))


@pytest.mark.parametrize(
    ("text", "saying"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import no_such_module_at_all\n", "ModuleNotFoundError: No module named 'no_such"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("raise ValueError('one\\ntwo')\n", "ValueError: one"),
        ("raise SystemExit(3)\n", "SystemExit"),
        ("\0", "null bytes"),
    ],
)
def test_broken_plugin_file_is_a_mistake_of_one_line_with_its_path(
    tmp_path: Path, text: str, saying: str
) -> None:
    path = plugin(tmp_path, text)
    with pytest.raises(ConfigError, match=saying) as caught:
        import_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plugin_file_that_is_no_python_file_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "folder.py").mkdir()
    for name in ("no.py", "notes.txt", "folder.py"):
        with pytest.raises(ConfigError, match="no such Python file"):
            import_file(tmp_path / name)


def test_relative_path_among_the_options_is_below_the_folder_of_the_configuration(
    toys: Registry[Any], tmp_path: Path
) -> None:
    built = toys.build("server", {"url": "http://x", "folder": "a/b"}, tmp_path)
    assert built.seen[1] == tmp_path / "a" / "b"
    built = toys.build("server", {"url": "http://x", "folder": str(tmp_path / "c")}, Path("other"))
    assert built.seen[1] == tmp_path / "c"
