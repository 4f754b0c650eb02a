"""The settings of sd-webui-bayesian-merger, conf/config.yaml or the older config.ini, as ours."""

from __future__ import annotations

import configparser
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bayesian_merger import methods
from bayesian_merger.errors import ConfigError, one_line
from bayesian_merger.scorers import scorer

SUFFIXES = (".yaml", ".yml", ".ini")
"""By which files of settings are known."""

_OPTIMISERS = {"bayes": "bayes", "tpe": "tpe", "atpe": "tpe"}
_WITHOUT = {
    "bounds_transformer": "bayes here needs no narrowing of its ranges",
    "prune": "all that belongs to no block is kept as it is",
    "rebasin": "there is no git re-basin",
    "scorer_model_name": "a scorer has its own files",
    "draw_unet_weights": "the report draws the weights",
}
# Of no consequence here, or told elsewhere.
_SILENT = (
    *("defaults", "run_name", "hydra", "device", "work_device", "threads", "scorer_device"),
    *("scorer_model_dir", "skip_position_ids", "rebasin_iterations", "draw_unet_base_alpha"),
    *("payloads", "optimisation_guide", "payloads_dir", "best_format", "guided_optimisation"),
)
_READ = (
    *("model_a", "model_b", "model_c", "merge_mode", "best_precision", "weights_clip", "url"),
    *("optimiser", "init_points", "n_iters", "batch_size", "latin_hypercube_sampling"),
    *("wildcards_dir", "scorer_method", "save_best", "save_imgs"),
)
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


def adopted(path: Path) -> Adopted:
    """The configuration that does what the settings in `path` say, with the same number of images.

    Payload files, wildcards and guide stay where they are and are read there. ConfigError if the file
    cannot be read, or names no models or payloads.
    """
    is_ini = path.suffix.lower() == ".ini"
    given = _ini(path) if is_ini else _yaml(path)
    # Relative paths were relative to where the tool was started: its folder, with conf/ in it.
    base = path.absolute().parent if is_ini else path.absolute().parent.parent
    payloads, defaults = _ini_payloads(path, given) if is_ini else _cargo(path, given)
    if not payloads:
        raise ConfigError(f"{path}: no payload is named, or none is there")
    folder = base / str(given.get("wildcards_dir", ""))
    judge = str(given.get("scorer_method", ""))
    sections: dict[str, Mapping[str, Any]] = {
        "models": _models(path, given, base),
        "merge": {
            "method": given.get("merge_mode", "weighted_sum"),
            "precision": "fp32" if str(given.get("best_precision", 16)) == "32" else "fp16",
            "clip": _is_set(given.get("weights_clip")),
        },
        "search": _search(path, given, len(payloads)),
        "panel": {
            "payloads": [file.as_posix() for file in payloads],
            "batch_size": _count(path, given, "batch_size", 1),
            **({"wildcards_dir": folder.as_posix()} if _has_wildcards(given, folder) else {}),
        },
        "panel.defaults": defaults,
        "backend": {"name": "webui", "url": str(given.get("url", "http://127.0.0.1:7860"))},
        **({f"scorers.{judge}": {}} if judge in scorer.names() else {}),
        "output": {key: _is_set(given.get(key)) for key in ("save_best", "save_imgs")},
    }
    lines = [f"# From {path.name} of sd-webui-bayesian-merger, with the same number of images."]
    for name, entries in sections.items():
        lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in entries.items())]
    return Adopted("\n".join(lines) + "\n", _notes(given, folder))


def _models(path: Path, given: Mapping[str, Any], base: Path) -> dict[str, str]:
    """The models that the method takes; ConfigError if one is not named."""
    n_models = methods.n_models(methods.get(str(given.get("merge_mode", "weighted_sum"))))
    found = {}
    for letter in "abc"[: max(2, n_models)]:
        model = given.get(f"model_{letter}")
        if not isinstance(model, str):
            raise ConfigError(f"{path}: model_{letter} names no file")
        found[letter] = (base / model).as_posix()
    return found


def _search(path: Path, given: Mapping[str, Any], n_payloads: int) -> dict[str, Any]:
    points = _count(path, given, "init_points", 1) + _count(path, given, "n_iters", 1)
    found: dict[str, Any] = {
        "images": points * _count(path, given, "batch_size", 1) * n_payloads,
        "optimiser": _OPTIMISERS.get(str(given.get("optimiser", "bayes")), "auto"),
    }
    if _is_set(given.get("latin_hypercube_sampling")):
        found["init"] = "lhs"
    if _is_set(given.get("guided_optimisation")):
        chosen = _chosen(given, "optimisation_guide", "guide")
        guide = path.absolute().parent / "optimisation_guide" / f"{chosen}.yaml"
        found["guide"] = guide.as_posix()
    return found


def _has_wildcards(given: Mapping[str, Any], folder: Path) -> bool:
    return isinstance(given.get("wildcards_dir"), str) and folder.is_dir()


def _notes(given: Mapping[str, Any], wildcards: Path) -> list[str]:
    """What of the settings the configuration does not hold, and where it differs."""
    notes = [
        f"{key} is left out: {why}" for key, why in _WITHOUT.items() if _is_set(given.get(key))
    ]
    known = {*_READ, *_SILENT, *_WITHOUT}
    notes += [f"{key} is left out: not known" for key in given if key not in known]
    if given.get("wildcards_dir") and not _has_wildcards(given, wildcards):
        notes.append(f"wildcards_dir is left out: {wildcards} is no folder")
    judge = str(given.get("scorer_method", ""))
    if judge not in scorer.names():
        notes.append(
            f"scorer_method {judge!r} is not here: put another into the configuration, as "
            f"[scorers.NAME] (bayesian-merger list scorers)"
        )
    if str(given.get("best_format", "safetensors")) != "safetensors":
        notes.append("best_format is left out: merges are written as .safetensors")
    return [
        *notes,
        "the merge keeps model A's VAE; for one that is mixed by base_alpha, as there, set merge.vae "
        'to "base"',
    ]


def _yaml(path: Path) -> dict[str, Any]:
    """A file's table, keys and values; ConfigError if it is none."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid YAML: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: no table of settings")
    return {str(key): value for key, value in found.items()}


def _ini(path: Path) -> dict[str, Any]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError, configparser.Error) as error:
        raise ConfigError(f"{path}: not valid: {one_line(error)}") from error
    if not parser.has_section("options"):
        raise ConfigError(f"{path}: no section [options]")
    return dict(parser["options"])


def _cargo(path: Path, given: Mapping[str, Any]) -> tuple[list[Path], dict[str, Any]]:
    """The payloads' files, and the fields that hold for all, of conf/payloads/CARGO.yaml."""
    cargo = path.parent / "payloads" / f"{_chosen(given, 'payloads', 'cargo')}.yaml"
    fields = _yaml(cargo)
    files: list[Path] = []
    for group in _list(fields.pop("defaults", None)):
        for folder, names in group.items() if isinstance(group, dict) else ():
            for one in names if isinstance(names, list) else [names]:
                files.append((cargo.parent / str(folder) / f"{one}.yaml").absolute())
    if missing := [file for file in files if not file.is_file()]:
        raise ConfigError(f"{cargo}: there is no {missing[0]}")
    return files, {k: v for k, v in fields.items() if k not in _USUAL or _USUAL[k] != v}


def _ini_payloads(path: Path, given: Mapping[str, Any]) -> tuple[list[Path], dict[str, Any]]:
    """The files in the folder of payloads, each of which says all."""
    folder = path.absolute().parent / str(given.get("payloads_dir", "payloads"))
    return sorted(f for f in folder.glob("*.yaml") if ".tmpl" not in f.suffixes), {}


def _chosen(given: Mapping[str, Any], group: str, usual: str) -> str:
    """The file that the list of defaults names for a group."""
    named = [one for one in _list(given.get("defaults")) if isinstance(one, dict)]
    return next((str(one[group]) for one in named if group in one), usual)


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
        raise ConfigError(f"{path}: {key} is {given.get(key)!r}, no count")
    return found


def _toml(value: Any) -> str:
    """A value of JSON's kinds as TOML."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_toml(str(k))} = {_toml(v)}' for k, v in value.items())} }}"
    if value is None:
        return '""'
    # JSON's texts are TOML's but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
