"""`dvc.yaml` names all the code that a stage's result depends on, and layers point one way."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from typing import Any

import pytest
import yaml

from tasks.params import Params
from tests.fixtures.photos import CHECKOUT

NEUTRAL = {f"tasks.{name}" for name in ("errors", "project", "params", "stage", "io")}
"""What carries values but decides none; `params.yaml` itself is tracked key by key."""
STAGES: dict[str, Any] = {
    name: stage.get("do", stage)
    for name, stage in yaml.safe_load((CHECKOUT.root / "dvc.yaml").read_text())["stages"].items()
}
MODULES = {
    ".".join(path.relative_to(CHECKOUT.root).with_suffix("").parts): ast.parse(path.read_text())
    for package in ("flows", "tasks")
    for path in (CHECKOUT.root / package).rglob("*.py")
}


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Modules that these statements import, of ours and of libraries."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            yield from named or {node.module}


def needed(module: str) -> set[str]:
    """A module and everything of ours that it leads to, but for the neutral ones."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen and name not in NEUTRAL:
            seen.add(name)
            waiting += MODULES.keys() & imported(ast.walk(MODULES[name]))
    return seen


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_all_the_code_and_parameters_that_it_reads(name: str) -> None:
    stage, module = STAGES[name], f"tasks.{STAGES[name]['cmd'].split()[3]}"
    declared = {dep[:-3].replace("/", ".") for dep in stage["deps"] if dep.startswith("tasks/")}
    assert declared == needed(module)
    code = ast.unparse(MODULES[module])
    read = {key for key in Params.model_fields if re.search(rf"\bparams\.{key}\b", code)}
    assert read <= {key.split(".")[0] for key in stage.get("params", [])}


def test_layers_point_one_way_and_each_service_is_touched_in_one_module_only() -> None:
    graph = {name: MODULES.keys() & imported(tree.body) for name, tree in MODULES.items()}
    assert sum(map(len, graph.values())) > 100
    TopologicalSorter(graph).prepare()  # raises CycleError
    touching: dict[str, set[str]] = defaultdict(set)
    for name, tree in MODULES.items():
        if name.startswith("tasks."):
            for used in imported(ast.walk(tree)):
                touching[used.split(".")[0]].add(name)
    for library, home in (("boto3", "s3"), ("mlflow", "mlflow"), ("dvc", "dvc")):
        assert touching[library] == {f"tasks.services.{home}"}
    assert touching.keys().isdisjoint({"flows", "prefect"})
