"""Verbs that use and check a released model."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.terminal import Json, Model, open_workspace, shown_progress, tell

app = typer.Typer()


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Class folders 0 to 5 of photos.")],
    model: Model = "champion",
    json_: Json = False,
) -> None:
    """Score a model on labelled photos: accuracy, loss, AUC, each class."""
    from flows.commands.tables import scores_table

    with open_workspace() as workspace, shown_progress() as progress:
        classifier, name = workspace.classifier(model)
        from tasks.evaluate import evaluate_folder

        report = evaluate_folder(classifier, folder, progress)
    result = {"model": name, **report.to_json()}
    tell(json_, result, scores_table(result))


@app.command()
def predict(
    files: Annotated[list[Path], typer.Argument(help="Photos of hands.")],
    model: Model = "champion",
    json_: Json = False,
) -> None:
    """Read the sign in each photo, with the probability of every sign."""
    from flows.commands.tables import predictions_table

    with open_workspace() as workspace, shown_progress() as progress:
        classifier, name = workspace.classifier(model)
        from tasks.network.classifier import classify_files

        predictions = [found.to_json() for found in classify_files(classifier, files, progress)]
    tell(json_, {"model": name, "predictions": predictions}, predictions_table(predictions, name))
    if any("error" in found for found in predictions):
        raise typer.Exit(1)


@app.command()
def verify(
    version: Annotated[str, typer.Argument(help="champion, challenger, or a version's number.")],
    json_: Json = False,
) -> None:
    """Check a release's signature, read it back and compare every byte with its manifest."""
    with open_workspace() as workspace:
        found = workspace.verify(version)
    said = f"{found['uri']}: {found['files']} files, {found['bytes']} bytes, as the manifest says."
    said += "".join(f" {words}" for words in (found["signature"], *found["forced"]))
    tell(json_, found, said)


@app.command()
def reproduce(
    version: Annotated[str, typer.Argument(help="champion, challenger, or a version's number.")],
    json_: Json = False,
) -> None:
    """Rebuild a release from its recorded code, data and parameters, and compare."""
    with open_workspace() as workspace, shown_progress() as progress:
        from flows.reproduce import reproduce as rebuild

        found = rebuild(workspace, version, progress)
    tell(json_, found.to_json(), found.told())
    if not found.identical:
        raise typer.Exit(1)
