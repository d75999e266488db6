"""The command line: what goes in, what comes out on which stream, and the exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kandinsky5
from kandinsky5 import cli
from kandinsky5.errors import CheckpointError, OutOfMemory, Stopped, UserError
from kandinsky5.events import Notice, StageStarted, StepDone
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, GenerationResult

REPOSITORY = Path(__file__).resolve().parents[1]
PROMPT = "a red circle moves right"

RunCli = Callable[..., tuple[int, str, str]]


def result_of(request: GenerationRequest) -> GenerationResult:
    return GenerationResult(
        output=str(request.out),
        frames=25,
        width=64,
        height=64,
        seed=request.seed or 0,
        steps_run=20,
        evaluations_run=40,
        evaluations_skipped=0,
        seconds={"total": 1.5},
        peak_vram_bytes=0,
        peak_rss_bytes=10**9,
    )


class FakeGenerate:
    """Stands for :func:`kandinsky5.generate`; remembers the request and may fail."""

    def __init__(self) -> None:
        self.request: GenerationRequest | None = None
        self.options: dict[str, Any] = {}
        self.error: BaseException | None = None

    def __call__(self, request: GenerationRequest, **options: Any) -> GenerationResult:
        self.request, self.options = request, options
        if self.error is not None:
            raise self.error
        options["emit"](StageStarted("denoise"))
        options["emit"](StepDone(1, 1, 0.5, 0.0))
        return result_of(request)


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> FakeGenerate:
    fake = FakeGenerate()
    monkeypatch.setattr(kandinsky5, "generate", fake)
    return fake


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> RunCli:
    """Run a command line in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(argv)
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": "x", "colour": 1, "size": 2}', ("colour", "size")),  # fault 35
        (b'{"colour": 1, "steps": "many", "seed": -5}', ("colour", "steps:", "seed:", "prompt:")),
        (b'{"version": 99, "prompt": "x"}', ("version", "99")),
        (b'{"prompt": "x", "steps": "many"}', ("steps", "many")),
        (b"[1, 2]", ("JSON object",)),
        (b'{"prompt": ', ("JSON",)),
        (b"\xff\xfe\x00", ("UTF-8",)),
        (b"[" * 100_000, ("JSON",)),
        (None, ("No such file",)),
    ],
)
def test_a_bad_job_file_is_one_line(
    run: RunCli, tmp_path: Path, content: bytes | None, says: tuple[str, ...]
) -> None:
    job = tmp_path / "job.json"
    if content is not None:
        job.write_bytes(content)
    code, out, err = run("generate", "--request", str(job))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert all(word in err for word in says)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("generate",), "prompt"),
        (("generate", "--prompt", " "), "describe"),
        (("generate", "--prompt", "x", "--steps", "ten"), "1 to 1000"),
        (("generate", "--prompt", "x", "--steps", "0"), "1 to 1000"),
        (("generate", "--prompt", "x", "--guidance", "nan"), "1 to 30"),
        (("generate", "--prompt", "x", "--seed", "-5"), "seed"),
        (("generate", "--prompt", "x", "--preset", "pro"), "demo-t2v"),
        (("generate", "--prompt", "x", "--image", "a.png"), "takes no image"),
        (("generate", "--prompt"), "expected one argument"),
        (("generate", "--pro", "x"), "unrecognized arguments"),
        (("ui", "--port", "http"), "1 to 65535"),
        (("ui", "--port", "0"), "1 to 65535"),
        (("ui", "--listen"), "--auth"),  # fault 34
        (("--listen",), "--auth"),
        (("ui", "--host", "0.0.0.0"), "--listen"),
        (("paint",), "invalid choice"),
        (("inspect", "nowhere.safetensors"), "nothing is at"),
        (("bench", "speed"), "demo-adherence"),
        (("download", "nothing"), "demo-t2v"),
        (("download", "demo-t2v"), "built in"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    run: RunCli, generate: FakeGenerate, argv: tuple[str, ...], says: str
) -> None:
    code, out, err = run(*argv)
    assert code == 2
    assert err.startswith("k1: ")
    assert err.count("\n") == 1
    assert says in err
    assert generate.request is None
    if "--json" in argv:
        assert json.loads(out)["exit_code"] == 2
    else:
        assert out == ""


def test_a_port_that_is_taken_is_named_and_nothing_else_said(run: RunCli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        code, out, err = run("ui", "--port", str(taken))  # fault 26
    assert (code, out) == (2, "")
    assert f"{taken} is in use: try --port " in err
    assert err.startswith("k1: ") and err.count("\n") == 1


def test_the_studio_gets_its_options_and_says_its_address(
    run: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kandinsky5.ui import launch as studio

    seen: list[Any] = []

    def launch(options: object, *, announce: Callable[[str], None]) -> int:
        seen.append(options)
        announce("opening the studio at http://127.0.0.1:7999")
        return 0

    monkeypatch.setattr(studio, "launch", launch)
    code, out, err = run(
        "--port", "7999", "--outdir", "o", *("--models-dir a --models-dir b").split()
    )
    options = seen[0]
    assert (code, out, err) == (0, "", "opening the studio at http://127.0.0.1:7999\n")
    assert (options.port, options.out_dir) == (7999, Path("o"))
    assert options.models_dirs == (Path("a"), Path("b"))
    assert options.state_dir == tmp_path / "state" / "k1"
    run("--port", "7999")
    assert seen[1].out_dir is None  # the settings decide


def test_folders_for_models_in_the_settings_count_for_commands_too(
    run: RunCli, generate: FakeGenerate, tmp_path: Path
) -> None:
    from kandinsky5.ui.settings import FILE_NAME

    state = tmp_path / "k1"
    state.mkdir()
    settings = {"version": 1, "models_dirs": ["/set", "/typed"]}
    (state / FILE_NAME).write_text(json.dumps(settings))
    folders = ("--state-dir", str(state), "--models-dir", "/typed")
    run("generate", "--prompt", PROMPT, *folders, "--out", str(tmp_path / "x.mp4"))
    assert generate.options["models_dirs"] == (Path("/typed"), Path("/set"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("dit", "x", "a file"), 2),
        (CheckpointError("x.safetensors", "is a pickle; use .safetensors"), 3),
        (OutOfMemory("out of GPU memory during denoise, step 3 of 20"), 4),
        (Stopped("stopped at step 3"), 5),
        (KeyboardInterrupt(), 5),
        (ZeroDivisionError("a\nb"), 1),
    ],
)
def test_each_end_has_its_exit_code_and_one_line(
    run: RunCli, generate: FakeGenerate, error: BaseException, code: int
) -> None:
    generate.error = error
    got, out, err = run("generate", "--prompt", PROMPT, "--json")
    assert got == code
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert json.loads(out)["exit_code"] == code


def test_the_traceback_is_in_the_log(run: RunCli, generate: FakeGenerate, tmp_path: Path) -> None:
    generate.error = ZeroDivisionError("deep inside")
    _, _, err = run("generate", "--prompt", PROMPT, "--state-dir", str(tmp_path / "logs"))
    log = tmp_path / "logs" / "k1.log"
    assert str(log) in err
    assert "Traceback" in log.read_text()
    assert "deep inside" in log.read_text()


def test_without_a_place_for_the_log_the_work_goes_on(
    run: RunCli, generate: FakeGenerate, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run("generate", "--prompt", PROMPT, "--state-dir", str(tmp_path / "file" / "s"))
    assert code == 0
    assert "no log is written" in err


def test_an_output_folder_that_cannot_be_written_is_said_first(
    run: RunCli, generate: FakeGenerate, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")  # fault 30
    code, _, err = run("generate", "--prompt", PROMPT, "--outdir", str(tmp_path / "file" / "o"))
    assert code == 2
    assert "output folder" in err
    assert generate.request is None


def test_the_result_is_a_path_on_stdout_and_progress_on_stderr(
    run: RunCli, generate: FakeGenerate
) -> None:
    code, out, err = run("generate", "--prompt", PROMPT, "--out", "clip.mp4")
    assert (code, out) == (0, "clip.mp4\n")
    assert "1/1" in err


def test_a_name_is_chosen_in_the_output_folder(run: RunCli, generate: FakeGenerate) -> None:
    code, out, _ = run("generate", "--prompt", PROMPT, "--outdir", "clips")
    assert code == 0
    path = Path(out.strip())
    assert path.parent == Path("clips")
    assert generate.request is not None and generate.request.seed is not None
    assert path.name.endswith(f"_demo-t2v_{generate.request.seed}.mp4")


def test_models_are_looked_for_where_it_was_said(run: RunCli, generate: FakeGenerate) -> None:
    run("generate", "--prompt", PROMPT, "--models-dir", "a")
    assert generate.options["models_dirs"] == (Path("a"),)


def test_json_is_one_document_whatever_libraries_print(
    run: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(request: GenerationRequest, **options: Any) -> GenerationResult:
        print("from Python")  # noqa: T201  as a library might
        os.write(1, b"from C\n")
        subprocess.run(["echo", "from a child"], check=True)
        return result_of(request)

    monkeypatch.setattr(kandinsky5, "generate", noisy)
    code, out, err = run("generate", "--prompt", PROMPT, "--json", "--seed", "5")
    assert code == 0
    assert json.loads(out)["seed"] == 5
    assert all(noise in err for noise in ("from Python", "from C", "from a child"))


def test_presets_are_a_table_and_a_document(run: RunCli) -> None:
    code, table, _ = run("presets")
    assert code == 0
    assert len(table.splitlines()) == 1 + len(PRESETS)
    document = json.loads(run("presets", "--json")[1])
    assert list(document) == list(PRESETS)
    assert document["lite-t2v-5s-distilled"]["steps"] == 16


def test_what_a_file_is_not_is_said(run: RunCli, tmp_path: Path) -> None:
    (tmp_path / "weights.ckpt").write_bytes(b"PK\x03\x04" + b"\0" * 64)
    code, out, err = run("inspect", "weights.ckpt", "--json")  # fault 12
    assert code == 3
    assert json.loads(out)["problems"]
    assert "safetensors" in err


def test_doctor_is_a_report_and_a_document(run: RunCli) -> None:
    code, out, _ = run("doctor", "--json")
    assert code == 0
    assert {"summary", "demo_works", "checks"} <= set(json.loads(out))


def test_a_bench_gets_its_options(run: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    from kandinsky5.demo import bench

    monkeypatch.setattr(bench, "demo_adherence", lambda **options: {"given": sorted(options)})
    code, out, _ = run("bench", "demo-adherence", "--pairs", "4", "--mode", "i2v", "--json")
    assert code == 0
    assert json.loads(out) == {"given": ["mode", "pairs"]}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_the_next_step(tmp_path: Path, number: int) -> None:
    program = """
import sys, time
import kandinsky5
from kandinsky5.cli import main
from kandinsky5.errors import Stopped
from kandinsky5.events import Notice

def generate(request, *, emit, should_stop, models_dirs, states):
    emit(Notice("working"))
    while not should_stop():
        time.sleep(0.01)
    raise Stopped("stopped before step 2 of 20")

kandinsky5.generate = generate
sys.exit(main(sys.argv[1:]))
"""
    argv = ["generate", "--prompt", PROMPT, "--out", str(tmp_path / "o.mp4"), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *argv, "--state-dir", str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "working" in process.stderr.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 5
    assert json.loads(out)["exit_code"] == 5
    assert err.splitlines()[-1] == "k1: stopped before step 2 of 20"


def test_help_and_version_are_quick_to_say(run: RunCli) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert "exit codes" in out
    code, out, _ = run("--version")
    assert (code, out) == (0, f"K1 {kandinsky5.__version__}\n")


def test_the_program_starts_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "k1.py"), "presets", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
    )
    assert done.returncode == 0
    assert "demo-t2v" in json.loads(done.stdout)


def test_a_reader_that_has_heard_enough_is_no_fault() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(REPOSITORY / "k1.py"), "presets", "--json"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_notices_do_not_reach_stdout(run: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    def noticing(request: GenerationRequest, **options: Any) -> GenerationResult:
        options["emit"](Notice("width 70 set to 64"))
        return result_of(request)

    monkeypatch.setattr(kandinsky5, "generate", noticing)
    _, out, err = run("generate", "--prompt", PROMPT, "--out", "o.mp4")
    assert out == "o.mp4\n"
    assert "note: width 70 set to 64" in err


@pytest.mark.parametrize(("own", "found"), [(None, cli.SPIN_COUNT), ("7", "7")])
def test_waiting_threads_sleep_soon_unless_the_user_has_it_otherwise(
    monkeypatch: pytest.MonkeyPatch, own: str | None, found: str
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if own is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", own)

    assert cli.main(["presets"]) == 0

    assert os.environ["GOMP_SPINCOUNT"] == found
