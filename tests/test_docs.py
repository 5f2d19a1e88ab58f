"""The documents name what is there: files, links, settings, parameters and verbs."""

import re
import subprocess
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


def text(page: Path) -> str:
    """A page without its examples."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_link_that_a_page_names_exists(page: Path) -> None:
    named = [ROOT / name for name in PATH.findall(text(page))]
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text(page))
    missing = [path for path in named if not path.exists()]
    missing += [page.parent / link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_settings_are_documented_and_documented_settings_exist() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    known = {f"HANDSIGNS_{name.upper()}" for name in Settings.model_fields}
    documented = set(re.findall(r"^\| `(HANDSIGNS_\w+)`", page, flags=re.M))
    assert documented <= known
    assert documented > {"HANDSIGNS_INBOX", "HANDSIGNS_SERVE_TOKEN"}
    for name, field in Settings.model_fields.items():
        names = {f"HANDSIGNS_{name.upper()}", str(field.validation_alias)}
        assert any(spelling in page for spelling in names), name


def test_each_section_of_the_parameters_is_documented() -> None:
    page = (ROOT / "docs/parameters.md").read_text()
    for section in yaml.safe_load((ROOT / "params.yaml").read_text()):
        assert f"`{section}`" in page, section


def test_readme_lists_every_verb_and_fits_on_three_screens() -> None:
    page = (ROOT / "README.md").read_text()
    group = typer.main.get_command(app)
    for verb in group.commands:  # type: ignore[attr-defined]
        assert f"`{verb}" in page, verb
    assert len(page.splitlines()) <= 160


def test_reliability_names_tests_that_exist() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs/reliability.md").read_text())
    assert len(named) > 30
    assert [name for name in named if not (ROOT / f"tests/{name}.py").is_file()] == []


def test_every_picture_is_shown_somewhere() -> None:
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "docs/pictures"], capture_output=True, text=True, check=True
    )
    shown = "".join(page.read_text() for page in PAGES)
    assert [name for name in listed.stdout.split() if Path(name).name not in shown] == []
