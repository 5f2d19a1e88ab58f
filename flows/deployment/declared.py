"""What the checkout declares for a Prefect server: deployments, and work pools to run them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from flows.deployment.member import POOL
from tasks.errors import SettingsError, first_fault
from tasks.layout import Layout

FILE = "prefect.yaml"
TEMPLATES = Path("docker/pools")
POOLS = {POOL: "process", f"{POOL}-docker": "docker", f"{POOL}-kubernetes": "kubernetes"}
"""Work pools and their types."""


class Deployment(BaseModel):
    """One entry of `prefect.yaml`; what is not named here is Prefect's affair."""

    model_config = ConfigDict(extra="allow")

    name: str
    entrypoint: str
    work_pool: dict[str, Any]

    @property
    def full_name(self) -> str:
        """The name that the server knows it by, `<flow>/<deployment>`."""
        return f"{self.entrypoint.rpartition(':')[2]}/{self.name}"


class Declared(BaseModel):
    """`prefect.yaml`."""

    model_config = ConfigDict(extra="allow")

    deployments: list[Deployment]

    def on(self, pool: str) -> str:
        """The file's text with every deployment on one work pool."""
        content = self.model_dump()
        for one in content["deployments"]:
            one["work_pool"]["name"] = pool
        return yaml.safe_dump(content)


def declared_deployments(layout: Layout) -> Declared:
    """Read `prefect.yaml`.

    Raises:
        SettingsError: it cannot be read, or holds no deployments.
    """
    path = layout.root / FILE
    with _readable(path):
        return Declared.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def pool_template(layout: Layout, kind: str) -> dict[str, Any]:
    """Return the base job template of a pool.

    Args:
        layout: the checkout, in which processes run.
        kind: `process`, `docker` or `kubernetes`.

    Raises:
        SettingsError: the template cannot be read.
    """
    if kind != "process":
        path = layout.root / TEMPLATES / f"{kind}.json"
        with _readable(path):
            return dict(json.loads(path.read_text(encoding="utf-8")))
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    template["variables"]["properties"]["working_dir"]["default"] = str(layout.root.resolve())
    return template


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, yaml.YAMLError, TypeError) as error:
        raise SettingsError(
            f"What is declared for Prefect cannot be read. Received: '{path}' "
            f"({first_fault(error)}). Mend it, or take it back from git."
        ) from error
