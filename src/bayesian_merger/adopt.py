"""The settings of sd-webui-bayesian-merger, conf/config.yaml or the older config.ini, as ours."""

from __future__ import annotations

import configparser
import glob
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bayesian_merger import methods, prompts, yml
from bayesian_merger.errors import ConfigError, one_line, shown
from bayesian_merger.scorers import scorer

SUFFIXES = (".yaml", ".yml", ".ini")
"""By which files of settings are known."""

# Where they are in the tool's folder, or in its folder conf.
_PLACES = ("config.yaml", "conf/config.yaml", "config.ini")
_TOP = """\
# From {!r} of sd-webui-bayesian-merger. The search makes as many images as that did; those of A, B and
# the even merge, and of the proof at the end, come on top."""
_NO_SCORER = """\
# A scorer belongs here ({}). Take the # away and put a name for NAME: {},
# or that of your own, which `plugins` brings. bayesian-merger list scorers tells what they look for.
# [scorers.NAME]"""
_LONGEST = 300  # characters of what another library says, which may quote the file
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_OFF = ("", "0", "no", "off", "false", "none")
_OPTIMISERS = {"bayes": "bayes", "tpe": "tpe", "atpe": "tpe"}
_WITHOUT = {
    "bounds_transformer": "bayes here needs no narrowing of its ranges",
    "prune": "all that belongs to no block is kept as it is",
    "rebasin": "there is no git re-basin",
    "weights_clip": "it had no effect, as it never reached the merge; merge.clip = true has one",
    "draw_unet_weights": "the report draws the weights",
}
# Of no consequence here, or told elsewhere.
_SILENT = (
    *("defaults", "run_name", "hydra", "device", "work_device", "threads", "scorer_device"),
    *("scorer_model_dir", "skip_position_ids", "rebasin_iterations", "draw_unet_base_alpha"),
    *("payloads", "optimisation_guide", "payloads_dir", "best_format", "guided_optimisation"),
)
_READ = (
    *("model_a", "model_b", "model_c", "merge_mode", "best_precision", "url"),
    *("optimiser", "init_points", "n_iters", "batch_size", "latin_hypercube_sampling"),
    *("wildcards_dir", "scorer_method", "scorer_model_name", "save_best", "save_imgs"),
)
# What scorer_method chad was by scorer_model_name; its last versions had no choice, but the second.
_CHADS = {
    "sac+logos+ava1-l14-linearMSE.pth": "chad",
    "ava+logos-l14-linearMSE.pth": "ava_logos",
    "ava+logos-l14-reluMSE.pth": "ava_logos_relu",
}
# Fields of a cargo that say what would be the case without them.
_USUAL: Mapping[str, Any] = {
    **{"subseed": -1, "subseed_strength": 0, "seed_resize_from_h": -1, "seed_resize_from_w": -1},
    **{"enable_hr": False, "denoising_strength": 0, "hr_upscaler": "", "hr_scale": 2, "seed": -1},
    **{"firstphase_width": 0, "firstphase_height": 0, "hr_second_pass_steps": 0},
    **{"hr_resize_x": 0, "hr_resize_y": 0, "styles": [], "restore_faces": False, "tiling": False},
    **{"eta": 0, "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 1, "n_iter": 1},
    **{"batch_size": 1, "prompt": "", "score_weight": 1.0},
}


class Adopted(NamedTuple):
    """A configuration's text, and what of the settings it does not hold."""

    text: str
    notes: Sequence[str]


def settings(folder: Path) -> Path:
    """The file of settings in the tool's folder or in its conf; ConfigError if there is none."""
    for place in _PLACES:
        if (folder / place).is_file():
            return folder / place
    raise ConfigError(
        f"{folder}: a folder without {', '.join(_PLACES)}; name the file of settings, or the log"
    )


def adopted(path: Path) -> Adopted:
    """The configuration that does what the settings in `path` say; its search makes as many images.

    Payload files, wildcards and guide stay where they are and are read there. ConfigError if the file
    cannot be read, or names no models or payloads.
    """
    is_ini = path.suffix.lower() == ".ini"
    given = _ini(path) if is_ini else _yaml(path)
    # Relative paths were relative to where the tool was started: its folder, with conf/ in it.
    base = path.absolute().parent if is_ini else path.absolute().parent.parent
    models = _models(path, given, base)
    payloads, defaults = _ini_payloads(path, given) if is_ini else _cargo(path, given)
    notes = _notes(given, base)
    try:
        per_round = prompts.n_images(prompts.read_payloads(payloads, defaults))
    except ConfigError:
        per_round = len(payloads)
        notes.append(
            "search.images counts one image of each payload, as there are mistakes in them, which "
            "bayesian-merger check tells"
        )
    folder = base / str(given.get("wildcards_dir", ""))
    judges, missing = _scorers(given)
    tables = [
        _TOP.format(path.name),
        _table("models", models),
        _table(
            "merge",
            {
                "method": str(given.get("merge_mode", "weighted_sum")),
                "precision": "fp32" if str(given.get("best_precision", 16)) == "32" else "fp16",
            },
        ),
        _table("search", _search(path, given, per_round)),
        _table(
            "panel",
            {
                # The names of files are not patterns of names.
                "payloads": [glob.escape(file.as_posix()) for file in payloads],
                "batch_size": _count(path, given, "batch_size", 1),
                **({"wildcards_dir": folder.as_posix()} if _has_wildcards(given, folder) else {}),
            },
        ),
        _table("panel.defaults", defaults),
        _table(
            "backend", {"name": "webui", "url": str(given.get("url", "http://127.0.0.1:7860"))}
        ),
        *(_table(f"scorers.{_key(judge)}", {}) for judge in judges),
        *([_NO_SCORER.format(missing, ", ".join(scorer.names()))] if missing else []),
        _table(
            "output",
            {
                "save_best": _is_set(given.get("save_best")),
                "save_images": "all" if _is_set(given.get("save_imgs")) else "best",
            },
        ),
    ]
    return Adopted("\n\n".join(tables) + "\n", notes)


def _models(path: Path, given: Mapping[str, Any], base: Path) -> dict[str, str]:
    """The models that the method takes; ConfigError if one is not named."""
    n_models = methods.n_models(methods.get(str(given.get("merge_mode", "weighted_sum"))))
    found = {}
    for letter in "abc"[: max(2, n_models)]:
        model = given.get(f"model_{letter}")
        if not isinstance(model, str):
            raise ConfigError(
                f"{path}: model_{letter} names no file; are these the settings of "
                f"sd-webui-bayesian-merger (conf/config.yaml)?"
            )
        found[letter] = (base / model).as_posix()
    return found


def _search(path: Path, given: Mapping[str, Any], per_round: int) -> dict[str, Any]:
    """The search, when a round over the payloads makes so many images."""
    points = _count(path, given, "init_points", 1) + _count(path, given, "n_iters", 1)
    found: dict[str, Any] = {
        "images": points * _count(path, given, "batch_size", 1) * per_round,
        "optimiser": _OPTIMISERS.get(_optimiser(given), "auto"),
    }
    if _is_set(given.get("latin_hypercube_sampling")):
        found["init"] = "lhs"
    if _is_set(given.get("guided_optimisation")):
        chosen = _chosen(given, "optimisation_guide", "guide")
        guides = path.absolute().parent / "optimisation_guide"
        found["guide"] = _file(guides, chosen).as_posix()
    return found


def _optimiser(given: Mapping[str, Any]) -> str:
    return str(given.get("optimiser", "bayes"))


def _scorers(given: Mapping[str, Any]) -> tuple[list[str], str]:
    """The scorers that are here, and what of them is missing, if anything."""
    method = given.get("scorer_method")
    listed = [str(name) for name in (method if isinstance(method, list) else [method]) if name]
    if not listed:
        return [], "scorer_method names none"
    chad = _CHADS.get(str(given.get("scorer_model_name")), "chad")
    named = list(dict.fromkeys(chad if name == "chad" else name for name in listed))
    missing = [name for name in named if name not in scorer.names()]
    verb = "is" if len(missing) == 1 else "are"
    told = f"{', '.join(map(repr, missing))} {verb} not here" if missing else ""
    return [name for name in named if name not in missing], told


def _has_wildcards(given: Mapping[str, Any], folder: Path) -> bool:
    return isinstance(given.get("wildcards_dir"), str) and folder.is_dir()


def _notes(given: Mapping[str, Any], base: Path) -> list[str]:
    """What of the settings the configuration does not hold, and where it differs."""
    notes = [
        "the merge keeps model A's VAE; for one that is mixed by base_alpha, as there, set merge.vae "
        'to "base"',
        *(f"{key} is left out: {why}" for key, why in _WITHOUT.items() if _says(given, key)),
    ]
    known = {*_READ, *_SILENT, *_WITHOUT}
    notes += [f"{key} is left out: not known" for key in given if key not in known]
    optimiser = _optimiser(given)
    if optimiser == "atpe":
        notes.append("optimiser atpe is tpe here, which does not adapt its own settings")
    elif optimiser not in _OPTIMISERS:
        notes.append(f"optimiser {optimiser} is not here: search.optimiser is auto")
    folder = base / str(given.get("wildcards_dir", ""))
    if given.get("wildcards_dir") and not _has_wildcards(given, folder):
        notes.append(f"wildcards_dir is left out: {folder} is no folder")
    if str(given.get("best_format", "safetensors")) != "safetensors":
        notes.append("best_format is left out: merges are written as .safetensors")
    found, missing = _scorers(given)
    if "chad" in found and given.get("scorer_model_name") not in _CHADS:
        notes.append(
            "scorer_method chad is sac+logos+ava1-l14-linearMSE.pth; in the last versions it was "
            "ava+logos-l14-linearMSE.pth, which is ava_logos here"
        )
    if missing:
        notes.append(
            f"{missing}: put a scorer where the configuration says that one belongs "
            f"({', '.join(scorer.names())}, or your own)"
        )
    return notes


def _says(given: Mapping[str, Any], key: str) -> bool:
    """Whether a setting is there and not switched off."""
    return str(given.get(key)).strip().casefold() not in _OFF


def _yaml(path: Path) -> dict[str, Any]:
    """A file's table, keys and values; ConfigError if it is none."""
    try:
        found = yml.loads(path.read_text(encoding="utf-8-sig"), dates=False)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: no table of settings")
    for key, value in found.items():
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError):
            raise ConfigError(
                f"{path}: {key} is {shown(value)}, which is not of texts, numbers, lists and tables"
            ) from None
    return {str(key): value for key, value in found.items()}


def _ini(path: Path) -> dict[str, Any]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError, configparser.Error) as error:
        raise ConfigError(f"{path}: not valid: {one_line(error)[:_LONGEST]}") from error
    if not parser.has_section("options"):
        raise ConfigError(f"{path}: no section [options]")
    return dict(parser["options"])


def _cargo(path: Path, given: Mapping[str, Any]) -> tuple[list[Path], dict[str, Any]]:
    """The payloads' files, and the fields that hold for all, of conf/payloads/CARGO.yaml."""
    cargo = _file(path.parent / "payloads", _chosen(given, "payloads", "cargo"))
    fields = _yaml(cargo)
    files: list[Path] = []
    for group in _list(fields.pop("defaults", None)):
        for folder, names in group.items() if isinstance(group, dict) else ():
            for one in names if isinstance(names, list) else [names]:
                files.append(_file(cargo.parent / str(folder), one).absolute())
    if not files:
        raise ConfigError(
            f"{cargo}: its list `defaults` names no payloads, as `- cargo: [portrait]` would, whose "
            f"file is {cargo.parent / 'cargo' / 'portrait.yaml'}"
        )
    if missing := [file for file in files if not file.is_file()]:
        raise ConfigError(f"{cargo}: there is no {missing[0]}")
    said = {key: value for key, value in fields.items() if value is not None}
    usual = {key for key, value in said.items() if key in _USUAL and _USUAL[key] == value}
    return list(dict.fromkeys(files)), {k: v for k, v in said.items() if k not in usual}


def _ini_payloads(path: Path, given: Mapping[str, Any]) -> tuple[list[Path], dict[str, Any]]:
    """The files in the folder of payloads, each of which says all."""
    folder = path.absolute().parent / str(given.get("payloads_dir", "payloads"))
    files = sorted(f for f in folder.glob("*.yaml") if ".tmpl" not in f.suffixes)
    if not files:
        raise ConfigError(f"{folder}: there are no payloads (*.yaml)")
    return files, {}


def _chosen(given: Mapping[str, Any], group: str, usual: str) -> str:
    """The file that the list of defaults names for a group."""
    named = [one for one in _list(given.get("defaults")) if isinstance(one, dict)]
    return next((str(one[group]) for one in named if group in one), usual)


def _file(folder: Path, name: object) -> Path:
    """The YAML file of that name, which Hydra takes with and without its suffix."""
    return folder / (str(name) if str(name).endswith(".yaml") else f"{name}.yaml")


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_set(value: object) -> bool:
    """Whether a switch is on; old files say yes and no."""
    if isinstance(value, str):
        return value.strip().casefold() in ("yes", "true", "on", "1")
    return bool(value)


def _count(path: Path, given: Mapping[str, Any], key: str, usual: int) -> int:
    try:
        found = int(given.get(key, usual))
    except (TypeError, ValueError):
        found = -1
    if found < 0:
        raise ConfigError(f"{path}: {key} is {shown(given.get(key))}, no count")
    return found


def _table(name: str, entries: Mapping[str, Any]) -> str:
    return "\n".join([f"[{name}]", *(f"{_key(k)} = {_toml(v)}" for k, v in entries.items())])


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _toml(name)


def _toml(value: Any) -> str:
    """A value of JSON's kinds as TOML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_key(str(k))} = {_toml(v)}' for k, v in value.items())} }}"
    if value is None:
        return '""'
    # JSON's texts are TOML's but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
