"""`dvc.yaml` names all the code that a stage's result depends on."""

import ast
import re
import shlex
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

from tasks.params import Params
from tests.fixtures.photos import CHECKOUT

OWN = ("flows", "tasks")
NEUTRAL = {f"tasks.{name}" for name in ("errors", "project", "params", "stage", "io")}
"""What carries values but decides none; `params.yaml` itself is tracked key by key."""


def imports(path: Path) -> set[str]:
    """Modules of our own that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OWN):
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in named if source(name).is_file()} or {node.module}
    return found


def top_level(path: Path) -> set[str]:
    """Modules of our own that are imported with a file, not later."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OWN):
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in named if source(name).is_file()} or {node.module}
    return found


def both() -> list[Path]:
    """All files of ours."""
    return [*modules("flows"), *modules("tasks")]


def source(module: str) -> Path:
    """The file of a module."""
    return CHECKOUT.root / f"{module.replace('.', '/')}.py"


def needed(module: str) -> set[str]:
    """The stage's module and everything it leads to, but for the neutral ones."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen and name not in NEUTRAL:
            seen.add(name)
            waiting += imports(source(name))
    return seen


def dotted(path: Path) -> str:
    """The module of a file below the checkout's root."""
    return ".".join(path.with_suffix("").parts)


def modules(package: str = "tasks") -> list[Path]:
    """All files of a package, from the checkout's root."""
    files = (CHECKOUT.root / package).rglob("*.py")
    return sorted(path.relative_to(CHECKOUT.root) for path in files)


def stages() -> dict[str, tuple[str, set[str]]]:
    """Module and code dependencies of each stage of `dvc.yaml`."""
    found = {}
    for name, stage in yaml.safe_load((CHECKOUT.root / "dvc.yaml").read_text())["stages"].items():
        body = stage.get("do", stage)
        module = shlex.split(body["cmd"])[2]
        code = {dotted(Path(dep)) for dep in body["deps"] if dep.startswith("tasks/")}
        found[name] = (module, code)
    return found


@pytest.mark.parametrize("name", stages())
def test_a_stage_depends_on_all_the_code_that_it_runs(name: str) -> None:
    module, declared = stages()[name]
    assert declared == needed(module)


@pytest.mark.parametrize("name", stages())
def test_a_stage_depends_on_all_the_parameters_that_it_reads(name: str) -> None:
    stage = yaml.safe_load((CHECKOUT.root / "dvc.yaml").read_text())["stages"][name]
    module = stages()[name][0].replace(".", "/")
    code = (CHECKOUT.root / f"{module}.py").read_text()
    read = {key for key in Params.model_fields if re.search(rf"\bparams\.{key}\b", code)}
    declared = {key.split(".")[0] for key in stage.get("do", stage).get("params", [])}
    assert read <= declared


def test_no_task_reaches_up_to_prefect() -> None:
    code = "; ".join(f"import {dotted(path)}" for path in modules() if path.stem != "__init__")
    code += "; import sys; print('prefect' in sys.modules, 'flows' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_modules_do_not_import_each_other_in_a_cycle() -> None:
    graph = {dotted(path): set(top_level(CHECKOUT.root / path)) for path in both()}
    assert len(graph) > 50
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("library", "home"), [("boto3", "s3"), ("mlflow", "mlflow"), ("dvc", "dvc")]
)
def test_each_service_is_touched_in_one_module_only(library: str, home: str) -> None:
    touching = set()
    for path in modules():
        for node in ast.walk(ast.parse((CHECKOUT.root / path).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            if any(name.split(".")[0] == library for name in names):
                touching.add(dotted(path))
    assert touching == {f"tasks.services.{home}"}
