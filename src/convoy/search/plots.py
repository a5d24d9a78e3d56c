"""Plots of a search: its history, the values that were tried, and how much each setting mattered."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

# Complete trials below which the importances of settings are noise.
MIN_TRIALS_FOR_IMPORTANCES = 10
# Colours of Okabe and Ito (2008), which colour-blind readers can tell apart.
COMPLETE, PRUNED, BEST = "#0072b2", "#b0b0b0", "#d55e00"


def draw_plots(study: optuna.Study, metric: str, title: str, folder: Path) -> list[Path]:
    """Plot the value of each trial, over its number and over each setting, and the importances of the settings.

    Args:
        study: Study with at least one complete trial.
        metric: Name of the value.
        title: Title of the plots.
        folder: Folder to write `history.png` and `settings.png` into, and `importances.png` if there are enough trials.

    Returns:
        The files that were written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The first trial of a resumed one has failed.
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    plots = {"history.png": _draw_history(trials, metric), "settings.png": _draw_settings(trials, metric)}
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len(complete) >= MIN_TRIALS_FOR_IMPORTANCES and len(complete[0].params) > 1:
        plots["importances.png"] = _draw_importances(study)
    for name, figure in plots.items():
        figure.suptitle(title)
        figure.savefig(folder / name, dpi=100, bbox_inches="tight")
        pyplot.close(figure)
    return [folder / name for name in plots]


def _draw_history(trials: Sequence[FrozenTrial], metric: str) -> Any:
    """Plot the values of the trials, and the best so far."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(7, 4))
    _scatter(axes, trials, [trial.number for trial in trials])
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = np.maximum.accumulate([float(trial.values[0]) for trial in complete])
    axes.step([trial.number for trial in complete], best, where="post", color=BEST, label="best so far")
    axes.set(xlabel="trial", ylabel=metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.3)
    return figure


def _draw_settings(trials: Sequence[FrozenTrial], metric: str) -> Any:
    """Plot the values of the trials over each setting."""
    from matplotlib import pyplot

    space = trials[0].distributions
    figure, all_axes = pyplot.subplots(
        1, len(space), figsize=(1.5 + 3 * len(space), 3.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (name, distribution) in zip(all_axes[0], space.items(), strict=True):
        values = [trial.params[name] for trial in trials]
        is_choice = isinstance(distribution, CategoricalDistribution)
        _scatter(axes, trials, list(map(str, values)) if is_choice else values)
        axes.set(xlabel=name, xscale="log" if getattr(distribution, "log", False) else axes.get_xscale())
        axes.grid(alpha=0.3)
    all_axes[0][0].set_ylabel(metric)
    return figure


def _draw_importances(study: optuna.Study) -> Any:
    """Plot the fraction of the variance between trials that each setting explains (Hutter et al. 2014)."""
    from matplotlib import pyplot

    importances = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    names = list(importances)[::-1]
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.5 * len(names)))
    bars = axes.barh(names, [importances[name] for name in names], color=COMPLETE)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(xlim=(0, 1.08), xlabel="fraction of the variance between complete trials")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _scatter(axes: Any, trials: Sequence[FrozenTrial], places: Sequence[Any]) -> None:
    """Plot the values of trials, and the last values of those that ended early."""
    for state, colour, marker, label in (
        (TrialState.PRUNED, PRUNED, "x", "ended early"),
        (TrialState.COMPLETE, COMPLETE, "o", "complete"),
    ):
        chosen = [(x, t.value) for x, t in zip(places, trials, strict=True) if t.state == state and t.value is not None]
        if chosen:
            axes.scatter(*zip(*chosen, strict=True), color=colour, marker=marker, s=22, label=label, zorder=2)
