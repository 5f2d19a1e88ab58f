"""Verbs that move the champion."""

from typing import Annotated

import typer

from flows.terminal import Json, Reason, open_workspace, tell

app = typer.Typer()


@app.command()
def promote(
    version: Annotated[int, typer.Argument(help="Version in the registry.")],
    reason: Reason = "promoted by hand",
    json_: Json = False,
) -> None:
    """Make a version the champion."""
    with open_workspace() as workspace:
        move = workspace.promote(version, reason)
    tell(json_, move.model_dump(mode="json"), move.told())


@app.command()
def rollback(reason: Reason = "rolled back by hand", json_: Json = False) -> None:
    """Give the champion's place back to the version that had it before."""
    with open_workspace() as workspace:
        move = workspace.rollback(reason)
    tell(json_, move.model_dump(mode="json"), move.told())
