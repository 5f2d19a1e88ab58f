"""The `handsigns` command: thin verbs over flows and tasks.

Nothing heavy is imported before a verb needs it, so that help is instant. Results
go to standard output, everything else to standard error.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tasks.errors import HandsignsError
from tasks.layout import Layout

if TYPE_CHECKING:
    from flows.workspace import Workspace
    from tasks.progress import Progress

app = typer.Typer(
    name="handsigns",
    help="Keep a hand-sign classifier fresh: import photos, retrain, promote what is better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_WHERE = """\
Look at artifacts/run.json, artifacts/plots/, and
  handsigns status           who is champion
  handsigns predict PHOTO    what it sees"""
_out = Console()
_err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Model = Annotated[
    str,
    typer.Option(help="champion, challenger, a version's number, or the path of a release."),
]
Reason = Annotated[str, typer.Option(help="Why; kept in the champion's history.")]


def main() -> None:
    """Run the command; whatever is refused or fails ends in one line and exit code 1."""
    _show_logs()
    try:
        app()
    except HandsignsError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}. Received: {error.filename or 'an operation'}.")
    except KeyboardInterrupt:
        _fail("Interrupted. What was there before is whole; run again to go on.")


@app.command()
def sample(json_: Json = False) -> None:
    """Render the sample data set into data/ and version it."""
    from tasks.fetch import render
    from tasks.held import recover

    layout = _layout()
    pipeline = _workspace(layout).pipeline
    with _progress() as progress:
        recover(layout)
        said = render(layout, pipeline, progress)
    _tell(json_, {"version": pipeline.data_version(), "said": said}, said)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Class folders, a .zip of them, or an .h5 file.")],
    test: Annotated[Path | None, typer.Option(help="The test set, where it is apart.")] = None,
    replace: Annotated[bool, typer.Option(help="Hold these photos only.")] = False,
    json_: Json = False,
) -> None:
    """Bring photos into data/, set bad files aside, and version the result."""
    from flows.tables import import_table
    from tasks.fetch import fetch_data
    from tasks.intake import import_photos

    layout = _layout()
    pipeline = _workspace(layout).pipeline
    with _progress() as progress:
        # A sample that was never rendered is nothing that photos could be added to.
        if not replace and pipeline.data_source() == "photos":
            fetch_data(layout, pipeline, progress)
        report = import_photos(layout, source, test, replace, progress)
        version = pipeline.version_data("photos")
        pushed = pipeline.push_data() if pipeline.has_remote() else None
    if json_:
        _print_json({**report.to_json(), "version": version, "pushed": pushed})
        return
    _out.print(import_table(report))
    _out.print(f"data/ is version {version}.", highlight=False)


@app.command()
def retrain(
    force: Annotated[bool, typer.Option(help="Run every stage, changed or not.")] = False,
    json_: Json = False,
) -> None:
    """Bring the model up to date: stages, gate, release, registry, champion."""
    from flows.launch import launch_retrain
    from flows.tables import run_table

    workspace = _workspace(_layout())
    with _progress() as progress:
        report = launch_retrain(workspace, force, progress)
    if json_:
        _print_json(report.model_dump(mode="json"))
    else:
        _out.print(run_table(report))
        _out.print(_WHERE, highlight=False)
    if report.status in ("rejected", "failed"):
        raise typer.Exit(1)


@app.command()
def status(json_: Json = False) -> None:
    """Show the data's version, stages out of date, champion and challenger."""
    from flows.tables import status_table

    with _workspace(_layout()) as workspace:
        found = workspace.status()
    _tell(json_, found, status_table(found))


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Class folders 0 to 5 of photos.")],
    model: Model = "champion",
    json_: Json = False,
) -> None:
    """Score a model on labelled photos: accuracy, loss, AUC, each class."""
    from flows.tables import scores_table

    with _workspace(_layout()) as workspace, _progress() as progress:
        classifier, name = workspace.classifier(model)
        from tasks.evaluate import evaluate_folder

        report = evaluate_folder(classifier, folder, progress)
    result = {"model": name, **report.to_json()}
    _tell(json_, result, scores_table(result))


@app.command()
def predict(
    files: Annotated[list[Path], typer.Argument(help="Photos of hands.")],
    model: Model = "champion",
    json_: Json = False,
) -> None:
    """Read the sign in each photo, with the probability of every sign."""
    from flows.tables import predictions_table

    with _workspace(_layout()) as workspace, _progress() as progress:
        classifier, name = workspace.classifier(model)
        from tasks.classifier import classify_files

        predictions = [found.to_json() for found in classify_files(classifier, files, progress)]
    _tell(json_, {"model": name, "predictions": predictions}, predictions_table(predictions, name))
    if any("error" in found for found in predictions):
        raise typer.Exit(1)


@app.command()
def promote(
    version: Annotated[int, typer.Argument(help="Version in the registry.")],
    reason: Reason = "promoted by hand",
    json_: Json = False,
) -> None:
    """Make a version the champion."""
    with _workspace(_layout()) as workspace:
        move = workspace.promote(version, reason)
    _tell(json_, move.model_dump(mode="json"), move.told())


@app.command()
def rollback(reason: Reason = "rolled back by hand", json_: Json = False) -> None:
    """Give the champion's place back to the version that had it before."""
    with _workspace(_layout()) as workspace:
        move = workspace.rollback(reason)
    _tell(json_, move.model_dump(mode="json"), move.told())


@app.command()
def verify(
    version: Annotated[str, typer.Argument(help="champion, challenger, or a version's number.")],
    json_: Json = False,
) -> None:
    """Read a release back and compare every byte with its manifest."""
    with _workspace(_layout()) as workspace:
        found = workspace.verify(version)
    said = f"{found['uri']}: {found['files']} files, {found['bytes']} bytes, as the manifest says."
    _tell(json_, found, said)


def _show_logs() -> None:
    """What flows and tasks have to say goes to standard error, in plain lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("flows", "tasks"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)


def _layout() -> Layout:
    layout = Layout(Path.cwd())
    if not (layout.root / "dvc.yaml").is_file():
        raise HandsignsError(
            f"This is not a checkout of handsigns: no dvc.yaml. Received: '{layout.root}'. "
            "Change to the checkout's root."
        )
    return layout


def _workspace(layout: Layout) -> "Workspace":
    from flows.settings import load_settings
    from flows.workspace import Workspace

    return Workspace(layout, load_settings())


@contextmanager
def _progress() -> "Iterator[Progress]":
    from flows.console import progress_bars

    # Whatever a library prints on the way must not get between a script and its JSON.
    with redirect_stdout(sys.stderr), progress_bars(_err) as progress:
        yield progress


def _tell(as_json: bool, content: Any, shown: str | Table) -> None:
    if as_json:
        _print_json(content)
    else:
        _out.print(shown, highlight=False)


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _fail(line: str) -> None:
    _err.print(" ".join(line.split()), highlight=False, markup=False, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
