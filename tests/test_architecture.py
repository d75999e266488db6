"""Who may import whom, and what no file may hold: the rules of docs/decisions/0001-floor-plan.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from floor_plan import ARROWS, VERSION

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("kandinsky5", "int8", "vae_tiling")
MAX_LINES = 400
MAX_TEST_LINES = 500
HEAVY = {"torch", "transformers", "diffusers", "triton", "bitsandbytes", "accelerate", "tokenizers"}

LIGHT = (
    "k1",
    "kandinsky5",
    "kandinsky5.cli",
    "kandinsky5.arguments",
    "kandinsky5.doctor",
    "kandinsky5.request",
    "kandinsky5.family",
    "kandinsky5.memory.plan",
    "kandinsky5.memory.remedies",
    "kandinsky5.plan_command",
    "kandinsky5.resume_command",
    "kandinsky5.worker.client",
    "kandinsky5.worker.jobs",
    "kandinsky5.worker.protocol",
    "kandinsky5.worker.handle",
    "kandinsky5.ui",
)
"""What runs in the process of the page or before a command begins: torch may not come with it."""

DISTRIBUTION = {"PIL": "pillow", "imageio_ffmpeg": "imageio-ffmpeg"}
"""Import name → name in requirements.txt, where they differ."""


@dataclass(frozen=True)
class Import:
    """One imported name: a module, as exactly as can be told, and whether importing the file runs it."""

    name: str
    at_import: bool


@cache
def modules() -> dict[str, Path]:
    """Dotted name → file, for everything that runs in the program."""
    found = {"k1": REPOSITORY / "k1.py"}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return tuple(_imports(tree, at_import=True))


def _imports(node: ast.AST, at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, at_import) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide where a name comes from"
            base = child.module or ""
            for alias in child.names:
                inner = f"{base}.{alias.name}"
                told = inner in modules() or inner == VERSION
                yield Import(inner if told else base, at_import)
        else:
            inside_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            only_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            yield from _imports(child, at_import and not inside_function and not only_for_types)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def is_standard(name: str) -> bool:
    return name.partition(".")[0] in {*sys.stdlib_module_names, "__future__"}


def rule_of(module: str) -> set[str]:
    fitting = [name for name in ARROWS if is_within(module, name)]
    name = max(fitting, key=len)
    if name == "kandinsky5" != module:
        pytest.fail(f"{module} stands in no rule: say in ARROWS what it may import")
    return ARROWS[name]


def loaded_with(module: str) -> set[str]:
    """All names that importing a module imports, the project's modules followed through."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        parent = name.rpartition(".")[0]
        if parent:
            waiting.append(parent)  # importing a.b runs a/__init__.py first
        if name in modules():
            waiting += [item.name for item in imports_of(name) if item.at_import]
    return seen


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    allowed = rule_of(module)
    strangers = {
        item.name
        for item in imports_of(module)
        if not is_standard(item.name)
        and not any(is_within(item.name, name) for name in allowed)
        and not (module == "kandinsky5.worker.handle" and item.name == "kandinsky5.worker.process")
    }
    assert not strangers, f"{module} imports {sorted(strangers)}; allowed are {sorted(allowed)}"


def test_the_worker_process_is_imported_only_in_the_child() -> None:
    importers = {
        module
        for module in modules()
        if any(item.name == "kandinsky5.worker.process" for item in imports_of(module))
    }
    assert importers == {"kandinsky5.worker.handle"}
    handle = imports_of("kandinsky5.worker.handle")
    assert not any(item.at_import for item in handle if item.name == "kandinsky5.worker.process")


@pytest.mark.parametrize(
    "module", [name for name in modules() if name in LIGHT or is_within(name, "kandinsky5.ui")]
)
def test_the_page_and_the_start_of_the_program_load_no_torch(module: str) -> None:
    loaded = {name.partition(".")[0] for name in loaded_with(module)}
    assert not loaded & HEAVY


def test_every_light_module_exists() -> None:
    assert set(LIGHT) <= set(modules())


def test_the_studio_really_loads_no_torch() -> None:
    program = (
        "import sys, kandinsky5.cli, kandinsky5.ui.app, kandinsky5.worker.client;"
        f"print([name for name in {sorted(HEAVY)} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_command_line_loads_no_page() -> None:
    loaded = {name.partition(".")[0] for name in loaded_with("k1")}
    assert not loaded & {"gradio", "fastapi", "uvicorn", "numpy", "PIL"}


@pytest.mark.parametrize("attribute", ["empty_cache", "pin_memory", "cudart"])
def test_only_memory_owns_device_memory(attribute: str) -> None:
    users = {
        module
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == attribute
    }
    assert all(is_within(user, "kandinsky5.memory") for user in users)


@pytest.mark.parametrize("module", modules())
def test_nothing_is_printed_outside_the_command_line(module: str) -> None:
    if module == "kandinsky5.cli":
        return
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    prints = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not prints


def source_files() -> list[Path]:
    """Every Python file of the repository, tests and tools too."""
    folders = (*PACKAGES, "tools", "benchmarks", "tests")
    return [REPOSITORY / "k1.py", *(p for f in folders for p in (REPOSITORY / f).rglob("*.py"))]


def test_no_file_is_a_hall() -> None:
    too_long = {}
    for path in source_files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > (MAX_TEST_LINES if REPOSITORY / "tests" in path.parents else MAX_LINES):
            too_long[path] = lines
    assert not too_long


def test_no_module_is_a_drawer_for_everything() -> None:
    names = {path.stem for path in source_files()} | {path.parent.name for path in source_files()}
    assert not names & {"utils", "util", "helpers", "helper", "misc", "common"}


def test_every_package_that_is_imported_is_pinned() -> None:
    text = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8")
    pinned = set(re.findall(r"^([\w.-]+)==", text, re.MULTILINE))
    imported = {
        item.name.partition(".")[0]
        for module in modules()
        for item in imports_of(module)
        if not is_standard(item.name) and item.name.partition(".")[0] not in (*PACKAGES, "k1")
    }
    assert {DISTRIBUTION.get(name, name) for name in imported} <= pinned


def test_requirements_are_exact_and_leave_torchvision_out() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
        for line in lines:
            if line and not line.startswith(("#", "-r ")):
                assert re.fullmatch(r"[\w.-]+==[\w.]+(; .+)?", line), line
                assert "torchvision" not in line


def test_no_file_names_a_package_registry() -> None:
    hosts = re.compile(
        r"py(pi|thonhosted)\.org|registry\.npm|/simple/|--(extra-)?index-url|find-links"
    )
    kinds = {".py", ".md", ".txt", ".toml", ".json", ".js", ".css", ""}
    named = []
    for path in REPOSITORY.rglob("*"):
        inside = path.relative_to(REPOSITORY).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in inside)
        if hidden or path == Path(__file__) or path.suffix not in kinds or not path.is_file():
            continue
        if inside[0] in ("outputs", "state", "lite_checkpoints") and path.suffix != ".md":
            continue
        if hosts.search(path.read_text(encoding="utf-8", errors="replace")):
            named.append(path)
    assert not named
