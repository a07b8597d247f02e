"""What a plain `hf-al train` gives on small data sets: with today's defaults, and with those of the papers.

    python recipes/benchmarks/defaults.py --data_dir FOLDER --json out/defaults.json

FOLDER has a folder for each data set (its name begins with that of the set), with train, test and optionally validation
as csv or csv.gz. Without --data_dir, the sets are Hub ids.
"""

import json
import statistics

from common import data_flags, series_parser, write_results

import hf_al
from hf_al.flags import set_up_output
from hf_al.messages import table
from hf_al.parsing import parse_arguments

PAPERS = [
    "--objective=associated", "--embedding_block=true", "--num_blocks=4", "--embedding_dropout_prob=0.1",
    "--word_vectors=none", "--early_stopping_patience=0",
]  # fmt: skip
PAPERS_LSTM = ["--initialization=xavier", "--learning_rate=1e-3"]  # as the transformer's defaults are


def main() -> None:
    parser = series_parser(__doc__, "trec6,mr,sst2", "1,2,3", "out/defaults")
    parser.add_argument("--architectures", default="al_lstm,al_transformer", help="comma-separated")
    known, more = parser.parse_known_args()  # further flags are those of hf-al train
    set_up_output()
    rows, lines, ratios = [], [], {}
    for name in known.sets.split(","):
        for architecture in known.architectures.split(","):
            accuracies: dict[str, list[float]] = {}
            papers = PAPERS + PAPERS_LSTM * (architecture == "al_lstm")
            for arm, flags in (("papers", papers), ("defaults", [])):
                for seed in known.seeds.split(","):
                    folder = f"{known.output_dir}/{name}_{architecture}_{arm}_{seed}"
                    run = [f"--model_type={architecture}", f"--seed={seed}", f"--output_dir={folder}"]
                    data = data_flags(known.data_dir, name) or [f"--dataset_name={name}"]
                    argv = [*data, *run, "--overwrite_output_dir", *flags, *more]
                    report = hf_al.train(parse_arguments(argv)).report
                    row = {"set": name, "architecture": architecture, "arm": arm, "seed": int(seed)}
                    row |= {"test": report["test"][-1]["accuracy"], "log_loss": report["test"][-1]["log_loss"]}
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    accuracies.setdefault(arm, []).append(row["test"])
            means = {arm: statistics.mean(values) for arm, values in accuracies.items()}
            lines.append({"set": name, "architecture": architecture, **means})
            ratios[f"points_gained_{name}_{architecture}"] = 100 * (means["defaults"] - means["papers"])
    print(table(lines, markdown=True))
    write_results(known.json, rows, ratios)


if __name__ == "__main__":
    main()
