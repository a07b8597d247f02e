"""`hf-al sweep`: searches settings with Optuna, every arm with the same budget. Imports happen when it runs.

A sweep goes through these modules: plan.py reads its yaml, trials.py carries the trials out and keeps them in a
database, outcome.py says what they mean.
"""

from argparse import Namespace
from pathlib import Path

from ..atomic import alone_at
from ..early import check_is_no_file
from ..flags import add_file, positive
from ..parsing import FlagParser
from ..values import capped


def sweep_flags(parser: FlagParser) -> None:
    add_file(parser, "sweep", "yaml of the sweep: recipe, arms, and what to search")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder for the trials and their database")
    parser.add_argument("--data_dir", metavar="DIR", help="a folder for each data set (default: what the recipe names)")
    parser.add_argument("--trials", type=positive, metavar="N", help="of each arm (default: those of the yaml)")
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="trials at the same time, of one thread each (default: 1)"
    )
    parser.add_argument("--keep_models", action="store_true", help="keep models and checkpoints of finished trials")


def run_sweep(flags: Namespace) -> None:
    try:
        import optuna
        import sqlalchemy  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"Expected the package {error.name} to search settings, found none. Run: pip install 'hf_al[sweep]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    from .plan import read_sweep

    output_dir = Path(flags.output_dir)
    check_is_no_file(output_dir)
    sweep = read_sweep(flags.sweep, output_dir, flags.data_dir, flags.trials)
    from ..study.execution import quiet
    from .outcome import as_text, write_outcome
    from .trials import carry_out_sweep, open_studies

    output_dir.mkdir(parents=True, exist_ok=True)
    with alone_at(output_dir):
        with quiet():
            studies = open_studies(sweep)
        carry_out_sweep(sweep, studies, capped("jobs", flags.jobs), flags.keep_models)
        files = write_outcome(sweep, studies)
    print(f"{as_text(sweep, studies)}\n\nWritten to {output_dir}: {', '.join(files)}")
