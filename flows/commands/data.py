"""Verbs that bring photos into `data/`."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.terminal import (
    Json,
    open_layout,
    open_workspace,
    out,
    print_json,
    shown_progress,
    tell,
)

app = typer.Typer()
_log = logging.getLogger(__name__)


@app.command()
def sample(json_: Json = False) -> None:
    """Render the sample data set into data/ and version it."""
    from tasks.incoming.fetch import render
    from tasks.incoming.held import recover

    layout = open_layout()
    pipeline = open_workspace(layout).pipeline
    with shown_progress() as progress:
        recover(layout)
        said = render(layout, pipeline, progress)
    tell(json_, {"version": pipeline.data_version(), "said": said}, said)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Class folders, a .zip of them, or an .h5 file.")],
    test: Annotated[Path | None, typer.Option(help="The test set, where it is apart.")] = None,
    replace: Annotated[bool, typer.Option(help="Hold these photos only.")] = False,
    json_: Json = False,
) -> None:
    """Bring photos into data/, set bad files aside, and version the result."""
    from flows.commands.tables import import_table
    from tasks.incoming.fetch import fetch_data
    from tasks.incoming.intake import import_photos

    layout = open_layout()
    with open_workspace(layout) as workspace, shown_progress() as progress:
        pipeline = workspace.pipeline
        held = pipeline.data_source()  # a damaged data.dvc is told before photos are exchanged
        # A sample that was never rendered is nothing that photos could be added to.
        if not replace and held == "photos":
            fetch_data(layout, pipeline, progress)
        beside = held == "sample" and not replace and layout.data.is_dir()
        report = import_photos(layout, source, test, replace, progress)
        version = pipeline.version_data("photos")
        pushed = pipeline.push_data() if pipeline.has_remote() else None
    if beside and report.usable:
        _log.warning(
            "data/ holds the rendered sample beside these photos. Import them with --replace to "
            "hold them only."
        )
    if json_:
        print_json({**report.to_json(), "version": version, "pushed": pushed})
        return
    out.print(import_table(report))
    out.print(f"data/ is version {version}.", highlight=False)
