"""The verbs that only look: status, versions, runs, compare, verify, open."""

import os
from typing import Annotated, Literal

import typer

from flows import output
from flows.output import Json, echo, open_project, open_workspace, shown_progress
from tasks.errors import ServiceError

look_app = typer.Typer()

Named = Annotated[str, typer.Argument(help="champion, challenger, or a version's number.")]


@look_app.command()
def status(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show hashes and addresses.")] = False,
    json_: Json = False,
) -> None:
    """Show data, stages out of date, champion, challenger and the last run."""
    with open_workspace() as workspace:
        from flows.local.stack import find_running

        running = find_running(workspace.services.folder)
        found = {**workspace.status(), "service": running and running.model_dump()}
    echo(json_, found, output.status_listing(found, verbose))


@look_app.command()
def versions(json_: Json = False) -> None:
    """List every version with its scores and its part in the champion's history."""
    with open_workspace() as workspace:
        found = workspace.versions()
    echo(json_, {"versions": found}, output.versions_listing(found))


@look_app.command()
def runs(
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many.")] = 20,
    json_: Json = False,
) -> None:
    """Show what happened lately: retrains with their reasons, and moves of the champion."""
    with open_workspace() as workspace:
        champion = workspace.champion()
    from flows.report import logged_runs

    found = logged_runs(workspace.project)
    for move in champion.pointer.moves if champion else ():
        moved = {"at": move.at, "what": f"v{move.version} is champion", "status": "moved"}
        found.append({**moved, "reason": move.reason})
    found = sorted(found, key=lambda one: one["at"])[-number:]
    echo(json_, {"runs": found}, output.runs_listing(found))


@look_app.command()
def compare(first: Named, second: Named, json_: Json = False) -> None:
    """Score two versions on the same photos, those that neither was trained on."""
    with open_workspace() as workspace, shown_progress() as progress:
        releases = {name: workspace.release(name)[1] for name in (first, second)}
        from tasks.releases.comparison import compare_releases

        found, picture = compare_releases(workspace.project, releases, progress)
    result = {"first": first, "second": second, "picture": picture and str(picture)}
    listing = output.comparison_listing(first, second, found, picture)
    echo(json_, {**result, **found.to_json()}, listing)


@look_app.command()
def verify(version: Named, json_: Json = False) -> None:
    """Check a release's signature, read it back and compare every byte with its manifest."""
    with open_workspace() as workspace:
        found = workspace.verify(version)
    shown = f"{found['uri']}: {found['files']} files, {found['bytes']} bytes, as the manifest says."
    shown += "".join(f" {more}" for more in (found["signature"], *found["forced"]))
    echo(json_, found, shown)


@look_app.command("open")
def open_(what: Literal["prefect", "mlflow", "page"], json_: Json = False) -> None:
    """Print the address and login of a page, and open it where there is a browser."""
    project = open_project()
    from flows.local.clients import local_credentials
    from flows.local.stack import find_running
    from flows.settings import load_settings

    settings, running = load_settings(), find_running(project.local.resolve())
    configured = {"prefect": settings.prefect_api_url, "mlflow": settings.mlflow_tracking_uri}
    named = configured.get(what)
    url = named or getattr(running, what, None)
    if what == "page":
        url = "http://127.0.0.1:8000"  # the default of `serve`
    if url is None:
        raise ServiceError(f"No {what} is up. Start it with `handsigns up`.")
    url = url.removesuffix("/api")
    login = None if named or what == "page" else local_credentials(project.local).login
    echo(json_, {"url": url, "login": login}, f"{url}{f'   login {login}' if login else ''}")
    if output.out.is_terminal and {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        typer.launch(url)
