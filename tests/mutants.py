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
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

import pytest

from tests.fixtures import servers
from tests.fixtures.photos import CHECKOUT

TESTS = {
    "tasks/gate.py": ("test_gate",),
    "tasks/releases/comparison.py": ("test_comparison",),
    "tasks/releases/champion.py": ("test_champion", "test_release"),
    "tasks/data/dataset.py": ("test_preprocess", "test_audit"),
    "tasks/audit.py": ("test_audit",),
    "tasks/data/importer.py": ("test_importer", "test_params"),
    "tasks/releases/signing.py": ("test_release",),
}
"""The modules that decide, and the tests that must notice."""
EQUIVALENT = {
    "tasks/audit.py: brightness[active] >= brightness": "reach is longer than it must be",
    "tasks/audit.py: apart <= colors.shape[1] * reach": "reach is longer than it must be",
    "tasks/audit.py: squares[block, None] + ": "more pairs are looked at, the same are found",
    "tasks/audit.py: folders == 'test' -> ": "the same photos are of one kind",
    "tasks/audit.py: found.groups * len(labels) + ": "pairs have other numbers, each its own",
    "tasks/audit.py: True -> False": "strict: both lists are of one mask",
    "tasks/data/importer.py: True -> False": "strict: each photo has one decision",
    "tasks/releases/comparison.py: won > lost": "as many of each is within noise",
    "tasks/releases/comparison.py: rise <= LOSS_MARGIN": "none is exactly so",
    "tasks/releases/comparison.py: p_value < SIGNIFICANCE -> p_value <=": "none is exactly so",
    "tasks/releases/comparison.py: won + lost -> won - lost": "as many of each give 1, too",
    "tasks/releases/comparison.py: one.recall is None or": "both are of the same photos",
    "tasks/releases/comparison.py: 8 -> 9": "how large its letters are",
}
"""Changes that no test can notice, by how they begin, and why; never made."""
CPU_SECONDS, WAIT_SECONDS = 90, 1800  # a change that makes tests take longer was noticed
PAIRS = ((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot))
PAIRS += ((ast.In, ast.NotIn), (ast.And, ast.Or), (ast.Add, ast.Sub))
SWAPS = {ast.Mult: ast.Add, **dict(PAIRS), **{one: other for other, one in PAIRS}}


Mutant = tuple[str, str, str]  # a module, its text, and what was changed where


def mutants(module: str) -> Iterator[Mutant]:
    """Every change of one module's functions."""
    tree = ast.parse(Path(module).read_text())
    functions = [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)]
    lines = [line for one in functions for line in one.body if line not in functions]
    for node in (node for line in lines for node in ast.walk(line)):
        for field, old, new in changes(node):
            # Of a condition, not the block that it governs.
            before = ast.unparse(getattr(node, "test", node))
            setattr(node, field, new)
            what = f"{before} -> {ast.unparse(getattr(node, 'test', node))}"
            text = ast.unparse(tree)
            setattr(node, field, old)
            if not f"{module}: {what}".startswith(tuple(EQUIVALENT)):
                yield module, text, f"{module}:{getattr(node, 'lineno', '?')} {what}"


def changes(node: ast.AST) -> Iterator[tuple[str, object, object]]:
    """Fields of a node, their values and others; not of text that is put together."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield "ops", node.ops, [SWAPS[type(node.ops[0])](), *node.ops[1:]]
    elif isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in SWAPS:
        if not any(isinstance(getattr(one, "value", 0), str) for one in ast.walk(node)):
            yield "op", node.op, SWAPS[type(node.op)]()
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "test", node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "value", node.value, not node.value
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "value", node.value, node.value + 1
    elif isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != "None":
        yield "value", node.value, ast.Constant(None)


def run(module: str, text: str) -> int:
    """Start the tests of a changed module in a fork and return its process id."""
    if pid := os.fork():
        return pid
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    signal.alarm(WAIT_SECONDS)
    for output in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    for name in [name for name in sys.modules if name.startswith(("tasks", "flows", "tests"))]:
        del sys.modules[name]
    original = SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, name: str) -> CodeType | None:
        if loader.path == str(CHECKOUT.root / module):
            return compile(text, loader.path, "exec")
        return original(loader, name)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    files = [f"tests/{name}.py" for name in TESTS[module]]
    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files])))


def main(count: int, modules: Sequence[str]) -> int:
    for name in {name for module in modules for name in TESTS[module]}:
        importlib.import_module(f"tests.{name}")  # and with it the libraries
    servers.pytest_configure()
    every = [mutant for module in modules for mutant in mutants(module)]
    chosen = random.Random(18).sample(every, min(count, len(every)))
    survivors, running, began = 0, dict[int, Mutant](), time.monotonic()
    # First without a change: tests that fail anyway would kill everything.
    pending = [*((module, Path(module).read_text(), "") for module in modules), *chosen]
    try:
        while pending or running:
            while pending and len(running) < (os.cpu_count() or 1):
                mutant = pending.pop(0)
                running[run(*mutant[:2])] = mutant
            pid, status = os.wait()
            module, _, what = running.pop(pid)
            if not what and status:
                raise SystemExit(f"The tests of {module} fail without a change.")
            if what and not status:
                survivors += 1
                print("survived", what, flush=True)
    finally:
        servers.pytest_unconfigure()
    killed, took = len(chosen) - survivors, time.monotonic() - began
    print(f"{killed} of {len(chosen)} noticed ({killed / len(chosen):.1%}) in {took:.0f} s")
    return int(killed / len(chosen) < 0.92)


if __name__ == "__main__":
    named = [word for word in sys.argv[1:] if not word.isdecimal()]
    count = next(filter(str.isdecimal, sys.argv[1:]), 10_000 if named else 220)
    sys.exit(main(int(count), named or list(TESTS)))
