"""Shared by all tests: no network, one cache for the run, small real text."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

_cache = tempfile.mkdtemp(prefix="hf_al_tests_")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=_cache,
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)
if "HF_AL_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # shells start background processes like this
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from datasets import DatasetDict
from filelock import FileLock
from program import Program
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

import hf_al
from hf_al import plots
from hf_al.cli import main
from hf_al.data import sources
from hf_al.modeling import objectives
from hf_al.training import checkpoint

# All of them, so that a new one is tested without being named here
ARCHITECTURES = tuple(hf_al.MODEL_CLASSES)
FROM_SCRATCH = tuple(name for name in ARCHITECTURES if name != "al_encoder")
EVERY_OBJECTIVE = tuple(objectives.OBJECTIVES)
OBJECTIVES = tuple(n for n in EVERY_OBJECTIVE if n not in ("supcon", "deinfo"))  # predsim does all that they do
TINY_ENCODER = {
    "model_type": "bert", "vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 128,
}  # fmt: skip


def slow(*values):
    """A case that differs from a quick one in little: `make test-slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def in_own_mounts(folder: Path) -> list[str]:
    """What to put before a command that mounts something: its mounts end with it. Skips where that is not allowed;
    `folder` is for a trial."""
    alone = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    mount = [*alone, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this container allows no mount, not even in a namespace of its own")
    return alone


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors are faster on one thread, and rounding is the same for all tests."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Sketch:
    """Stands in for a figure: writes a file where the plot would be."""

    def savefig(self, path: Path) -> None:
        path.write_bytes(b"a plot")


@pytest.fixture(scope="module", autouse=True)
def _sketches(request):
    """Drawing takes most of a short run's time: only tests of plots draw."""
    if request.module.__name__ == "test_report":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "PLOTS", {"losses": lambda report: Sketch()})
        yield


@pytest.fixture(scope="session")
def tweets() -> DatasetDict:
    """The embedded tweets: splits train, validation and test with columns text and label (string)."""
    return sources.load_tweets()


@pytest.fixture(scope="session")
def few_tweets(tweets) -> DatasetDict:
    """A few hundred of them, quick to train on."""
    sizes = {"train": 400, "validation": 80, "test": 80}
    return DatasetDict({name: tweets[name].select(range(size)) for name, size in sizes.items()})


@pytest.fixture(scope="session")
def tweet_files(few_tweets, tmp_path_factory) -> list[str]:
    """The flags that name them as files: --train_file=..., --validation_file=..., --test_file=..."""
    folder = tmp_path_factory.mktemp("tweets")
    for split in few_tweets:
        few_tweets[split].to_json(folder / f"{split}.jsonl")
    return [f"--{split}_file={folder / f'{split}.jsonl'}" for split in few_tweets]


@pytest.fixture
def make_model():
    """A tiny model: make_model("al_lstm", objective="al_ce", num_blocks=3, ...)."""

    def make(model_type: str = "al_lstm", seed: int = 0, **config):
        config_class, _, model_class = hf_al.MODEL_CLASSES[model_type]
        values = {"vocab_size": 60, "hidden_size": 16, "target_size": 12, "num_blocks": 3, "num_labels": 3}
        values |= {"objective": "associated", "embedding_block": True, "initialization": "xavier"}
        if model_type == "al_transformer":
            values["num_attention_heads"] = 2
        if model_type == "al_encoder":
            dropout = config.get("hidden_dropout_prob", 0.1)
            values["encoder_config"] = {
                **TINY_ENCODER,
                "num_hidden_layers": 2 * config.get("num_blocks", 3),
                "hidden_dropout_prob": dropout,
                "attention_probs_dropout_prob": dropout,
                **{name: config[name] for name in TINY_ENCODER if name in config},
            }
        torch.manual_seed(seed)
        return model_class(config_class(**{**values, **config}))

    return make


def pair_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Of these words, with token types for pairs."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = [*special.values(), *words]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    reads = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, model_input_names=reads, **special)


@pytest.fixture(scope="session")
def encoder_folder(few_tweets, tmp_path_factory):
    """A tiny BERT with a tokenizer of the tweets' most frequent words."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = pair_tokenizer(sorted({w for t in few_tweets["train"]["text"] for w in t.split()}))
    tokenizer.save_pretrained(folder)
    sizes = {**TINY_ENCODER, "num_hidden_layers": 5, "vocab_size": len(tokenizer)}
    AutoModel.from_config(AutoConfig.for_model(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def make_batch():
    """Ragged token ids with mask and labels: make_batch(rows=4, tokens=7) -> dict of tensors."""

    def make(rows: int = 4, tokens: int = 7, classes: int = 3, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(1, 60, (rows, tokens), generator=generator)
        lengths = torch.randint(2, tokens + 1, (rows,), generator=generator)
        lengths[0] = tokens
        mask = (torch.arange(tokens) < lengths[:, None]).long()
        labels = torch.randint(0, classes, (rows,), generator=generator)
        return {"input_ids": input_ids * mask, "attention_mask": mask, "labels": labels}

    return make


# --- a Hub


@pytest.fixture(scope="session")
def hub_process(tmp_path_factory):
    """A Hub on loopback, and a client process that knows it."""
    import hub_jobs as jobs
    from server import TOKEN, serve_in_thread

    endpoint, server, app = serve_in_thread(tmp_path_factory.mktemp("hub"))
    home = tmp_path_factory.mktemp("home")
    values = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("HF_HUB_OFFLINE")
            for name, value in values.items():
                patch.setenv(name, value)
            pool.submit(jobs.set_token, TOKEN).result(100)  # starts it, with this environment

        def run(job, *args, **options):
            return pool.submit(job, *args, **options).result(100)

        yield SimpleNamespace(run=run, state=app.state, endpoint=endpoint, environment=values)
        server.should_exit = True


@pytest.fixture
def hub(hub_process, tmp_path):
    """The Hub, with an empty cache, a token and no faults: hub.run(job, ...), hub.state, hub.endpoint."""
    import hub_jobs as jobs
    from server import TOKEN

    hub_process.state.log.clear()
    hub_process.state.faults.clear()
    hub_process.run(jobs.set_token, TOKEN)
    hub_process.run(jobs.cold_cache, str(tmp_path / "cache"))
    return hub_process


# --- the command line


def run_program(*argv: str, **options) -> subprocess.CompletedProcess:
    """`hf-al ARGV` in a process of its own."""
    program = [str(Path(sys.executable).with_name("hf-al")), *argv]
    return subprocess.run(program, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def start():
    """Starts `hf-al ARGV` and ends it after the test: start("train", ..., log=None) -> Program."""
    started = []

    def run(*argv: str, log: Path | None = None) -> Program:
        started.append(Program(*argv, log=log))
        return started[-1]

    yield run
    for process in started:
        process.end()


def wait_for_a_checkpoint(process, output_dir: Path, log: Path, seconds: float = 120) -> None:
    """Waits until the run in `process`, whose messages go to `log`, has written one; it must not end before."""
    deadline = time.monotonic() + seconds
    while not checkpoint.complete_checkpoints(output_dir):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def shell(capsys):
    """`hf-al ARGV` in this process: shell("train", ...) -> (exit status, standard output, standard error)."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = 0
        try:
            main(list(argv))
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="session")
def files(few_tweets, tmp_path_factory) -> Path:
    """train.csv, validation.csv and test.csv of real tweets."""
    folder = tmp_path_factory.mktemp("data")
    for split, rows in few_tweets.items():
        rows.map(lambda row: {"text": " ".join(row["text"].split())}).to_csv(folder / f"{split}.csv", index=False)
    return folder


@pytest.fixture(scope="session")
def trained(files, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A model of two blocks that `hf-al train` left, and what the process said: (folder, completed process). The first
    worker that needs it makes it for all."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder, said = shared / "trained" / "run", shared / "trained.json"
    with FileLock(shared / "trained.lock"):
        if not said.exists():
            data = [f"--{split}_file={files / f'{split}.csv'}" for split in ("train", "validation", "test")]
            small = ["--hidden_size=16", "--num_blocks=2", "--target_size=12", "--max_steps=20", "--threads=1"]
            done = run_program("train", *data, *small, "--use_cpu", f"--output_dir={folder}")
            assert done.returncode == 0, done.stderr
            said.write_text(json.dumps([done.args, done.returncode, done.stdout, done.stderr]))
    return folder, subprocess.CompletedProcess(*json.loads(said.read_text()))


def assert_mistake(result: tuple[int, str, str], *said: str) -> None:
    status, out, err = result
    assert status == 2, err
    assert out == ""
    assert err.startswith("hf-al")
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    for words in said:
        assert words in err
