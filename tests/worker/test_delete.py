"""A job is deleted with the files that are its own, and with no other."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest

from kandinsky5.errors import UserError
from kandinsky5.worker.client import Folders, JobSnapshot
from kandinsky5.worker.result_files import delete_results
from kandinsky5.worker.run_files import PreviewFolder, RunFiles


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    (tmp_path / "outputs").mkdir()
    return Folders(tmp_path / "outputs")


def job(**changes: Any) -> JobSnapshot:
    values = {"id": "j", "state": "done", "request": {}, "started_at": time.time()}
    return JobSnapshot(**{**values, **changes})


def written(path: Path, text: str = "video") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_all_that_a_job_made_goes_and_the_folder_of_the_others_stays(studio, over, asking):
    client = studio.start()
    latents = studio.out_dir / "kept.safetensors"
    first = over(client, client.submit(asking("save and leave")))
    client.resume(first.id)
    done, other = over(client, first.id), over(client, client.submit(asking()))
    latents.write_text("latents")
    assert client.delete(done.id) == []
    assert not Path(done.output).exists() and Path(other.output).exists() and latents.exists()
    for kind in ("states", "previews"):
        assert not (studio.state_dir / kind / done.id).exists()
    assert [job.id for job in client.history()] == [other.id] and client.history_length() == 1
    with pytest.raises(KeyError):
        client.delete(done.id)


def test_an_interrupted_job_goes_with_its_saved_state(studio, over, asking):
    client = studio.start()
    job = over(client, client.submit(asking("save and leave")))
    assert Path(job.saved_state).exists()
    client.delete(job.id)
    assert not Path(job.saved_state).exists() and client.history() == ()


def test_a_job_that_waits_or_runs_is_not_deleted(studio, in_step_2, asking):
    client = studio.start()
    held, waiting = client.submit(asking("hold")), client.submit(asking())
    in_step_2(client, held)
    for job_id, state in ((held, "running"), (waiting, "queued")):
        with pytest.raises(UserError, match=f"it is {state}: stop it first"):
            client.delete(job_id)
    assert [job.id for job in client.queue()] == [held, waiting]


def test_early_and_final_results_go_and_those_gone_already_do_not_matter(folders):
    early, final = written(folders.out_dir / "early.mp4"), written(folders.out_dir / "final.png")
    gone = folders.out_dir / "gone.mp4"
    made = job(outputs=(str(early), str(gone)), output=str(final))
    assert delete_results(made, folders, ()) == []
    assert list(folders.out_dir.iterdir()) == []
    assert delete_results(made, folders, ()) == []


@pytest.mark.parametrize(
    "place", ["../secret.mp4", "../outputs-of-another/x.mp4", "sub/../../x.mp4"]
)
def test_a_file_outside_the_outputs_is_not_touched(folders, place):
    (folders.out_dir / "sub").mkdir()
    path = written(folders.out_dir / place)
    (line,) = delete_results(job(output=str(path)), folders, ())
    assert path.exists()
    assert line.endswith("stays: it lies outside the outputs folder")


def test_a_link_and_what_it_leads_to_stay(folders, tmp_path):
    target = written(tmp_path / "precious.mp4")
    link = folders.out_dir / "link.mp4"
    link.symlink_to(target)
    (folders.out_dir / "sub").symlink_to(tmp_path)
    through = folders.out_dir / "sub" / "precious.mp4"
    kept = delete_results(job(outputs=(str(link), str(through))), folders, ())
    assert target.read_text() == "video" and link.is_symlink()
    assert "it is no plain file" in kept[0] and "outside" in kept[1]


def test_a_folder_is_never_deleted(folders):
    inside = written(folders.out_dir / "named.mp4" / "inside.mp4")
    assert "no plain file" in delete_results(job(output=str(inside.parent)), folders, ())[0]
    assert inside.exists()


def test_outputs_behind_a_link_of_the_user_s_are_the_studio_s_own(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "outputs").symlink_to(tmp_path / "disk")
    path = written(tmp_path / "outputs" / "a.mp4")
    assert delete_results(job(output=str(path)), Folders(tmp_path / "outputs"), ()) == []
    assert not path.exists()


def test_results_in_a_former_outputs_folder_are_the_studio_s_own(folders, tmp_path):
    path = written(tmp_path / "former" / "a.mp4")
    used = dataclasses.replace(folders, earlier_out_dirs=(tmp_path / "former",))
    assert delete_results(job(output=str(path)), used, ()) == []
    assert not path.exists()


@pytest.mark.parametrize(
    "other",
    [
        {"output": "shared.png"},
        {"outputs": ("shared.png",)},
        {"state": "queued", "request": {"image": "shared.png"}},
        {"request": {"image": "sub/../shared.png"}},
        {"request": {"init_latents": "shared.png"}},
    ],
)
def test_what_another_job_made_or_uses_stays(folders, other, monkeypatch):
    monkeypatch.chdir(folders.out_dir)
    (folders.out_dir / "sub").mkdir()
    path = written(folders.out_dir / "shared.png")
    kept = delete_results(job(output=str(path)), folders, [job(**other)])
    assert path.exists()
    assert kept == [f"{path} stays: another job uses it"]


def test_latents_go_with_the_job_that_wrote_them(folders):
    path = written(folders.out_dir / "x.safetensors")
    request = {"save_latents": str(path)}
    unfinished = job(state="failed", request=request, step=3, total=4)
    assert delete_results(unfinished, folders, ()) == []
    assert path.exists()
    before = time.time() - 3600.0
    os.utime(path, (before, before))
    finished = job(request=request, step=4, total=4)
    assert "older than the job" in delete_results(finished, folders, ())[0]
    os.utime(path)
    assert delete_results(finished, folders, ()) == []
    assert not path.exists()


def test_a_file_that_cannot_be_deleted_leaves_the_job_in_the_list(
    studio, over, asking, monkeypatch
):
    client = studio.start()
    done = over(client, client.submit(asking()))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "not allowed")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match="can be deleted .not allowed.; the job stays"):
        client.delete(done.id)
    monkeypatch.undo()
    assert client.status(done.id) == done and Path(done.output).exists()
    client.delete(done.id)
    assert not Path(done.output).exists()


def test_states_behind_a_link_are_not_followed(tmp_path):
    files = RunFiles(tmp_path / "state")
    precious = written(tmp_path / "precious" / "file")
    PreviewFolder(files.previews_dir("j")).write(1, b"picture")
    files.states_dir("j").parent.mkdir()
    files.states_dir("j").symlink_to(precious.parent)
    (line,) = files.delete("j")
    assert precious.exists() and "could not be removed" in line
    assert not files.previews_dir("j").exists()
    with pytest.raises(ValueError):
        files.delete("../../etc")
