"""Atomic writes: failed or killed at any step, files are the old or the new version, and unrelated files are unchanged."""

import errno
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from promcse_pl.utils.errors import AdapterError, DataError
from promcse_pl.utils.files import (
    COMMIT,
    atomic_file,
    current,
    new_folder,
    publish,
    read_unchanged,
    refuse_taken,
    refuse_unwritable,
    remove_leftovers,
    staging_folder,
    update_folder,
    write_text,
)

STEPS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir")
"""Audit events of the calls that change the disk or look at it."""
OWN = ["about.json", "weights.bin", "encoder", "stale.bin"]
FOREIGN = {"README.md": "mine", ".git/HEAD": "ref: refs/heads/main", "encoder.txt": "notes"}


def in_child(action, step: int, how: str) -> int:
    """Run `action` in a forked process that fails or is killed at its `step`-th call to the disk; return the exit status.

    0: it finished with fewer calls; 1: it raised a DataError; 3: it finished although the call failed; -9: it was killed.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        calls = 0

        def hook(event, _arguments):
            nonlocal calls
            if event in STEPS:
                calls += 1
                if calls == step:
                    if how == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        sys.addaudithook(hook)
        try:
            action()
        except DataError:
            os._exit(1)
        except BaseException:
            os._exit(2)
        os._exit(3 if calls >= step else 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fill(folder: Path, version: str) -> None:
    (folder / "about.json").write_text(version)
    (folder / "weights.bin").write_text(version)
    (folder / "encoder").mkdir()
    (folder / "encoder/config.json").write_text(version)


def update(folder: Path, version: str) -> None:
    with update_folder(folder, OWN) as staged:
        fill(staged, version)


def versions(folder: Path) -> set[str]:
    encoder = current(folder, "encoder")
    paths = (current(folder, "about.json"), current(folder, "weights.bin"), encoder / "config.json")
    return {path.read_text() for path in paths}


def foreign(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in FOREIGN}


@pytest.fixture
def old_folder(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    fill(folder, "old")
    (folder / "stale.bin").write_text("of an earlier kind")
    for name, text in FOREIGN.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("how", ["kill", "fail"])
@pytest.mark.parametrize("existing", [True, False], ids=["update", "first"])
def test_a_folder_is_the_old_or_new_version_if_any_step_of_an_update_fails(how, existing, tmp_path):
    outcomes = []
    for step in range(1, 200):
        folder = tmp_path / str(step)
        if existing:
            folder.mkdir()
            fill(folder, "old")
            for name, text in FOREIGN.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
        code = in_child(lambda folder=folder: update(folder, "new"), step, how)
        assert code in ((0, 1, 3) if how == "fail" else (0, -signal.SIGKILL))
        if existing:
            found = versions(folder)
            assert found in ({"old"}, {"new"}), f"a mixture after step {step}"
            assert foreign(folder) == FOREIGN
        else:
            found = versions(folder) if folder.exists() and any(folder.iterdir()) else {"old"}
        assert found == {"new"} if code in (0, 3) else True
        outcomes.append(*found)
        update(folder, "next")
        assert versions(folder) == {"next"}
        assert {path.name for path in folder.iterdir()} - {"README.md", ".git", "encoder.txt"} == set(OWN[:3])
        if code == 0:
            break
    assert code == 0, "some step must be the last"
    assert set(outcomes) == {"old", "new"}
    print(
        f"\n{len(outcomes) - 1} steps {'failed' if how == 'fail' else 'killed'}, {outcomes.count('new')} after the commit"
    )


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_file_is_the_old_or_new_version_if_any_step_of_a_write_fails(how, tmp_path):
    path = tmp_path / "status.json"
    for step in range(1, 50):
        path.write_text("old")
        code = in_child(lambda: write_text(path, "new"), step, how)
        assert path.read_text() == "new" if code in (0, 3) else path.read_text() in ("old", "new")
        if code == 0:
            break
        assert how == "kill" or [entry.name for entry in tmp_path.iterdir()] == ["status.json"], "leftovers"
    assert code == 0
    assert step > 3


def test_an_update_keeps_foreign_files_and_removes_own_ones_that_are_gone(old_folder):
    update(old_folder, "new")
    assert versions(old_folder) == {"new"}
    assert foreign(old_folder) == FOREIGN
    assert not (old_folder / "stale.bin").exists()
    assert not (old_folder / COMMIT).exists()


def test_an_empty_folder_is_filled_and_not_replaced_since_it_may_be_a_mount_a_link_or_the_current_folder(
    tmp_path, monkeypatch
):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    update(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert versions(tmp_path / "real") == {"new"}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    update(Path(), "new")
    assert versions(Path()) == {"new"}
    assert versions(tmp_path / "here") == {"new"}


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_first_save_into_an_empty_folder_that_was_killed_can_be_repeated(how, tmp_path):
    for step in range(1, 200):
        folder = tmp_path / str(step)
        folder.mkdir()
        code = in_child(lambda folder=folder: update(folder, "new"), step, how)
        if not os.path.lexists(current(folder, "about.json")):
            refuse_taken(folder)  # leftovers do not count as other content
        update(folder, "next")
        assert {path.name for path in folder.iterdir()} == set(OWN[:3])
        assert versions(folder) == {"next"}
        if code == 0:
            break
    assert code == 0


def test_a_commit_that_came_with_the_folder_replaces_no_foreign_files(old_folder):
    for name in FOREIGN:
        (old_folder / COMMIT / name).parent.mkdir(parents=True, exist_ok=True)
        (old_folder / COMMIT / name).write_text("planted")
    update(old_folder, "new")
    assert foreign(old_folder) == FOREIGN
    assert versions(old_folder) == {"new"}
    assert not (old_folder / COMMIT).exists()


def test_an_error_in_the_block_leaves_everything_as_it_was(old_folder):
    def fail_half_way() -> None:
        with update_folder(old_folder, OWN) as staged:
            (staged / "about.json").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert versions(old_folder) == {"old"}
    assert foreign(old_folder) == FOREIGN
    assert not [path for path in old_folder.iterdir() if path.name.startswith(".promcse_pl")]


def test_a_link_with_the_name_of_a_file_is_replaced_and_its_target_unchanged(old_folder, tmp_path):
    target = tmp_path / "thesis"
    target.write_text("years of work")
    (old_folder / "weights.bin").unlink()
    (old_folder / "weights.bin").symlink_to(target)
    update(old_folder, "new")
    assert target.read_text() == "years of work"
    assert versions(old_folder) == {"new"}


def test_a_commit_that_is_a_link_is_not_followed(old_folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "about.json").write_text("mine")
    (old_folder / COMMIT).symlink_to(elsewhere)
    with pytest.raises(DataError, match="cannot write to"):
        update(old_folder, "new")
    assert (elsewhere / "about.json").read_text() == "mine"


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("mine"), lambda path: (path / "chapter").mkdir(parents=True)]
)
def test_a_new_folder_replaces_nothing(make, tmp_path):
    thesis = tmp_path / "thesis"
    make(thesis)
    with pytest.raises(AdapterError, match=r"thesis already exists and is not overwritten"):
        new_folder(thesis, error=AdapterError).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_a_folder_with_the_name_of_an_own_file_is_rejected_before_the_commit(old_folder):
    (old_folder / "weights.bin").unlink()
    (old_folder / "weights.bin").mkdir()
    (old_folder / "weights.bin/notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"weights\.bin is a folder, and a file of that name is to be written"):
        update(old_folder, "new")
    assert (old_folder / "about.json").read_text() == "old"
    assert (old_folder / "weights.bin/notes.txt").read_text() == "mine"
    assert not (old_folder / COMMIT).exists()


def test_an_empty_folder_that_cannot_be_renamed_is_filled_in_place(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link") as staged:
        (staged / "model.bin").write_text("new")
    assert (tmp_path / "real/model.bin").read_text() == "new"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(Path()) as staged:
        (staged / "model.bin").write_text("new")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["model.bin"]


def test_leftovers_are_identified_by_name_and_age(tmp_path):
    kept = [".promcse_pl-mine", ".promcse_pl-0123456789abcdef0", ".git", ".env", "x.tmp", ".status.json.tmp"]
    for name in kept:
        (tmp_path / name).write_text("")
    (tmp_path / ".promcse_pl-0123456789abcdef").mkdir()
    (tmp_path / ".promcse_pl-0123456789abcdef/part").write_text("")
    (tmp_path / ".promcse_pl-fedcba9876543210.npy").write_text("")
    remove_leftovers(tmp_path, older_than=3600)
    assert len(list(tmp_path.iterdir())) == len(kept) + 2
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_leftover_link_is_removed_and_not_followed(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").write_text("years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.promcse_pl-0123456789abcdef").symlink_to(tmp_path / "thesis")
    remove_leftovers(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    assert (tmp_path / "thesis/chapter").read_text() == "years of work"


def test_publish_replaces_only_on_request(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/old").write_text("")
    for replace in (False, True):
        with staging_folder(tmp_path) as staged:
            (staged / "new").write_text("")
            if replace:
                publish(staged, tmp_path / "cache", replace=True)
            else:
                with pytest.raises(OSError, match="not empty"):
                    publish(staged, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_readers_never_see_a_mixture_while_others_write(old_folder):
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            update(old_folder, f"version {number}")
            number += 1

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        seen, until = [], time.monotonic() + 60
        while len(seen) < 200 or (
            len({version for found in seen for version in found}) < 4 and time.monotonic() < until
        ):
            seen.append(read_unchanged(old_folder, "about.json", lambda: versions(old_folder)))
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert all(len(found) == 1 for found in seen)
    assert len({version for found in seen for version in found}) >= 4, "the writers must have been at work"


def test_a_missing_entry_is_an_error_without_waiting(old_folder):
    (old_folder / "weights.bin").unlink()
    with pytest.raises(FileNotFoundError):
        read_unchanged(old_folder, "about.json", lambda: versions(old_folder))


@pytest.mark.parametrize("name", ["file", "file/sub", "locked", "locked/sub/deep"])
def test_a_folder_that_cannot_be_written_is_refused_before_it_is_created(name, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    nearest = tmp_path / name.partition("/")[0]
    with pytest.raises(DataError, match=f"^cannot write to {tmp_path / name}: {nearest} is not a writable folder$"):
        refuse_unwritable(tmp_path / name)
    refuse_unwritable(tmp_path / "new/folder")
    assert not (tmp_path / "new").exists()


def test_a_file_keeps_its_suffix_while_it_is_written(tmp_path):
    with atomic_file(tmp_path / "vectors.npy") as temporary:
        assert temporary.suffix == ".npy"
        temporary.write_bytes(b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.npy"]
