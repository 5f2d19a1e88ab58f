"""The `handsigns` command: its errors and exit codes, photos, training, models and services."""

import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from flows import output
from flows.local.clients import HEARTBEAT_SECONDS, prepare_environment, traffic_store
from flows.output import (
    Json,
    echo,
    open_project,
    open_workspace,
    say,
    show_messages,
    shown_progress,
)
from flows.versions import keys_app, versions_app
from tasks.errors import HandsignsError, SettingsError
from tasks.stage import collect_rarely

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

app = typer.Typer(
    help="Keep an image classifier fresh: import photos, retrain, promote what is better.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(versions_app)
app.add_typer(keys_app, name="keys")


def main() -> None:
    """Run the command; a refusal or a failure is one line and exit code 1."""
    collect_rarely()
    show_messages()
    prepare_environment(Path.cwd() / ".local")
    try:
        app()
    except HandsignsError as error:
        _fail(str(error))
    except OSError as error:
        where = f": '{error.filename}'" if error.filename else ""
        _fail(f"{error.strerror or error}{where}. Give permission or make room, then run again.")
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:  # typer's, after Ctrl-C
            raise
        _fail("Interrupted. Nothing is lost; run again to continue.", INTERRUPTED)
    except Exception as error:
        traceback.print_exc()  # into the log, once there is one
        kind = type(error).__name__
        _fail(f"{kind}: {error}. This is a bug; the newest file in .local/logs/ has its traceback.")


def _fail(reason: str, code: int = 1) -> NoReturn:
    say(reason)
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        echo(False, None, f"handsigns {version('handsigns')}")
        raise typer.Exit


Model = Annotated[
    str,
    typer.Option(help="champion, challenger, a version's number, or the path of a release."),
]
Version = Annotated[
    bool, typer.Option("--version", help="Print it.", callback=_print_version, is_eager=True)
]


@app.callback()
def _options(version: Version = False) -> None:
    """Options of the command itself."""


@app.command()
def retrain(
    force: Annotated[bool, typer.Option(help="Run every stage, changed or not.")] = False,
    json_: Json = False,
) -> None:
    """Bring the model up to date: stages, gate, release, registry, champion."""
    with open_workspace() as workspace, shown_progress() as progress:
        from flows.run import retrain as run

        report = run(workspace, force, progress)
    echo(json_, report.model_dump(mode="json"), output.retrain_listing(report))
    if report.status == "cancelled":
        raise KeyboardInterrupt
    if report.status in ("rejected", "failed"):
        raise typer.Exit(1)


@app.command()
def sample(json_: Json = False) -> None:
    """Render the sample data set into data/ and version it."""
    workspace = open_workspace()
    from tasks.data.directory import render, restore_data

    with shown_progress() as progress:
        restore_data(workspace.project)
        done = render(workspace.project, workspace.pipeline, progress)
    echo(json_, {"version": workspace.pipeline.data_version(), "said": done}, done)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Class folders, a .zip of them, or an .h5 file.")],
    test: Annotated[Path | None, typer.Option(help="The test set, where it is apart.")] = None,
    replace: Annotated[bool, typer.Option(help="Keep these photos only.")] = False,
    set_labels: Annotated[
        bool,
        typer.Option(
            "--set-labels", help="Write the names of the class folders to params.yaml as labels."
        ),
    ] = False,
    json_: Json = False,
) -> None:
    """Bring photos into data/, set bad files aside, and version the result."""
    if set_labels and not replace:
        raise typer.BadParameter("--set-labels needs --replace: photos of other labels must go.")
    with open_workspace() as workspace, shown_progress() as progress:
        from tasks.data.dataset import check_trainable, find_photos
        from tasks.data.directory import data_lock, fetch_data
        from tasks.data.importer import import_photos

        project, pipeline = workspace.project, workspace.pipeline
        former = pipeline.data_source()  # fails for a damaged data.dvc before photos are replaced
        # A retrain must not begin between the import and the version of it.
        with data_lock(project):
            # A sample that was never rendered is nothing that photos could be added to.
            if not replace and former == "photos":
                fetch_data(project, pipeline, progress)
            mixed = former == "sample" and not replace and project.data.is_dir()
            report = import_photos(project, source, test, replace, progress, set_labels=set_labels)
            version = pipeline.version_data("photos")
        pushed = pipeline.push_data() if pipeline.remote_url() else None
    if mixed and report.usable:
        say(
            "data/ holds the rendered sample beside these photos. Import them with --replace to "
            "keep them only."
        )
    result = {**report.to_json(), "version": version, "pushed": pushed}
    echo(json_, result, output.import_listing(report, version))
    for line in report.unknown_folders():
        say(f"{line}. To take a source's folders as the labels: --replace --set-labels.")
    check_trainable(find_photos(project.data), report.labels)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Class folders of photos.")],
    model: Model = "champion",
    json_: Json = False,
) -> None:
    """Score a model on labelled photos: accuracy, loss, AUC, each class."""
    with open_workspace() as workspace, shown_progress() as progress:
        classifier, name = workspace.classifier(model)
        from tasks.scoring.folder import evaluate_folder

        result = {"model": name, **evaluate_folder(classifier, folder, progress)}
    echo(json_, result, output.scores_listing(result))


@app.command()
def predict(
    files: Annotated[list[Path], typer.Argument(help="Photos, or folders of them.")],
    model: Model = "champion",
    json_: Json = False,
) -> None:
    """Classify each photo, with the probability of every label."""
    photos = [photo for file in files for photo in _photos_in(file)]
    with open_workspace() as workspace, shown_progress() as progress:
        classifier, name = workspace.classifier(model)
        from tasks.model.inference import classify_files

        predictions = [found.to_json() for found in classify_files(classifier, photos, progress)]
    result = {"model": name, "predictions": predictions}
    echo(json_, result, output.predictions_listing(predictions, name))
    if any("error" in found for found in predictions):
        raise typer.Exit(1)


def _photos_in(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("[!.]*") if file.is_file())
    if not found:
        raise HandsignsError(f"The folder '{path}' holds no photos. Name one that does.")
    return found


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    model: Model = "champion",
    json_: Json = False,
) -> None:
    """Serve a page and an HTTP API that classify photos; they follow the champion."""
    with open_workspace() as workspace:
        from flows.serve.limits import Limits, listen, run_service

        settings = workspace.settings
        token = settings.serve_token.get_secret_value() if settings.serve_token else None
        with listen(host, port, token is not None) as listening:
            from flows.serve.app import make_app
            from flows.serve.follower import open_source
            from flows.serve.review import open_captures
            from tasks.data.traffic import Traffic

            captures = open_captures(settings, workspace.project)
            source = open_source(workspace, model)
            max_bytes = settings.serve_max_mb * 2**20
            limits = Limits(settings.serve_rate, max_bytes, token, listening.hosts)
            traffic = Traffic(traffic_store(settings, workspace.project))
            service = make_app(source, limits, captures, traffic)
            loaded = source.model.description if source.model else None
            line = f"Serving on {listening.url} ({loaded or 'no model yet'}). Ctrl-C stops it."
            echo(json_, {"url": listening.url, "model": loaded, "problem": source.problem}, line)
            try:
                run_service(service, listening)
            finally:
                source.stop()


@app.command()
def up(json_: Json = False) -> None:
    """Start S3, MLflow, Prefect and a worker on loopback, with the schedule."""
    workspace = open_workspace()
    from flows.local.stack import up as start

    running, fresh = start(workspace.project, workspace.settings)
    echo(json_, {**running.model_dump(), "started": fresh}, output.service_listing(running, fresh))


@app.command()
def down(json_: Json = False) -> None:
    """Stop what `up` started, and all that it started; the data stays."""
    project = open_project()
    from flows.local.stack import down as stop

    stopped = stop(project)
    echo(json_, {"stopped": stopped}, "The service is down." if stopped else "Nothing was up.")


@app.command()
def deploy(
    pool: Annotated[str, typer.Option(help="Work pool that runs the deployments.")] = "handsigns",
    silence: Annotated[
        int,
        typer.Option(
            min=HEARTBEAT_SECONDS + 1,
            help="Seconds without a sign of life until a run counts as crashed.",
        ),
    ] = 90,
    json_: Json = False,
) -> None:
    """Register work pools, deployments and the crash automations with Prefect."""
    with open_workspace() as workspace:
        from flows.deploy import POOLS
        from flows.deploy import deploy as register

        if pool not in POOLS:
            raise SettingsError(f"There is no work pool {pool!r}. Take one of {', '.join(POOLS)}.")
        api = workspace.services.prefect_named()
        if api is None:
            raise SettingsError(
                "No Prefect server is known. Set PREFECT_API_URL, or run `handsigns up` first."
            )
        names = register(workspace.project, workspace.settings, api, pool, silence)
    echo(json_, {"api": api, "pool": pool, "deployments": names}, f"{', '.join(names)} on {pool}")
