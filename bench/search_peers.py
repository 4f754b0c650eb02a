"""One search on one landscape by an optimiser of the field or by ours; bench/search.py runs it.

    python bench/search_peers.py OPTIMISER FAMILY SEED NOISE IMAGES

prints one line of JSON: the regret of what is recommended after so many images, and the median
seconds of CPU to propose a point. Peers judge a point by ten images, take ten points before they learn,
and recommend the best point seen.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from landscapes import Array, Landscape, Noise

MARKS = (30, 40, 50, 60, 80, 100, 150, 200, 300, 400, 500, 1000)
PER_POINT = 10
N_FIRST = 10


class Spent(Exception):
    """The budget of images is gone."""


class Judge:
    """Scores points on the panel, and keeps the regret of the best one seen."""

    def __init__(self, landscape: Landscape, noise: Noise, images: int) -> None:
        self.landscape, self.noise, self.budget = landscape, noise, images
        self.chance = np.random.default_rng([landscape.seed, 1])
        self.images = 0
        self.regrets: dict[int, float] = {}
        self.waits: list[float] = []
        self._best: tuple[float, Array] | None = None
        self._left = time.process_time()

    def __call__(self, point: Array) -> float:
        """The mean score at `point`; Spent once the budget is."""
        if self.images >= N_FIRST * PER_POINT:
            self.waits.append(time.process_time() - self._left)
        if self.images >= self.budget:
            raise Spent
        scores = self.landscape.scores(point, range(PER_POINT), self.noise, self.chance)
        mean = float(scores.mean())
        if self._best is None or mean > self._best[0]:
            self._best = (mean, point)
        self.images += PER_POINT
        if self.images in MARKS:
            self.regrets[self.images] = self.landscape.regret(self._best[1])
        self._left = time.process_time()
        return mean

    def image(self, point: Array, number: int) -> float:
        """The score of one image."""
        self.images += 1
        return float(self.landscape.scores(point, [number], self.noise, self.chance)[0])


def ours(judge: Judge, seed: int) -> None:
    """bayesian-merger with its defaults, as its users call it."""
    import bayesian_merger

    names = _names(judge)
    search = bayesian_merger.Search(
        dict.fromkeys(names, (0.0, 1.0)), images=judge.budget, panel=50, seed=seed
    )

    def point(weights: Mapping[str, float]) -> Array:
        return np.array([weights[name] for name in names])

    left = time.process_time()
    for trial in search:
        if trial.number >= search.plan.n_first:
            judge.waits.append(time.process_time() - left)
        for item in trial:
            trial.report(judge.image(point(trial.weights), item))
            if judge.images in MARKS:
                judge.regrets[judge.images] = judge.landscape.regret(point(search.best().weights))
        left = time.process_time()


def bayes(judge: Judge, seed: int) -> None:
    """bayesian-optimization with its defaults, as sd-webui-bayesian-merger used it."""
    from bayes_opt import BayesianOptimization

    names = _names(judge)
    search = BayesianOptimization(
        f=lambda **point: judge(np.array([point[name] for name in names])),
        pbounds=dict.fromkeys(names, (0.0, 1.0)),
        random_state=seed,
        verbose=0,
    )
    search.maximize(init_points=N_FIRST, n_iter=judge.budget)


def hyperopt(judge: Judge, seed: int) -> None:
    """hyperopt's TPE, the other optimiser of sd-webui-bayesian-merger."""
    from functools import partial

    from hyperopt import fmin, hp, tpe

    names = _names(judge)
    fmin(
        lambda point: -judge(np.array([point[name] for name in names])),
        {name: hp.uniform(name, 0.0, 1.0) for name in names},
        algo=partial(tpe.suggest, n_startup_jobs=N_FIRST),
        max_evals=judge.budget,
        rstate=np.random.default_rng(seed),
        show_progressbar=False,
        verbose=False,
    )


def optuna_tpe(judge: Judge, seed: int) -> None:
    """Optuna's TPE as the successor of that tool uses it: multivariate, 48 candidates."""
    import optuna

    sampler = optuna.samplers.TPESampler(
        seed=seed, multivariate=True, n_startup_trials=N_FIRST, n_ei_candidates=48
    )
    _optuna(judge, sampler)


def optuna_gp(judge: Judge, seed: int) -> None:
    """Optuna's Gaussian process for noisy functions."""
    import optuna

    sampler = optuna.samplers.GPSampler(
        seed=seed, n_startup_trials=N_FIRST, deterministic_objective=False
    )
    _optuna(judge, sampler)


def optuna_cmaes(judge: Judge, seed: int) -> None:
    """CMA-ES by Optuna."""
    import optuna

    _optuna(judge, optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=1))


def uniform(judge: Judge, seed: int) -> None:
    """Random points."""
    chance = np.random.default_rng(seed)
    while True:
        judge(chance.uniform(size=judge.landscape.d))


def sobol(judge: Judge, seed: int) -> None:
    """The scrambled Sobol sequence."""
    from scipy.stats import qmc

    sequence = qmc.Sobol(judge.landscape.d, scramble=True, rng=seed)
    while True:
        for point in sequence.random(64):
            judge(point)


OURS = "bayesian-merger"
OPTIMISERS: dict[str, Callable[[Judge, int], None]] = {
    OURS: ours,
    "bayes": bayes,
    "hyperopt": hyperopt,
    "optuna-tpe": optuna_tpe,
    "optuna-gp": optuna_gp,
    "optuna-cmaes": optuna_cmaes,
    "random": uniform,
    "sobol": sobol,
}


def _names(judge: Judge) -> list[str]:
    return [f"w{i:02}" for i in range(judge.landscape.d)]


def _optuna(judge: Judge, sampler: Any) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    names = _names(judge)
    study.optimize(
        lambda trial: judge(np.array([trial.suggest_float(name, 0.0, 1.0) for name in names]))
    )


def main(optimiser: str, family: str, seed: str, noise: Noise, images: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    judge = Judge(Landscape(family, int(seed)), noise, int(images))
    with contextlib.suppress(Spent):
        OPTIMISERS[optimiser](judge, int(seed))
    wait = statistics.median(judge.waits)
    regrets = {images: round(regret, 5) for images, regret in judge.regrets.items()}
    print(json.dumps({"regrets": regrets, "ask_s": round(wait, 4)}))


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
