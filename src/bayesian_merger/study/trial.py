"""One trial of a run in its storage: a recipe being judged, image by image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from bayesian_merger.data import Estimate, Prompt, Recipe, Result, Slopes, State
from bayesian_merger.study.proposals import FOLLOWS, SCORE, SLOPE, UNFOLLOWED, slopes_of

Stage = Literal["brought", "baseline", "explore", "exploit", "select", "heldout"]

_STATES: Mapping[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}


class Trial:
    """A recipe being judged; what is recorded is stored before the call returns."""

    def __init__(
        self, study: optuna.Study, frozen: FrozenTrial, fence: Callable[[], None] = lambda: None
    ) -> None:
        """`fence` is asked before anything is stored, and raises if that is for another to do."""
        self._study, self._fence = study, fence
        self._trial = optuna.trial.Trial(study, frozen._trial_id)
        self._result = result_of(frozen)
        self.stage, self.name, self.recipe = (
            self._result.stage,
            self._result.name,
            self._result.recipe,
        )
        # The images of the panel that it is judged on; all, if it does not say.
        self.items: list[int] | None = frozen.user_attrs.get("items")
        # Whether the slopes of its images are wanted.
        self.follows: bool = frozen.user_attrs.get(FOLLOWS, False)
        self.scores: dict[int, Mapping[str, float]] = dict(self._result.scores)
        self._images: dict[int, str] = dict(self._result.images)
        self._slopes = list(self._result.slopes)
        self._unfollowed: str = frozen.user_attrs.get(UNFOLLOWED, "")
        self._seconds: dict[str, float] = dict(self._result.seconds)
        self._value = self._result.value
        self._state = self._result.state
        self._reason = self._result.reason

    @property
    def number(self) -> int:
        """Its place among the trials of its part of the study."""
        return self._result.number

    @property
    def key(self) -> str:
        """What tells it from all other trials of the run."""
        return f"{self._study.study_name}#{self.number}"

    @property
    def is_complete(self) -> bool:
        return self._state == "complete"

    def record(
        self,
        index: int,
        scores: Mapping[str, float],
        image: str,
        prompt: Mapping[str, Any] | None = None,
    ) -> None:
        """Store one image's scores; an image that has scores already keeps them.

        The `prompt` of an image that no panel has is stored beside them.
        """
        if index not in self.scores:
            told = {"scores": dict(scores), "image": image}
            if prompt:
                told["prompt"] = dict(prompt)
            self._store(f"{SCORE}{index}", told)
            self.scores[index] = dict(scores)
            self._images[index] = image

    def follow(self, items: Sequence[int], slopes: Mapping[str, float]) -> None:
        """Store the derivative of the images' mean value by each parameter; none if it told nothing."""
        found = Slopes(tuple(items), dict(slopes))
        self._store(*of_slopes(found))
        self._slopes.append(found)

    def unfollowed(self, reason: str) -> None:
        """Store why the slopes of some images were not to be had."""
        self._store(UNFOLLOWED, reason)
        self._unfollowed = reason

    @property
    def fault(self) -> str:
        """Why it is not to be followed further: so far, twice or more, its images told no slope."""
        is_mute = len(self._slopes) > 1 and not any(slopes.by for slopes in self._slopes)
        return self._unfollowed if is_mute else ""

    @property
    def followed(self) -> set[int]:
        """Images whose slopes are stored."""
        return {item for slopes in self._slopes for item in slopes.items}

    def judged(self, *, follows: bool) -> Set[int]:
        """Images of which all is stored: their scores or, where it `follows` them, their slopes."""
        return self.followed if follows else self.scores.keys()

    def gather(self, other: Trial) -> list[int]:
        """Take over what `other` has of the same recipe and this one lacks; which images that are."""
        fresh = [index for index in other.scores if index not in self.scores]
        for index in fresh:
            made_of = other._result.prompts.get(index)
            prompt = made_of.to_dict() if made_of else None
            self.record(index, other.scores[index], other._images[index], prompt)
        for slopes in other._slopes:
            if not self.followed & set(slopes.items):
                self.follow(slopes.items, slopes.by)
        if other._unfollowed and not self._unfollowed:
            self.unfollowed(other._unfollowed)
        return fresh

    def spend(self, **seconds: float) -> None:
        """Add to the time spent by phase."""
        for phase, spent in seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + spent
        self._store("seconds", self._seconds)

    def complete(self, value: Estimate) -> None:
        """End the trial with its value."""
        self._store("value", {"mean": value.mean, "se": value.se, "n": value.n})
        self._value, self._state = value, "complete"
        self._study.tell(self._trial, value.mean)

    def fail(self, reason: str) -> None:
        """End the trial without a value."""
        self._store("reason", reason)
        self._reason, self._state = reason, "failed"
        self._study.tell(self._trial, state=TrialState.FAIL)

    def _store(self, key: str, told: Any) -> None:
        self._fence()
        self._trial.set_user_attr(key, told)

    def result(self) -> Result:
        """The trial as it stands."""
        return self._result.but(
            state=self._state,
            scores=dict(self.scores),
            images=dict(self._images),
            slopes=tuple(self._slopes),
            value=self._value,
            reason=self._reason,
            seconds=dict(self._seconds),
        )


def result_of(frozen: FrozenTrial) -> Result:
    """What a storage has of a trial."""
    attrs = frozen.user_attrs
    measured = {
        int(key[len(SCORE) :]): found for key, found in attrs.items() if key.startswith(SCORE)
    }
    # A process that is killed as it ends a trial leaves what it was to end with; the trial goes on.
    state = _STATES[frozen.state]
    value = attrs.get("value") if state == "complete" else None
    return Result(
        stage=attrs["stage"],
        name=attrs["name"],
        number=frozen.number,
        state=state,
        recipe=Recipe.from_dict(attrs["recipe"]),
        scores={i: found["scores"] for i, found in sorted(measured.items())},
        images={i: found["image"] for i, found in sorted(measured.items())},
        slopes=slopes_of(frozen),
        prompts={i: Prompt.from_dict(f["prompt"]) for i, f in measured.items() if f.get("prompt")},
        value=Estimate(**value) if value else None,
        reason=attrs.get("reason", "") if state == "failed" else "",
        seconds=attrs.get("seconds", {}),
    )


def of_slopes(slopes: Slopes) -> tuple[str, dict[str, Any]]:
    """Attribute of a trial, and what it holds."""
    return f"{SLOPE}{slopes.items[0]}", {"items": list(slopes.items), "slopes": dict(slopes.by)}
