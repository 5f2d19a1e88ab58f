"""Change one thing in a module that decides, and see whether its tests notice.

`python -m tests.mutants [COUNT] [MODULE ...]` makes that many changes, the same ones each
time, and lists those that no test noticed. Without a count it makes 220 in all modules, or
every change of the modules named, such as `tasks/gate.py`. Each runs in a process forked
from this one, which has the libraries loaded and keeps the servers for all of them.
"""

import ast
import importlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.services.mlflow import load_mlflow
from tests.fixtures import servers
from tests.fixtures.photos import CHECKOUT

TESTS = {
    "tasks/gate.py": ("test_gate",),
    "tasks/releases/comparison.py": ("test_comparison",),
    "tasks/releases/champion.py": ("test_champion", "test_release"),
    "tasks/data/dataset.py": ("test_preprocess", "test_audit"),
    "tasks/audit.py": ("test_audit",),
    "tasks/data/importer.py": ("test_importer",),
    "tasks/releases/signing.py": ("test_release",),
}
"""The modules that decide, and the tests that must notice."""
LIBRARIES = ("boto3", "cv2", "filelock", "hypothesis", "model_signing", "pandas", "pydantic")
LIBRARIES += ("pytest", "sqlalchemy", "scipy.stats", "sklearn.metrics", "stamina", "yaml")
EQUIVALENT: dict[str, str] = {
    "tasks/audit.py: brightness[active] >= brightness[block[0]] - reach -> "
    "brightness[active] > brightness[block[0]] - reach": "reach is longer than it must be",
    "tasks/audit.py: apart <= colors.shape[1] * reach * reach -> "
    "apart < colors.shape[1] * reach * reach": "reach is longer than it must be",
    "tasks/releases/comparison.py: won > lost -> won >= lost": "as many of each is within noise",
    "tasks/releases/comparison.py: 2 -> 3": "how wide a picture is",
    "tasks/releases/comparison.py: 2.6 -> 3.6": "how high a picture is",
    "tasks/releases/comparison.py: 100 -> 101": "how fine a picture is",
    "tasks/releases/comparison.py: 8 -> 9": "how large its letters are",
    "tasks/audit.py: found.groups * len(labels) + label_ids -> "
    "found.groups * len(labels) - label_ids": "each pair has a number of its own either way",
    "tasks/audit.py: True -> False": "strict: both lists are of one mask",
}
"""Changes that no test can notice, by `module: before -> after`, and why; never made."""
CPU_SECONDS = 90
WAIT_SECONDS = 1800
"""A change that makes tests compute, or wait, longer than this was noticed."""
PAIRS = ((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot))
PAIRS += ((ast.In, ast.NotIn), (ast.And, ast.Or), (ast.Add, ast.Sub))
SWAPS = {ast.Mult: ast.Add, **dict(PAIRS), **{one: other for other, one in PAIRS}}


@dataclass(frozen=True)
class Mutant:
    """One change: a module's text, and what was changed where."""

    module: str
    text: str
    what: str


def mutants(module: str) -> Iterator[Mutant]:
    """Every change of one module."""
    tree = ast.parse((CHECKOUT.root / module).read_text())
    nodes = [node for body in _code(tree) for node in ast.walk(body)]
    for node in nodes:
        for field, old, new in _changes(node):
            before = _shown(node)
            setattr(node, field, new)
            text, what = ast.unparse(tree), f"{before} -> {_shown(node)}"
            setattr(node, field, old)
            if f"{module}: {what}" not in EQUIVALENT:
                line = getattr(node, "lineno", "?")
                yield Mutant(module, text, f"{module}:{line} {what}")


def _shown(node: ast.AST) -> str:
    """A condition without the block that it governs."""
    return " ".join(ast.unparse(getattr(node, "test", node)).split())


def _code(tree: ast.Module) -> Iterator[ast.AST]:
    """Functions without what only people read: docstrings, annotations, messages of errors."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            yield from (one for one in function.body if not isinstance(one, ast.FunctionDef))


def _changes(node: ast.AST) -> Iterator[tuple[str, object, object]]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield "ops", node.ops, [SWAPS[type(node.ops[0])](), *node.ops[1:]]
    elif isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in SWAPS and not _text(node):
        yield "op", node.op, SWAPS[type(node.op)]()
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "test", node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "value", node.value, not node.value
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "value", node.value, node.value + 1
    elif isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != "None":
        yield "value", node.value, ast.Constant(None)


def _text(node: ast.AST) -> bool:
    """Whether text is put together, such as a message."""
    parts = [one for one in ast.walk(node) if isinstance(one, ast.Constant | ast.JoinedStr)]
    return any(isinstance(getattr(one, "value", ""), str) for one in parts)


def run(mutant: Mutant, tree: Path) -> int:
    """Start the tests of a mutant in a fork and return its process id."""
    (tree / mutant.module).write_text(mutant.text)
    if pid := os.fork():
        return pid
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    signal.alarm(WAIT_SECONDS)
    os.chdir(tree)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    ours = ("tasks", "flows", "tests")
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(CHECKOUT.root)))]
    pytest = importlib.import_module("pytest")
    files = [f"tests/{name}.py" for name in TESTS[mutant.module]]
    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files])))


def main(count: int, modules: Sequence[str]) -> int:
    for name in LIBRARIES:
        importlib.import_module(name)
    load_mlflow()
    servers.pytest_configure()
    chosen = _choose(count, modules)
    free = [_copy() for _ in range(os.cpu_count() or 1)]
    trees, survivors, began = list(free), [], time.monotonic()
    running: dict[int, tuple[Mutant | None, Path]] = {}
    # First without a change: tests that fail anyway would kill everything.
    pending = [*(Mutant(name, (CHECKOUT.root / name).read_text(), "") for name in modules), *chosen]
    try:
        while pending or running:
            while pending and free:
                tree, mutant = free.pop(), pending.pop(0)
                running[run(mutant, tree)] = (mutant, tree)
            pid, status = os.wait()
            mutant, tree = running.pop(pid)
            shutil.copy(CHECKOUT.root / mutant.module, tree / mutant.module)
            free.append(tree)
            if not mutant.what and status:
                raise SystemExit(f"The tests of {mutant.module} fail without a change.")
            if mutant.what and not status:
                survivors.append(mutant.what)
                print("survived", mutant.what, flush=True)
    finally:
        servers.pytest_unconfigure()
        for tree in trees:
            shutil.rmtree(tree)
    killed = len(chosen) - len(survivors)
    share = killed / len(chosen)
    print(f"{killed} of {len(chosen)} noticed ({share:.1%}) in {time.monotonic() - began:.0f} s")
    return int(share < 0.92)


def _choose(count: int, modules: Sequence[str]) -> list[Mutant]:
    """As many of each module as its share of all changes."""
    every = [mutant for name in modules for mutant in mutants(name)]
    return random.Random(18).sample(every, min(count, len(every)))


def _copy() -> Path:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=CHECKOUT.root, capture_output=True, text=True, check=True
    ).stdout.split()
    tree = Path(tempfile.mkdtemp(prefix="handsigns-mutants-"))
    for name in filter(lambda one: (CHECKOUT.root / one).is_file(), listed):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT.root / name, tree / name)
    return tree


if __name__ == "__main__":
    counts = [int(word) for word in sys.argv[1:] if word.isdecimal()]
    named = [word for word in sys.argv[1:] if not word.isdecimal()]
    sys.exit(main(counts[0] if counts else 10_000 if named else 220, named or list(TESTS)))
