"""The stream: any number of stages gives the same bits; nothing goes back; disturbances are noticed."""

import json
import shutil
import signal
from pathlib import Path

import jobs
import pytest
from conftest import slow
from runs import CASES, FLAGS, STEPS, alone, run_flags, sha256
from world import run_world

from hf_al.training import checkpoint

pytestmark = pytest.mark.medium


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_200_steps_on_all_tweets_give_the_same_bits(case, run_flags, tmp_path):
    more = ["--dataset_name=tweets", "--max_steps=200", "--max_train_samples=100000", "--eval_steps=100"]
    found = []
    for stages in (1, 2, 3):
        flags = [f for f in run_flags(case, stages, tmp_path / f"{stages}", *more) if "_file=" not in f]
        run_world(stages, jobs.train, flags, timeout=300)
        found.append(sha256(tmp_path / f"{stages}", 200))
    assert found[0] == found[1] == found[2]


@pytest.mark.slow  # the first one reads it for all below
def test_stages_that_each_read_a_stream_give_the_same_bits(run_flags, tmp_path):
    found = []
    for stages in (1, 2):
        folder = tmp_path / f"{stages}"
        flags = run_flags("lstm_al_ce", stages, folder, "--streaming", "--streaming_buffer_size=100")
        run_world(stages, jobs.train, flags)
        found.append(sha256(folder))
    assert found[0] == found[1]


KINDS = {
    "multi_label": lambda row: {"label": [row["label"]] + ["short"] * (len(row["text"]) < 70)},
    "regression": lambda row: {"label": len(row["text"]) / 7},
    "pairs": lambda row: {"text": row["text"][:40], "text_pair": row["text"][40:] or "nothing"},
}


@pytest.mark.parametrize(
    ("case", "stages"),
    [
        slow("lstm_associated_state", 4), slow("lstm_associated_state", 2), slow("lstm_associated_state", 3),
        slow("lstm_al_ce", 3), slow("lstm_al_ce", 2), slow("lstm_al_ce", 4),
        slow("transformer_associated", 2), slow("transformer_associated", 3), slow("transformer_associated", 4),
        ("transformer_al_ce_plateau_sparse", 3), slow("transformer_al_ce_plateau_sparse", 2),
        slow("transformer_al_ce_plateau_sparse", 4),
    ],
)  # fmt: skip
def test_any_number_of_stages_gives_the_same_bits(case, stages, run_flags, alone, tmp_path):
    expected = alone(case)
    counts = run_world(stages, jobs.train, run_flags(case, stages, tmp_path / "run"))
    assert sha256(tmp_path / "run") == expected
    assert len(expected) >= 7
    ranks = [stages - 1 - stage for stage in range(stages)]
    assert [c["sent_to"] for c in counts] == [{rank - 1} if rank else set() for rank in ranks], "forward only"
    assert all(c["received_bytes"] > 1e5 for c in counts[1:])
    assert [c["told_bytes"] for c in counts[:-1]] == [0] * (stages - 1), "words back come from the last stage alone"
    words = counts[-1]["told_bytes"] - len(json.dumps(counts[-1]["report"]))
    assert words < 5000, "verdicts, and what is in the best checkpoint; at the end the report"


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        slow("multi_label", "lstm_al_ce"),
        slow("regression", "transformer_associated"),
        slow("pairs", "lstm_associated_state"),
    ],
)
def test_labels_and_texts_of_every_kind_stream(kind, case, run_flags, few_tweets, tmp_path):
    files = []
    for split, rows in few_tweets.items():
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps({**row, **KINDS[kind](row)}) + "\n" for row in rows), encoding="utf-8")
        files.append(f"--{split}_file={path}")
    for stages in (1, 3):
        run_world(stages, jobs.train, run_flags(case, stages, tmp_path / f"{stages}", *files))
        assert sha256(tmp_path / f"{stages}") == sha256(tmp_path / "1")


@pytest.mark.parametrize("more", [slow([]), ["--dispatch_data", "--streaming", "--streaming_buffer_size=100"]])
def test_numbers_beside_the_text_give_the_same_bits(more, run_flags, few_tweets, tmp_path):
    files = []
    for split, rows in few_tweets.items():
        path = tmp_path / f"{split}.jsonl"
        values = ({"length": len(row["text"]) if i % 9 else None} for i, row in enumerate(rows))
        path.write_text("".join(json.dumps({**r, **v}) + "\n" for r, v in zip(rows, values, strict=True)))
        files.append(f"--{split}_file={path}")
    for stages in (1, 2):
        flags = ["--numeric_column_names=length", "--numeric_block=2", "--text_column_names=text", "--max_steps=30"]
        flags = run_flags("lstm_al_ce", stages, tmp_path / f"{stages}", *files, *flags, *more)
        run_world(stages, jobs.train, flags)
    assert sha256(tmp_path / "1", 30) == sha256(tmp_path / "2", 30)


@pytest.mark.parametrize("more", [[], slow(["--lora_r=2"])], ids=["whole", "lora"])
def test_a_pretrained_encoder_streams(more, encoder_folder, tweet_files, tmp_path):
    decided = ("--hidden_size", "--hidden_dropout", "--embedding_dropout")
    flags = [
        *tweet_files,
        *(flag for flag in FLAGS if not flag.startswith(decided)),
        f"--encoder={encoder_folder}",
        "--lookahead=1",
    ]
    for stages in (1, 3):
        where = [f"--stages={stages}", f"--output_dir={tmp_path / str(stages)}"]
        run_world(stages, jobs.train, [*flags, *more, "--max_steps=20", *where])
    assert sha256(tmp_path / "3") == sha256(tmp_path / "1")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--objective=local_similarity"], slow(["--model_type=al_conv"])])
def test_an_objective_and_an_encoder_of_a_users_own_stream(flags, run_flags, tmp_path):
    """Those of the documentation: they do not declare what they send."""
    for stages in (1, 3):
        run_world(stages, jobs.train_own, run_flags("lstm_al_ce", stages, tmp_path / f"{stages}", *flags))
        assert sha256(tmp_path / f"{stages}") == sha256(tmp_path / "1")


@pytest.mark.slow
def test_running_statistics_see_no_throw_away_batch(run_flags, tmp_path):
    for stages in (1, 2):
        run_world(stages, jobs.train_with_statistics, run_flags("lstm_al_ce", stages, tmp_path / f"{stages}"))
    assert sha256(tmp_path / "1") == sha256(tmp_path / "2")


def test_a_program_may_train_twice(run_flags, tmp_path):
    flags = [f for f in run_flags("lstm_al_ce", 2, tmp_path) if "output_dir" not in f]
    run_world(2, jobs.train_twice, str(tmp_path), [*flags, "--max_steps=10"])
    first, second = (sha256(tmp_path / str(seed), 10) for seed in (1, 2))
    assert first != second


def test_the_model_is_merged_without_the_optimizer_state_of_other_stages(run_flags, tmp_path):
    found = run_world(2, jobs.read_by_the_last_stage, run_flags("lstm_al_ce", 2, tmp_path / "run"))
    assert len(found[1]["read"]) > 10
    assert not [name for name in found[1]["read"] if name.startswith(checkpoint.OPTIMIZER)]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], slow(["--replicas=2", "--gradient_accumulation_steps=1"])], ids=["1", "2"])
def test_processes_that_share_no_folder_leave_the_bytes_of_one(more, run_flags, alone, tmp_path):
    """As on several machines; also after one of them has failed. Only the last stage's folder has any files."""
    processes = 2 * (1 + bool(more))
    folders = [str(tmp_path / str(process)) for process in range(processes)]
    for folder in folders:
        Path(folder).mkdir()
    flags = [f for f in run_flags("lstm_al_ce", 2, tmp_path) if "output_dir" not in f]
    flags += [*more, "--output_dir=run", "--resume_from_checkpoint=last", "--trace=3"]
    said = run_world(processes, jobs.in_folders_of_their_own, folders, "dies", "in a step", "error", flags, check=False)
    assert "ValueError: Died on purpose" in said[0]
    assert (Path(folders[-1]) / "run" / "checkpoints").is_dir()
    run_world(processes, jobs.in_folders_of_their_own, folders, "train", flags)
    events = json.loads((Path(folders[-1]) / "run" / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == set(range(processes))
    (Path(folders[-1]) / "run" / "trace.json").unlink()
    if more:
        run_world(2, jobs.train, [*flags, "--stages=1", f"--output_dir={tmp_path / 'shared'}"])
        (tmp_path / "shared" / "trace.json").unlink()
    expected = sha256(tmp_path / "shared") if more else alone("lstm_al_ce")
    assert sha256(Path(folders[-1]) / "run") == expected
    assert not [path for folder in folders[:-1] for path in Path(folder).rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--streaming", "--streaming_buffer_size=150"]], ids=["whole", "streamed"])
def test_data_that_only_the_first_stage_finds_gives_the_same_bits(more, run_flags, tmp_path):
    """Also after a failure."""
    more = ["--dispatch_data", "--resume_from_checkpoint=last", *more]
    flags = [*run_flags("lstm_al_ce", 3, tmp_path / "three"), *more]
    folders = [tmp_path / str(stage) for stage in range(3)]
    for folder in folders:
        folder.mkdir()
    for i, (flag, path) in enumerate(flag.split("=") for flag in flags if "_file=" in flag):
        shutil.copy(path, folders[0])
        flags[i] = f"{flag}={Path(path).name}"
    said = run_world(3, jobs.in_folders_of_their_own, folders, "dies", "in a step", "error", flags, check=False)
    assert "ValueError: Died on purpose" in said[0]
    run_world(3, jobs.in_folders_of_their_own, folders, "train", flags)
    assert not list(folders[1].iterdir())
    one = [*flags, "--stages=1", f"--output_dir={tmp_path / 'one'}"]
    run_world(1, jobs.in_folders_of_their_own, folders, "train", one)
    assert sha256(tmp_path / "three") == sha256(tmp_path / "one")


def test_a_signal_stops_stages_that_wait_for_rows(run_flags, tmp_path):
    """The first stage stops before it reads the window that the others would need next."""
    more = ["--dispatch_data", "--streaming", "--streaming_buffer_size=8", "--gradient_accumulation_steps=1"]
    flags = [*run_flags("lstm_al_ce", 2, tmp_path / "run"), *more, "--ddp_timeout=20"]
    said = run_world(2, jobs.signalled_in_step, signal.SIGTERM, 20, 0, flags, timeout=15)
    assert said[0] == said[1]
    assert said[0][0] == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("how", ["damaged", "other format", "other model"])
def test_a_checkpoint_that_goes_over_the_wire_is_checked(how, run_flags, alone, tmp_path):
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    flags = [f for f in run_flags("lstm_al_ce", 2, tmp_path) if "output_dir" not in f]
    flags += ["--output_dir=run", "--resume_from_checkpoint=last", "--ddp_timeout=20"]
    run_world(2, jobs.in_folders_of_their_own, folders, "dies", "in a step", "error", flags, check=False)
    newest = checkpoint.complete_checkpoints(folders[1] / "run")[-1]
    if how == "damaged":
        block = newest / "block-000.safetensors"
        block.write_bytes(block.read_bytes()[:-1] + b"x")
        run_world(2, jobs.in_folders_of_their_own, folders, "train", flags)
        assert sha256(folders[1] / "run") == alone("lstm_al_ce")
        return
    expected = "Expected the model of"
    if how == "other format":
        manifest = json.loads((newest / "manifest.json").read_text())
        (newest / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
        expected = f"Expected a checkpoint of format {checkpoint.FORMAT}, got format 1"
    more = [] if how == "other format" else ["--hidden_size=20"]
    said = run_world(2, jobs.in_folders_of_their_own, folders, "train", [*flags, *more], check=False, timeout=15)
    assert any(f"ValueError: {expected}" in words for words in said)
    assert any(words.splitlines()[-1] == "SystemExit: 2" for words in said)


def test_data_that_the_first_stage_cannot_read_is_one_message(run_flags, tmp_path):
    flags = [f for f in run_flags("lstm_al_ce", 2, tmp_path / "run") if "_file=" not in f]
    (tmp_path / "bad.csv").write_text("text,label\n")
    flags += ["--dispatch_data", f"--train_file={tmp_path / 'bad.csv'}"]
    said = run_world(2, jobs.train, flags, check=False)
    assert f"ValueError: Expected rows in {tmp_path / 'bad.csv'}, got only a header." in said[0]
    assert said[1].splitlines()[-1] == "SystemExit: 2"


@pytest.mark.slow
def test_stages_go_on_from_one_trained_model(run_flags, tmp_path):
    for seed, name in enumerate(["first", "other"]):
        more = ["--max_steps=5", f"--seed={seed}", "--eval_strategy=no"]
        flags = [f for f in run_flags("lstm_al_ce", 1, tmp_path / name, *more) if "eval_steps" not in f]
        run_world(1, jobs.train, flags)
    more = [f"--model_name_or_path={tmp_path / 'first'}", "--max_steps=30"]
    for stages in (1, 3):
        run_world(stages, jobs.train, run_flags("lstm_al_ce", stages, tmp_path / f"{stages}", *more))
    assert sha256(tmp_path / "1", 30) == sha256(tmp_path / "3", 30)
    other = [f"--model_name_or_path={tmp_path / 'other'}"]
    given = run_flags("lstm_al_ce", 2, tmp_path / "no", *more)
    said = run_world(2, jobs.other_flags_at_the_first_stage, other, given, check=False)
    assert "Expected the same run in all processes, got another at stage 0: first weights is" in said[1], said[1]
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--wire_dtype=bf16"], slow(["--bf16"])])
def test_a_narrow_wire_rounds_in_every_placement(more, run_flags, alone, tmp_path):
    counts = {}
    for stages in (1, 2):
        counts[stages] = run_world(
            stages, jobs.train, run_flags("transformer_associated", stages, tmp_path / f"{stages}", *more)
        )
    assert sha256(tmp_path / "1") == sha256(tmp_path / "2")
    assert sha256(tmp_path / "1")["model.safetensors"] != alone("transformer_associated")["model.safetensors"]


@pytest.mark.slow
def test_early_stopping_is_one_decision(run_flags, tmp_path):
    more = ["--early_stopping_patience=1", "--eval_steps=5", "--learning_rate=1e-6"]
    for stages in (1, 3):
        run_world(stages, jobs.train, run_flags("lstm_al_ce", stages, tmp_path / f"{stages}", *more))
    reports = [json.loads((tmp_path / f"{stages}" / "report.json").read_text()) for stages in (1, 3)]
    assert reports[0]["steps"] == reports[1]["steps"] < STEPS
    assert reports[0]["test"] == reports[1]["test"]
    goes_on = ["--resume_from_checkpoint=last", "--early_stopping_patience=99"]
    for stages in (1, 2):
        folder = tmp_path / ("3" if stages == 2 else "whole")
        run_world(stages, jobs.train, run_flags("lstm_al_ce", stages, folder, *more, *goes_on))
    assert sha256(tmp_path / "3") == sha256(tmp_path / "whole")


@pytest.mark.slow
def test_the_report_of_several_stages_is_that_of_one_and_shows_what_each_did(run_flags, tmp_path):
    """Except for times, memory and names of the machine."""
    for stages in (1, 3):
        flags = run_flags("transformer_associated", stages, tmp_path / f"{stages}", "--trace=30")
        run_world(stages, jobs.train, flags)
    reports = [json.loads((tmp_path / f"{stages}" / "report.json").read_text()) for stages in (1, 3)]
    work = reports[1]["processes"]
    for report in reports:
        for row in report["history"]:
            row.pop("examples_per_second", None)
            row.pop("peak_memory_mib", None)
        for name in ("speed", "exit_speeds", "machine", "placement", "processes", "arguments"):
            del report[name]
    assert reports[0] == reports[1]
    assert [row["process"] for row in work] == ["stage 0", "stage 1", "stage 2"]
    assert all(0 < row["wait"] < 1 and row["busy"] == 1 - row["wait"] for row in work[1:])
    assert all(row["sent_mib"] > 0.1 for row in work[:-1])
    assert work[-1]["sent_mib"] == 0
    assert "| stage 1 | " in (tmp_path / "3" / "report.md").read_text()
    events = json.loads((tmp_path / "3" / "trace.json").read_text())["traceEvents"]
    batches = {(e["pid"], e["args"]["step"]): e for e in events if e["name"].startswith("batch ")}
    assert len(batches) == 3 * 30
    early = [batches[0, n + 1]["ts"] < batches[1, n]["ts"] + batches[1, n]["dur"] for n in range(2, 30)]
    assert sum(early) > 14, "stage 0 begins a batch while stage 1 is still on the one before"


@pytest.mark.slow
def test_offloaded_stages_give_the_same_bits(run_flags, alone, tmp_path):
    run_world(2, jobs.train, run_flags("lstm_al_ce", 2, tmp_path / "run", "--offload"))
    assert sha256(tmp_path / "run") == alone("lstm_al_ce")


def test_stages_compute_frozen_blocks_once(run_flags, tmp_path):
    more, found = ["--frozen_blocks=2", "--cache_frozen", "--max_steps=33"], []
    for stages, placement in ((1, "equal"), (3, "0,1,2-3")):
        flags = run_flags("lstm_al_ce", stages, tmp_path / f"{stages}", *more, f"--placement={placement}")
        run_world(stages, jobs.train, flags)
        found.append(sha256(tmp_path / f"{stages}", 33))
    assert found[0] == found[1]


def test_stages_grow_a_model_like_one_process(run_flags, tmp_path):
    """One stage learns nothing at all."""
    small = run_flags("lstm_al_ce", 1, tmp_path / "small", "--num_blocks=2", "--max_steps=20")
    run_world(1, jobs.train, small)
    more, found = [f"--model_name_or_path={tmp_path / 'small'}", "--frozen_blocks=2", "--freeze=blocks"], []
    for stages, placement in ((1, "equal"), (3, "0,1-2,3")):
        flags = run_flags("lstm_al_ce", stages, tmp_path / f"{stages}", *more, "--max_steps=33")
        run_world(stages, jobs.train, [*flags, f"--placement={placement}"])
        found.append(sha256(tmp_path / f"{stages}", 33))
    assert found[0] == found[1]


def test_a_boundary_sent_after_the_update_is_noticed(run_flags, alone, tmp_path):
    run_world(2, jobs.sends_after_the_update, run_flags("lstm_al_ce", 2, tmp_path / "run"))
    assert sha256(tmp_path / "run")["model.safetensors"] != alone("lstm_al_ce")["model.safetensors"]


def test_the_wrong_batch_is_noticed(run_flags, tmp_path):
    flags = run_flags("lstm_al_ce", 2, tmp_path / "run")
    said = run_world(2, jobs.another_order_at_the_first_stage, flags, check=False)
    assert "RuntimeError: Stage 1 expected Message(kind='train', step=0" in said[1]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--seed=43", "seed is 42 in the main process and 43 there"),
        ("--wire_dtype=bf16", "wire_dtype is 'float32' in the main process and 'bf16' there"),
        ("--target_size=13", "target_size is 12 in the main process and 13 there"),
        ("--learning_rate=0.5", "learning_rate is 0.005 in the main process and 0.5 there"),
        ("--logging_steps=7", "logging_steps is 5 in the main process and 7 there"),
        ("--placement=0,1-3", "placement is 'equal' in the main process and '0,1-3' there"),
        ("--resume_from_checkpoint=last", "resume_from_checkpoint is None in the main process and 'last' there"),
        ("--output_dir=elsewhere", "and 'elsewhere' there"),
    ],
)
def test_a_process_that_was_started_otherwise_is_refused_by_name(flag, message, run_flags, tmp_path):
    given = run_flags("lstm_al_ce", 2, tmp_path / "run")
    said = run_world(2, jobs.other_flags_at_the_first_stage, [flag], given, check=False)
    assert "Expected the same arguments in all processes, got another at stage 0: " in said[1]
    assert message in said[1]
    assert said[0].splitlines()[-1] == "SystemExit: 2"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_process_with_another_file_is_refused_by_the_split(split, run_flags, few_tweets, tmp_path):
    other = tmp_path / "other.jsonl"
    few_tweets[split].map(lambda row: {"text": row["text"] + "!"}).to_json(other)
    given = run_flags("lstm_al_ce", 2, tmp_path / "run")
    said = run_world(2, jobs.other_flags_at_the_first_stage, [f"--{split}_file={other}"], given, check=False)
    assert f"Expected the same data in all processes, got another at stage 0: {split} is" in said[1]
    assert said[0].splitlines()[-1] == "SystemExit: 2"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--train_file=no.csv", "no.csv"),
        ("--objective=backprop", "Expected a local objective with --stages 2, got backprop"),
        ("--placement=0-1", "the blocks 0 to 3 of 2 stages, each block once and in order, got '0-1'"),
    ],
)
def test_a_mistake_in_all_processes_is_said_by_one(flag, message, run_flags, tmp_path):
    said = run_world(2, jobs.train, run_flags("lstm_al_ce", 2, tmp_path / "run", flag), check=False)
    assert message in said[1].splitlines()[-1]
    assert said[0].splitlines()[-1] == "SystemExit: 2"
    assert not (tmp_path / "run").exists()
