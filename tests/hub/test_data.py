"""Data sets on a Hub: trained on and evaluated by their ids."""

import json

import hub_jobs as jobs
import pytest

pytestmark = [pytest.mark.medium, pytest.mark.timeout(120)]
SMALL = [
    "--num_blocks=2", "--hidden_size=16", "--target_size=12", "--threads=1", "--use_cpu", "--max_steps=4",
    "--plots=false", "--disable_tqdm",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(hub_process, files) -> str:
    """The id of a data set with the splits train, validation and test."""
    splits = ("train", "validation", "test")
    hub_process.run(jobs.push_data, {f"{split}.csv": str(files / f"{split}.csv") for split in splits}, "tester/moods")
    return "tester/moods"


def test_a_data_set_of_a_hub_trains_the_model_of_its_files(hub, data, files, tmp_path):
    from_files = [f"--{split}_file={files / f'{split}.csv'}" for split in ("train", "validation", "test")]
    for name, flags in (("hub", [f"--dataset_name={data}"]), ("files", from_files)):
        status, _, err = hub.run(jobs.shell, "train", *SMALL, *flags, f"--output_dir={tmp_path / name}")
        assert status == 0, err
    hub_weights, file_weights = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("hub", "files"))
    assert hub_weights == file_weights


def test_a_data_set_of_a_hub_can_be_streamed(hub, data, files, tmp_path):
    stream = ["--streaming", "--eval_strategy=no"]
    from_files = [f"--{split}_file={files / f'{split}.csv'}" for split in ("train", "validation", "test")]
    for name, flags in (("hub", [f"--dataset_name={data}", *stream]), ("files", [*from_files, "--eval_strategy=no"])):
        status, _, err = hub.run(jobs.shell, "train", *SMALL, *flags, f"--output_dir={tmp_path / name}")
        assert status == 0, err
    hub_weights, file_weights = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("hub", "files"))
    assert hub_weights == file_weights


@pytest.mark.slow
def test_the_first_stage_reads_a_stream_of_a_hub_for_all(hub, data, tmp_path):
    flags = [*SMALL, f"--dataset_name={data}", "--streaming", "--eval_strategy=no"]
    for name, more in (("one", []), ("two", ["--stages=2", "--dispatch_data"])):
        status, _, err = hub.run(jobs.shell, "train", *flags, *more, f"--output_dir={tmp_path / name}")
        assert status == 0, err
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_a_model_is_evaluated_on_a_split_of_a_hub(hub, data, trained, files):
    for split in ("test", "validation"):
        by_id = hub.run(jobs.shell, "evaluate", str(trained[0]), "--dataset_name", data, "--test_split_name", split)
        by_file = hub.run(jobs.shell, "evaluate", str(trained[0]), "--test_file", str(files / f"{split}.csv"))
        assert by_id[0] == by_file[0] == 0, by_id[2]
        assert json.loads(by_id[1]) == json.loads(by_file[1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset_name=tester/moods", "--test_split_name=dev"], "Expected split 'dev' in tester/moods, got ['train"),
        (["--dataset_name=tester/nothing"], "Could not load the data set 'tester/nothing'"),
        (["--dataset_name=tester/moods", "--test_file=test.csv"], "not allowed with argument"),
        ([], "One of the arguments --test_file --dataset_name is required"),
    ],
    ids=["split", "data_set", "both", "neither"],
)
def test_data_that_is_not_there_is_one_line(flags, said, hub, data, trained):
    status, out, err = hub.run(jobs.shell, "evaluate", str(trained[0]), *flags)
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
