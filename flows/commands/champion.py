"""Verbs that move the champion."""

from typing import Annotated

import typer

from flows.commands.terminal import Json, Reason, open_workspace, tell

app = typer.Typer()


@app.command()
def promote(
    version: Annotated[int, typer.Argument(help="Version in the registry.")],
    reason: Reason = "",
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Overrule the gate or a lost comparison; needs --reason, and is kept."
        ),
    ] = False,
    json_: Json = False,
) -> None:
    """Make a version the champion."""
    with open_workspace() as workspace:
        from flows.commands.moves import promote as move_to

        move = move_to(workspace, version, reason or ("" if force else "promoted by hand"), force)
    tell(json_, move.model_dump(mode="json"), move.told())


@app.command()
def rollback(reason: Reason = "rolled back by hand", json_: Json = False) -> None:
    """Give the champion's place back to the version that had it before."""
    with open_workspace() as workspace:
        from flows.commands.moves import rollback as move_back

        move = move_back(workspace, reason)
    tell(json_, move.model_dump(mode="json"), move.told())
