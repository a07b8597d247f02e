"""Checkpoints: old or new and never a mix, by parameter name, without pickle."""

import errno
import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hooks import hook
from safetensors.torch import load_file

import hf_al
from hf_al import atomic
from hf_al.training import checkpoint, run_folder
from hf_al.training.optim import BlockOptimizers


class Broken(OSError):
    """A disk that fails."""


@pytest.fixture
def make_run(make_model):
    """A model with optimizer state, different for each seed: make_run(seed) -> (blocks, optimizers)."""

    def make(seed: int = 0, steps: int = 1):
        model = make_model(seed=seed, num_blocks=2)
        blocks = dict(enumerate(model.model.blocks))
        args = hf_al.TrainingArguments(output_dir="unused")
        optimizers = BlockOptimizers(blocks, model.config.units, args, total_steps=10)
        for step in range(steps):
            for unit in model.config.units:
                for parameter in blocks[unit[0]].parameters():
                    parameter.grad = torch.full_like(parameter, 0.1 + seed)
                optimizers.update(unit, step)
        return blocks, optimizers

    return make


def save(folder: Path, step: int, run, **manifest) -> Path:
    path = checkpoint.checkpoint_path(folder, step)
    checkpoint.save_checkpoint(path, *run, {"progress": {"step": step}, **manifest}, [{"step": step}])
    return path


@pytest.fixture
def find(make_run):
    """The checkpoint that a run would resume from: find("last" or a folder, output_dir) -> path or None."""
    blocks, _ = make_run(2)

    def fault(path: Path) -> str | None:
        try:
            checkpoint.load_checkpoint(path, blocks, None)
            checkpoint.read_history(path)
        except checkpoint.Damaged as damage:
            return damage.reason
        return None

    return lambda name, folder: run_folder.first_intact(run_folder.candidates(name, folder), fault)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def fail_at(patch: pytest.MonkeyPatch, call: int, once: bool = False) -> list[str]:
    """Makes everything that touches the disk fail from the given call on, as if the process were killed there; or, with
    `once`, only that call, as on a full disk, where deleting still works."""
    calls: list[str] = []

    def guard(owner, name):
        original = getattr(owner, name)

        def guarded(*args, **kwargs):
            calls.append(name)
            if len(calls) == call or (len(calls) > call and not once):
                raise Broken(errno.ENOSPC, name)
            return original(*args, **kwargs)

        patch.setattr(owner, name, guarded)

    guard(checkpoint, "save_file")
    guard(os, "fsync")
    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        guard(os, name)
    guard(Path, "write_text")
    return calls


def touches(make_run, folder: Path, before: int | None) -> int:
    """How often an undisturbed save of step 20 touches the disk, with a checkpoint of step `before` there."""
    if before is not None:
        save(folder, before, make_run(0))
    with pytest.MonkeyPatch.context() as patch:
        calls = fail_at(patch, 10**9)
        save(folder, 20, make_run(1))
    return len(calls)


@pytest.mark.parametrize("once", [True, False], ids=["one_call_fails", "all_later_calls_fail"])
@pytest.mark.parametrize("before", [None, 10, 20], ids=["first", "another_step", "same_step"])
def test_a_save_that_breaks_anywhere_leaves_the_old_or_the_new_checkpoint(find, before, once, make_run, tmp_path):
    old, new = make_run(0), make_run(1)
    new_content = content(save(tmp_path / "new", 20, new))
    old_content = content(save(tmp_path / "old", before or 20, old))
    calls = touches(make_run, tmp_path / "count", before)
    assert calls >= 8
    outcomes = set()
    for call in range(1, calls + 1):
        folder = tmp_path / f"broken_{call}"
        if before is not None:
            save(folder, before, old)
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, call, once)
            with suppress(Broken) if once else pytest.raises(Broken):  # a single failed deletion need not raise
                save(folder, 20, new)
        if once and before != 20:  # the disk is not left full
            assert not list((folder / "checkpoints").glob("tmp-*"))
        newest = find("last", folder)
        if newest is None:
            assert before is None, f"the old checkpoint is lost when call {call} of {calls} fails"
            outcomes.add("none")
        elif content(newest) == new_content:
            outcomes.add("new")
        else:
            assert content(newest) == old_content, f"a mix when call {call} of {calls} fails"
            outcomes.add("old")
        again = content(save(folder, 20, new))
        assert again == new_content
        run_folder.rotate(folder, 1, None)
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-00000020"]
    assert ("none" if before is None else "old") in outcomes


def test_a_text_that_breaks_while_written_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "report.json"
    for call in (1, 2):  # to the disk, and under the name
        atomic.write_atomically(path, "old")
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, call)
            with pytest.raises(Broken):
                atomic.write_atomically(path, "new" * 1000)
        assert path.read_text() == "old"
    atomic.write_atomically(path, "new")
    assert path.read_text() == "new"


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(make_run, tmp_path, monkeypatch):
    """Survives a power cut, not only a kill: bytes first, name last, then the folder that holds the name."""
    events = []
    fsync, rename = os.fsync, os.rename

    def log_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def log_rename(source, target, **kwargs):
        events.append(f"rename to {Path(target).name}")
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "rename", log_rename)
    save(tmp_path, 20, make_run())
    name = events.index("rename to checkpoint-00000020")
    assert {"block-000.safetensors", "block-001.safetensors"} <= set(events[:name])
    assert any(event.startswith("manifest.json") for event in events[:name])
    assert events[name + 1 :] == ["checkpoints"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("before", [10, 20], ids=["another_step", "same_step"])
@pytest.mark.medium
def test_a_process_that_dies_anywhere_in_a_save_leaves_the_old_or_the_new_checkpoint(find, before, make_run, tmp_path):
    """A real process that ends at its n-th touch of the disk without a chance to clean up, for every n."""
    old, new = make_run(0), make_run(1)
    new_content = content(save(tmp_path / "new", 20, new))
    calls = touches(make_run, tmp_path / "count", before)
    for call in range(1, calls + 1):
        folder = tmp_path / f"killed_{call}"
        old_content = content(save(folder, before, old))
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, call)
            patch.setattr(__name__ + ".Broken", lambda *_: os._exit(9))
            if not (child := os.fork()):
                save(folder, 20, new)
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        newest = find("last", folder)
        assert content(newest) in (old_content, new_content), f"a mix when killed at call {call} of {calls}"
        assert content(save(folder, 20, new)) == new_content
        assert {path.name for path in (folder / "checkpoints").iterdir()} <= {
            "checkpoint-00000010", "checkpoint-00000020",
        }  # fmt: skip


# --- what counts as a checkpoint


def cut_a_block_file(path: Path) -> None:
    file = path / "block-001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def remove_a_block_file(path: Path) -> None:
    (path / "block-000.safetensors").unlink()


def remove_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_the_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text()[:-20])


def empty_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("{}")


def manifest_of_another_kind(path: Path) -> None:
    (path / "manifest.json").write_text("[1, 2]")


DAMAGES = [
    cut_a_block_file, remove_a_block_file, remove_the_manifest, cut_the_manifest, empty_the_manifest,
    manifest_of_another_kind,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_incomplete_checkpoint_is_not_taken(find, damage, make_run, tmp_path):
    whole, broken = (save(tmp_path, step, make_run()) for step in (10, 20))
    damage(broken)
    assert find("last", tmp_path) == whole
    with pytest.raises(ValueError, match=r"Expected a complete checkpoint .* found none.*or 'last'"):
        find(str(broken), tmp_path)


def test_what_an_interrupted_write_left_is_not_taken(find, make_run, tmp_path):
    path = save(tmp_path, 10, make_run())
    path.rename(path.with_name("tmp-checkpoint-00000010"))
    assert find("last", tmp_path) is None


def test_what_was_to_be_replaced_gets_its_name_back_where_the_replacement_never_came(find, make_run, tmp_path):
    path = save(tmp_path, 20, make_run())
    old = content(path)
    path.rename(path.with_name("checkpoint-00000020.old"))
    assert find("last", tmp_path) == path
    assert content(path) == old


def test_a_replacement_comes_before_what_it_replaces(find, make_run, tmp_path):
    path = save(tmp_path, 20, make_run(0))
    shutil.copytree(path, path.with_name("checkpoint-00000020.old"))
    assert find("last", tmp_path) == path


def test_last_is_by_step_and_not_by_time(find, make_run, tmp_path):
    for step in (100, 20, 9):
        save(tmp_path, step, make_run())
    assert find("last", tmp_path) == checkpoint.checkpoint_path(tmp_path, 100)


def test_a_folder_that_is_no_checkpoint_is_refused(find, tmp_path):
    with pytest.raises(ValueError, match=r"Expected a complete checkpoint \(manifest.json and its block files\)"):
        find(str(tmp_path / "nowhere"), tmp_path)


@pytest.mark.parametrize("where", ["header", "length"])
def test_a_corrupt_file_of_the_right_size_says_what_to_do(where, make_run, tmp_path):
    path = save(tmp_path, 10, make_run())
    file = path / "block-001.safetensors"
    content = bytearray(file.read_bytes())
    start = {"header": 8, "length": 0}[where]
    content[start : start + 8] = b"\xff" * 8
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"got damage: .*block-001.safetensors .*Resume from an earlier checkpoint"):
        checkpoint.load_checkpoint(path, *make_run(1))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_is_an_error_that_names_the_file(make_run, tmp_path):
    path = save(tmp_path, 10, make_run())
    flip_a_bit(path / "block-001.safetensors")
    blocks, optimizers = make_run(1)
    with pytest.raises(
        ValueError, match=r"Expected an intact checkpoint, got damage: .*block-001.safetensors does not"
    ):
        checkpoint.load_checkpoint(path, blocks, optimizers)


def test_a_changed_manifest_is_no_manifest(make_run, tmp_path):
    path = save(tmp_path, 10, make_run())
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"step": 10', '"step": 11'))
    assert checkpoint.read_manifest(path) is None


def test_last_passes_over_a_flipped_bit_and_says_so(find, make_run, tmp_path, caplog):
    whole, flipped = (save(tmp_path, step, make_run()) for step in (10, 20))
    flip_a_bit(flipped / "block-000.safetensors")
    with caplog.at_level(logging.WARNING, "hf_al"):
        assert find("last", tmp_path) == whole
    assert [r.message for r in caplog.records] == [
        f"Skipping a damaged checkpoint: {flipped / 'block-000.safetensors'} does not hold the bytes that were "
        "written (sha256)."
    ]


def test_last_does_not_start_anew_over_damaged_checkpoints(find, make_run, tmp_path):
    """The user may still be able to repair them; a run from step 0 would delete them."""
    flip_a_bit(save(tmp_path, 10, make_run()) / "block-000.safetensors")
    with pytest.raises(ValueError, match=r"Expected an intact checkpoint, got damaged ones only: .*block-000"):
        find("last", tmp_path)


def test_a_format_that_looks_different_is_not_taken_for_damage(make_run, tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "checkpoint-00000001"
    path.mkdir(parents=True)
    (path / checkpoint.MANIFEST).write_text(json.dumps({"format": 9, "files": ["block-000.bin"]}))
    for open_it in (lambda: checkpoint.open_checkpoint(path), lambda: run_folder.candidates(str(path), tmp_path)):
        with pytest.raises(ValueError, match=r"Expected a checkpoint of format 3, got format 9 in .* another version"):
            open_it()


def test_a_checkpoint_of_another_format_is_refused(make_run, tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(checkpoint, "FORMAT", 1)
        path = save(tmp_path, 10, make_run())
    with pytest.raises(ValueError, match=r"Expected a checkpoint of format 3, got format 1 in .* another version"):
        checkpoint.load_checkpoint(path, make_run(1)[0], None)


def test_a_manifest_does_not_grow_with_what_was_logged(make_run, tmp_path):
    blocks, optimizers = make_run()
    sizes = []
    for rows in (1, 1000):
        path = checkpoint.checkpoint_path(tmp_path, rows)
        history = [{"step": step} for step in range(rows)]
        checkpoint.save_checkpoint(path, blocks, optimizers, {"progress": {"step": 1}}, history)
        sizes.append((path / "manifest.json").stat().st_size)
        assert checkpoint.read_history(path) == history
    assert abs(sizes[1] - sizes[0]) < 10


def test_every_file_is_read_once(make_run, tmp_path, monkeypatch):
    path = save(tmp_path, 10, make_run())
    opened: list[str] = []
    hook(monkeypatch, Path, "open", before=lambda call: opened.append(call.self.name))
    checkpoint.load_checkpoint(path, *make_run(1))
    assert [name for name in opened if name.startswith("block")] == ["block-000.safetensors", "block-001.safetensors"]


def test_weights_of_another_model_are_refused(make_run, make_model, tmp_path):
    path = save(tmp_path, 10, make_run())
    wider = make_model(num_blocks=2, hidden_size=20)
    with pytest.raises(ValueError, match=r"word_embeddings.weight has shape \[60, 16\] instead of \[60, 20\]"):
        checkpoint.load_checkpoint(path, dict(enumerate(wider.model.blocks)), None)


# --- what is in it


def test_weights_and_optimizer_state_come_back_as_they_were(make_run, tmp_path):
    blocks, optimizers = make_run(0, steps=3)
    path = save(tmp_path, 3, (blocks, optimizers), note="kept")
    other_blocks, other_optimizers = make_run(1, steps=1)
    checkpoint.load_checkpoint(path, other_blocks, other_optimizers)
    assert checkpoint.open_checkpoint(path)["note"] == "kept"
    for k in blocks:
        for name, tensor in blocks[k].state_dict().items():
            assert torch.equal(other_blocks[k].state_dict()[name], tensor), name
        state, other = optimizers.state(k), other_optimizers.state(k)
        assert state.keys() == other.keys()
        assert all(torch.equal(other[name], state[name]) for name in state)


def test_weights_alone_can_be_loaded(make_run, tmp_path):
    path = save(tmp_path, 3, make_run(0))
    blocks, optimizers = make_run(1)
    before = {name: tensor.clone() for name, tensor in optimizers.state(0).items()}
    checkpoint.load_checkpoint(path, blocks, None)
    assert all(torch.equal(optimizers.state(0)[name], before[name]) for name in before)


def test_state_is_stored_by_block_and_parameter_name(make_run, tmp_path):
    blocks, optimizers = make_run()
    path = save(tmp_path, 1, (blocks, optimizers))
    assert sorted(file.name for file in path.iterdir()) == [
        "block-000.safetensors", "block-001.safetensors", "history.json", "manifest.json",
    ]  # fmt: skip
    for k, block in blocks.items():
        names = [name for name, _ in block.named_parameters()]
        expected = {f"weight/{name}" for name in names}
        expected |= {f"optimizer/{name}/{entry}" for name in names for entry in ("exp_avg", "exp_avg_sq", "step")}
        assert set(load_file(path / f"block-{k:03d}.safetensors")) == expected


def test_a_block_loads_alone_wherever_it_is_placed(make_run, tmp_path):
    """Another stage may own one block of those that were saved together."""
    blocks, optimizers = make_run(0)
    path = save(tmp_path, 1, (blocks, optimizers))
    other, _ = make_run(1)
    args = hf_al.TrainingArguments(output_dir="unused")
    alone = BlockOptimizers({1: other[1]}, [range(1, 2)], args, total_steps=10)
    checkpoint.load_checkpoint(path, {1: other[1]}, alone)
    assert torch.equal(other[1].decode_target.weight, blocks[1].decode_target.weight)
    assert all(torch.equal(alone.state(1)[name], tensor) for name, tensor in optimizers.state(1).items())


def test_a_run_writes_nothing_pickled(few_tweets, tmp_path):
    model = {"num_blocks": 2, "hidden_size": 16, "target_size": 12}
    args = hf_al.TrainingArguments(output_dir=str(tmp_path), max_steps=4, save_steps=2, threads=1, model=model)
    hf_al.train(args, few_tweets)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files if "checkpoints" in path.parts} == {".safetensors", ".json"}
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".yaml", ".py", ".png"}
    for path in files:
        assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x04", b"PK")), path
        if path.suffix == ".json":
            json.loads(path.read_text())


# --- how many


@pytest.mark.parametrize(("keep", "best", "left"), [(2, None, [40, 50]), (2, 20, [20, 40, 50]), (1, 50, [50])])
def test_rotation_keeps_the_newest_and_the_best(keep, best, left, make_run, tmp_path):
    run = make_run()
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step, run)
    (tmp_path / "checkpoints" / "tmp-checkpoint-00000060").mkdir()
    run_folder.rotate(tmp_path, keep, best)
    expected = [checkpoint.checkpoint_path(tmp_path, step) for step in left]
    assert sorted((tmp_path / "checkpoints").iterdir()) == expected
    assert checkpoint.complete_checkpoints(tmp_path) == expected


def test_checkpoints_of_an_abandoned_future_go_and_not_the_one_just_written(make_run, tmp_path):
    """After a resume from step 20 while checkpoints up to 50 exist, `last` must find step 30 of the new run."""
    run = make_run()
    for step in (20, 40, 50, 30):
        save(tmp_path, step, run)
    run_folder.rotate(tmp_path, 1, 20, step=30)
    expected = [checkpoint.checkpoint_path(tmp_path, step) for step in (20, 30)]
    assert checkpoint.complete_checkpoints(tmp_path) == expected


def test_rotation_that_breaks_leaves_the_newest_and_the_best(make_run, tmp_path, monkeypatch):
    run = make_run()
    for step in (10, 20, 30, 40):
        save(tmp_path, step, run)

    def delete_a_part(path, **kwargs):
        next(iter(path.iterdir())).unlink()
        raise Broken

    monkeypatch.setattr(shutil, "rmtree", delete_a_part)
    with pytest.raises(Broken):
        run_folder.rotate(tmp_path, 1, 20)
    kept = checkpoint.complete_checkpoints(tmp_path)
    assert {checkpoint.checkpoint_path(tmp_path, step) for step in (20, 40)} <= set(kept)


def test_what_a_broken_rotation_left_is_cleared_by_the_next(make_run, tmp_path):
    run = make_run()
    for step in (10, 20, 30):
        save(tmp_path, step, run)
    (checkpoint.checkpoint_path(tmp_path, 10) / "manifest.json").unlink()
    run_folder.rotate(tmp_path, 1, None)
    assert list((tmp_path / "checkpoints").iterdir()) == [checkpoint.checkpoint_path(tmp_path, 30)]


def test_a_run_keeps_as_many_checkpoints_as_asked(few_tweets, tmp_path):
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, save_steps=2, save_total_limit=3, threads=1, eval_strategy="no",
        model={"num_blocks": 2, "hidden_size": 16, "target_size": 12},
    )  # fmt: skip
    hf_al.train(args, few_tweets)
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["checkpoint-00000008", "checkpoint-00000010", "checkpoint-00000012"]
