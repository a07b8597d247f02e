"""What the trials of a sweep say: a table, a file of all of them, plots, and the best settings of each arm."""

import json
import logging
import statistics
from dataclasses import replace
from typing import Any

import optuna
import pandas as pd
from optuna.trial import TrialState

from ..messages import table
from ..parsing import resolve
from .plan import Sweep, as_chosen, file_name
from .trials import finished

TRIALS = "trials.parquet"
LEAST = 4  # completed trials before anything is drawn

logger = logging.getLogger(__name__)


def as_text(sweep: Sweep, studies: dict[str, optuna.Study]) -> str:
    """A line for each arm."""
    lines = []
    for arm, study in studies.items():
        trials = finished(study)
        states = [trial.state for trial in trials]
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        line: dict[str, Any] = {
            "arm": arm,
            "trials": len(trials),
            "ended early": states.count(TrialState.PRUNED),
            "failed": states.count(TrialState.FAIL),
            "best validation": study.best_value if complete else "-",
            "median": statistics.median(trial.values[0] for trial in complete) if complete else "-",
        }
        best = study.best_params if complete else {}
        lines.append({**line, **{name: best.get(name, "-") for name in sweep.search}})
    return table(lines)


def write_outcome(sweep: Sweep, studies: dict[str, optuna.Study]) -> list[str]:
    """Writes all trials as parquet, and for each arm its plots and the arguments of its best trial. Returns the names
    of the files."""
    rows = [
        {
            "arm": arm,
            "number": trial.number,
            "state": trial.state.name.lower(),
            "validation": trial.value if trial.state == TrialState.COMPLETE else None,
            "evaluations": [trial.intermediate_values[n] for n in sorted(trial.intermediate_values)],
            **trial.user_attrs,
            **_cells(sweep, trial.params),
        }
        for arm, study in studies.items()
        for trial in finished(study)
    ]
    pd.DataFrame(rows).to_parquet(sweep.output_dir / TRIALS, index=False)
    files = [TRIALS]
    for arm, study in studies.items():
        if any(trial.state == TrialState.COMPLETE for trial in finished(study)):
            args = resolve({**sweep.arms[arm], **as_chosen(sweep, study.best_params), "output_dir": f"out/{arm}"})
            args = replace(args, do_predict=True, plots=True, threads=None, disable_tqdm=False, save_total_limit=2)
            files.append(f"best_{file_name(arm)}.yaml")
            args.save(sweep.output_dir / files[-1])
        files += draw(sweep, arm, study)
    return files


def _cells(sweep: Sweep, proposed: dict[str, Any]) -> dict[str, Any]:
    """Values for columns of one type: choices of several types, lists and mappings as json."""
    chosen, cells = as_chosen(sweep, proposed), {}
    for name, space in sweep.search.items():
        types, value = {type(choice) for choice in space.get("choices", ())}, chosen.get(name)
        cells[name] = json.dumps(value) if len(types) > 1 or types & {list, dict} else value
    return cells


def draw(sweep: Sweep, arm: str, study: optuna.Study) -> list[str]:
    """What matters, each value by itself, and all of them together."""
    values = {trial.value for trial in finished(study) if trial.state == TrialState.COMPLETE}
    if len(values) < LEAST:
        return []
    import warnings

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as drawn

    plots: dict[str, Any] = {"slices": drawn.plot_slice}
    if len(sweep.search) > 1:
        plots |= {"importance": drawn.plot_param_importances, "together": drawn.plot_parallel_coordinate}
    files = []
    for name, plot in plots.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these functions are "experimental", and their layout is not ours
            axes = plot(study)
        figure: Any = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
        files.append(f"{name}_{file_name(arm)}.png")
        figure.savefig(sweep.output_dir / files[-1], dpi=120, bbox_inches="tight")
        pyplot.close(figure)
    return files
