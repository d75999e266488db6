"""Folders that change while the studio runs: the next job has them, in the worker that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kandinsky5.events import Notice
from kandinsky5.request import GenerationRequest, GenerationResult
from kandinsky5.worker.client import FileNames
from kandinsky5.worker.folders import Folders
from tests.worker.fake_pipeline import FakePipeline


class TellingPipeline(FakePipeline):
    """Says in which folders it looks for models."""

    def run(self, request: GenerationRequest, **options: Any) -> GenerationResult:
        options["emit"](Notice(f"looks in {[str(folder) for folder in self.models_dirs]}"))
        return super().run(request, **options)


def test_the_next_job_has_other_folders_in_the_same_worker(studio, over, pid_of, tmp_path):
    client = studio.start(pipeline="test_folders:TellingPipeline", models_dirs=[tmp_path / "a"])
    first = over(client, client.submit(GenerationRequest(prompt="one")))
    client.use_folders(Folders(tmp_path / "elsewhere", (tmp_path / "b", tmp_path / "c")))
    second = over(client, client.submit(GenerationRequest(prompt="two")))
    assert f"looks in ['{tmp_path / 'a'}']" in first.notices
    assert f"looks in ['{tmp_path / 'b'}', '{tmp_path / 'c'}']" in second.notices
    assert pid_of(first) == pid_of(second)
    assert Path(first.output).parent == studio.out_dir
    assert Path(second.output).parent == tmp_path / "elsewhere"


def test_a_worker_that_starts_later_has_the_folders_of_the_moment(studio, over, tmp_path):
    client = studio.open(pipeline="test_folders:TellingPipeline")
    client.use_folders(Folders(studio.out_dir, (tmp_path / "b",)))
    client.start()
    job = over(client, client.submit(GenerationRequest(prompt="one")))
    assert f"looks in ['{tmp_path / 'b'}']" in job.notices


def test_an_answer_about_files_belongs_to_the_folders_it_was_asked_with(studio, tmp_path):
    client = studio.open()
    asked: list[FileNames] = []
    client._pump.describe = asked.append
    names = FileNames("demo-t2v", loras=("style.safetensors",))
    for folder in ("a", "b"):
        client.use_folders(Folders(studio.out_dir, (tmp_path / folder,)))
        client.describe(names)
    assert [question.models_dirs for question in asked] == [
        (str(tmp_path / "a"),),
        (str(tmp_path / "b"),),
    ]


def test_results_are_found_where_they_go_and_where_they_went(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("new", "old", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "new" / "link.mp4").symlink_to(tmp_path / "other" / "x.mp4")
    folders = Folders(Path("new"), (Path("~/models"),), (Path("old"),))
    assert folders.out_dir == tmp_path / "new"
    assert folders.models_dirs == (Path("~/models").expanduser(),)
    for name, is_result in {
        "new/a.mp4": True,
        "old/a.mp4": True,
        "other/a.mp4": False,
        "new/../other/a.mp4": False,
        "new/link.mp4": False,
        "newer/a.mp4": False,
    }.items():
        assert folders.holds_result(tmp_path / name) is is_result
