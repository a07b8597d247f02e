"""`hf-al study`: a set of runs from a yaml, resumable run by run, and one page on what they say. Imports happen late.

A study goes through these modules: plan.py reads its yaml, runs.py makes the runs of it and knows which are needed,
execution.py carries them out, results.py keeps their rows, summary.py and page.py say what they mean.
"""

from argparse import Namespace
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..atomic import alone_at
from ..early import check_is_no_file
from ..flags import add_file, positive
from ..parsing import FlagParser
from ..values import capped, names_in


def study_flags(parser: FlagParser) -> None:
    add_file(parser, "study", "yaml of the study: its arms, data sets, architectures and seeds")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder for what the runs leave")
    parser.add_argument("--data_dir", metavar="DIR", help="a folder for each data set (default: what the recipes name)")
    add_file(parser, "--results", "json for the row of each run, to be kept with the yaml (default: beside it)")
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="runs at the same time, of one thread each (default: 1)"
    )
    add_file(parser, "--page", "Markdown page that is written (default: study_NAME.md in the output folder)")
    parser.add_argument("--dry_run", action="store_true", help="only list the runs, and estimate how long they take")
    parser.add_argument(
        "--compare", nargs=2, metavar=("ARM", "OTHER"), help="only print how far ARM is ahead of OTHER, with intervals"
    )
    parser.add_argument("--sets", metavar="NAMES", help="with --compare: sets, with commas between (default: all)")
    add_file(parser, "--other_study", "with --compare: yaml of the study that OTHER is in (default: the same)")
    parser.add_argument("--only_page", action="store_true", help="write the page from the runs that are done, and stop")
    parser.add_argument(
        "--rerun_changed", action="store_true", help="replace rows that were made with other arguments than the yaml's"
    )
    parser.add_argument("--keep_models", action="store_true", help="keep models and checkpoints of finished runs")


def run_study(flags: Namespace) -> None:
    from .plan import read_study
    from .runs import all_runs

    study, output_dir = read_study(flags.study), Path(flags.output_dir)
    check_is_no_file(output_dir)
    if study.inside and find_spec("sklearn") is None:
        raise ValueError("Expected scikit-learn to look inside blocks, found none. Run: pip install 'hf_al[sweep]'")
    for name in ("sets", "other_study"):
        if getattr(flags, name) and not flags.compare:
            raise ValueError(f"Expected --{name} with --compare, got it alone. Leave it out.")
    runs = all_runs(study, output_dir, flags.data_dir)
    path = Path(flags.results) if flags.results else study.path.with_suffix(".json")
    with ExitStack() as stack:
        if not (flags.dry_run or flags.only_page or flags.compare):  # else two of them would keep each their own rows
            stack.enter_context(alone_at(path))
        _run(flags, study, runs, path)


def _compare(flags: Namespace, study: Any, results: Any) -> None:
    from .compare import comparison
    from .plan import read_study
    from .results import Results
    from .runs import all_runs
    from .summary import Summary

    other, others = study, results
    if flags.other_study:
        other = read_study(flags.other_study)
        runs = all_runs(other, Path(flags.output_dir), flags.data_dir)
        others = Results(other.path.with_suffix(".json"), runs)
    results.refuse_changed()
    others.refuse_changed()
    ours, theirs = Summary(study, results.rows), Summary(other, others.rows)
    print(comparison(ours, flags.compare[0], theirs, flags.compare[1], names_in(flags.sets)))


def _run(flags: Namespace, study: Any, runs: Any, path: Path) -> None:
    from .results import Results

    results, output_dir = Results(path, runs), Path(flags.output_dir)
    jobs = capped("jobs", flags.jobs)
    from .page import as_text, listing, write_page
    from .summary import Summary

    if flags.dry_run:
        print(listing(study, results, jobs))
        return
    if flags.compare:
        _compare(flags, study, results)
        return
    if flags.rerun_changed:
        results.drop_changed()
    results.refuse_changed()
    if not flags.only_page:
        from .execution import carry_out_study, check_data, check_values, quiet

        check_values(runs.values())
        with quiet():
            check_data(runs.values(), results)
        carry_out_study(study, results, jobs, flags.keep_models)
    page = Path(flags.page) if flags.page else output_dir / f"study_{study.name}.md"
    summary = Summary(study, results.rows)
    write_page(page, summary)
    print(f"{as_text(summary)}\n\nThe page: {page}")
