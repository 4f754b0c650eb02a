"""What a merge's file says of itself: facts of its models that stay true, and its recipe for webuis."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bayesian_merger.data import Recipe

Prediction = Literal["epsilon", "v", "unknown"]

_LONGEST = 1 << 16  # a licence in full, but no picture
_LONGEST_HISTORY = 1 << 20

# What is left of A's ModelSpec 1.0.1 in a merge. Its names and shapes of tensors are A's. Other facts
# stay true unless another model says otherwise; `predict_key` is ComfyUI's `prediction_type`. Title,
# author, date, hashes, pictures and descriptions belong to A alone, and trigger phrases and hints may
# have been merged away.
_OF_A = ("sai_model_spec", "implementation")
_SHARED = (
    "architecture",
    "resolution",
    "prediction_type",
    "predict_key",
    "timestep_range",
    "encoder_layer",
)

_V_MARKERS = {"v_pred", "ztsnr", "edm_vpred.sigma_max"}
_EDM_MARKERS = {"edm_mean", "edm_std"}
_SPELLINGS: Mapping[str, Prediction] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v",
    "v_prediction": "v",
    "v-prediction": "v",
}
_PLACES = ("primary", "secondary", "tertiary")


def carried(models: Sequence[Mapping[str, str]], title: str) -> dict[str, str]:
    """The ModelSpec fields of a merge named `title`, from the metadata of its models, A first.

    Empty unless A has such fields. Anything that is not known to stay true is left out, and so is
    what any other tool wrote (training records, workflows). See github.com/Stability-AI/ModelSpec.
    """
    fields = {}
    for key, text in models[0].items():
        field = key.removeprefix("modelspec.")
        said = [model[key] for model in models if key in model]
        agreed = all(other == text for other in said)
        stays = (
            field in _OF_A
            or (field in _SHARED and agreed)
            # A licence binds the merge alone only if every model is under it.
            or (field == "license" and agreed and len(said) == len(models))
        )
        if key != field and stays and len(text) <= _LONGEST:
            fields[key] = text
    return fields | {"modelspec.title": title} if fields else {}


def sd_merge(
    recipe: Recipe, models: Sequence[Mapping[str, str]], legacy_hashes: Sequence[str]
) -> dict[str, str]:
    """`sd_merge_recipe` and `sd_merge_models`, as stable-diffusion-webui writes and shows them.

    `models` are the metadata of the recipe's models and `legacy_hashes` their old short hashes, in
    the recipe's order. `multiplier` is alpha where all blocks share one, else null, and `weights`
    has every weight by block. Models that are merges themselves bring their own recipes along,
    unless these are no JSON objects or are too long. See run_modelmerger of webui's modules/extras.py.
    """
    hashes = [model.sha256 for model in recipe.models]
    # Without the sign of a zero, which equals one without.
    alphas = {value + 0.0 for value in recipe.weights.get("alpha", {}).values()}
    summary = {
        "type": "bayesian-merger",
        **{
            f"{place}_model_hash": hashes[n] if n < len(hashes) else None
            for n, place in enumerate(_PLACES)
        },
        "interp_method": recipe.method,
        "multiplier": alphas.pop() if len(alphas) == 1 else None,
        # Sorted, so that one recipe gives the same bytes from wherever it was read.
        "weights": {
            name: dict(sorted(recipe.weights[name].items())) for name in sorted(recipe.weights)
        },
        "save_as_half": recipe.precision == "fp16",
        "precision": recipe.precision,
        "vae": recipe.vae,
    }
    history: dict[str, Any] = {}
    for model, metadata, legacy_hash in zip(recipe.models, models, legacy_hashes, strict=False):
        history[model.sha256] = {
            "name": model.name,
            "legacy_hash": legacy_hash,
            "sd_merge_recipe": _object(metadata.get("sd_merge_recipe", "")),
        }
        for sha256, entry in (_object(metadata.get("sd_merge_models", "")) or {}).items():
            if isinstance(entry, dict):
                history.setdefault(sha256, entry)
    return {"sd_merge_recipe": json.dumps(summary), "sd_merge_models": json.dumps(history)}


def legacy_hash(path: Path) -> str:
    """The eight digits by which webuis knew a file before SHA-256: a digest of its second megabyte."""
    with path.open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def prediction(tensors: Collection[str], metadata: Mapping[str, str]) -> Prediction:
    """What a model predicts, by the names of its tensors and its metadata; "unknown" if neither says.

    The marker tensors are those that ComfyUI and the webuis go by. Without them SD1.5 and SDXL are
    taken to predict epsilon, as these programs take them; SD2 has both kinds under the same names.
    """
    names = set(tensors)
    if names & _V_MARKERS:
        return "v"
    if names & _EDM_MARKERS:
        return "unknown"
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if found := _SPELLINGS.get(metadata.get(key, "").strip().lower()):
            return found
    if metadata.get("modelspec.architecture") == "stable-diffusion-v2-768-v":
        return "v"
    encoders = ("cond_stage_model.transformer.", "conditioner.embedders.")
    return "epsilon" if any(name.startswith(encoders) for name in names) else "unknown"


def disagreement(predictions: Sequence[tuple[str, Prediction]]) -> str:
    """A warning that names a model of each kind if some predict epsilon and others v; else empty."""
    first: dict[Prediction, str] = {}
    for name, kind in predictions:
        first.setdefault(kind, name)
    if "epsilon" not in first or "v" not in first:
        return ""
    return (
        f"{first['v']} predicts v, but {first['epsilon']} says nothing of it and is taken to predict "
        f"epsilon: if so, their merge predicts neither, and its images are mostly noise"
    )


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object in `text`; None if it is another thing, or too long or too deep to be kept."""
    if len(text) > _LONGEST_HISTORY:
        return None
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
        json.dumps([[[[found]]]])
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _refuse_constant(text: str) -> None:
    # NaN and the infinities are no JSON, and a browser cannot read them.
    raise ValueError(text)
