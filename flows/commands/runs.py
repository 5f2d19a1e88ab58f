"""Verbs that train, and tell where things stand."""

from typing import Annotated

import typer

from flows.commands.terminal import Json, open_workspace, out, print_json, shown_progress, tell

_WHERE = """\
Look at artifacts/run.json, artifacts/plots/, and
  handsigns status           who is champion
  handsigns predict PHOTO    what it sees"""

app = typer.Typer()


@app.command()
def retrain(
    force: Annotated[bool, typer.Option(help="Run every stage, changed or not.")] = False,
    json_: Json = False,
) -> None:
    """Bring the model up to date: stages, gate, release, registry, champion."""
    from flows.commands.launch import launch_retrain
    from flows.commands.tables import run_table

    workspace = open_workspace()
    with shown_progress() as progress:
        report = launch_retrain(workspace, force, progress)
    if json_:
        print_json(report.model_dump(mode="json"))
    else:
        out.print(run_table(report))
        if report.status != "failed":  # what failed has said all there is
            out.print(_WHERE, highlight=False)
    if report.status in ("rejected", "failed"):
        raise typer.Exit(1)


@app.command()
def status(json_: Json = False) -> None:
    """Show the data's version, stages out of date, champion and challenger."""
    from flows.commands.tables import status_table

    with open_workspace() as workspace:
        found = workspace.status()
    tell(json_, found, status_table(found))
