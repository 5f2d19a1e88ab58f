"""The documents name what is there: files, links, settings, parameters, verbs and pictures."""

import re
from pathlib import Path

import pytest
import typer
import yaml

from flows.cli import app
from flows.settings import Settings
from tests.fixtures.photos import CHECKOUT

ROOT = CHECKOUT.root
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(
    r"`((?:flows|tasks|tests|docs|docker|benchmarks)/[\w./-]*|[\w-]+\.(?:yaml|toml))`"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_link_that_a_page_names_exists(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    named = [ROOT / name for name in PATH.findall(text)]
    named += [page.parent / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    assert [path for path in named if not path.exists()] == []


def test_settings_parameters_verbs_tests_and_pictures_are_named_as_they_are() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    known = {f"HANDSIGNS_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"^\| `(HANDSIGNS_\w+)`", page, flags=re.M)) <= known
    for name, field in Settings.model_fields.items():
        names = {f"HANDSIGNS_{name.upper()}", str(field.validation_alias)}
        assert any(spelling in page for spelling in names), name
    page = (ROOT / "docs/parameters.md").read_text()
    for section in yaml.safe_load((ROOT / "params.yaml").read_text()):
        assert f"`{section}`" in page, section
    readme = (ROOT / "README.md").read_text()
    for verb in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"`{verb}" in readme, verb
    assert len(readme.splitlines()) <= 160
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs/reliability.md").read_text())
    assert len(named) > 30
    assert [name for name in named if not (ROOT / f"tests/{name}.py").is_file()] == []
    shown = "".join(page.read_text() for page in PAGES)
    pictures = (ROOT / "docs/pictures").iterdir()
    assert [path.name for path in pictures if path.name not in shown] == []
