"""The `handsigns` command: its errors and exit codes, photos, training, models and services."""

import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from flows.local.clients import prepare_environment
from flows.output import (
    MAX_COLUMNS,
    Json,
    Listing,
    echo,
    open_project,
    open_workspace,
    retrain_listing,
    say,
    show_messages,
    shown,
    shown_progress,
)
from flows.versions import keys_app, versions_app
from tasks.errors import HandsignsError, SettingsError
from tasks.stage import collect_rarely

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
MAX_FILES = 20  # files named one by one; `--json` names all

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
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does, so that a run can say so
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
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
Pool = Literal["handsigns", "handsigns-docker", "handsigns-kubernetes"]
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
    echo(json_, report.model_dump(mode="json"), retrain_listing(report))
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
    result: dict[str, Any] = {**report.to_json(), "version": version, "pushed": pushed}
    facts = {
        f"{what.replace('_', ' ')}, {split}": counts
        for what in ("taken", "already_there")
        for split, counts in result[what].items()
        if counts
    }
    facts |= {"set aside": report.kinds(), "removed": report.removed, "version": version}
    notes = [f"{file.origin}: {file.reason}" for file in report.quarantined[:MAX_FILES]]
    if len(report.quarantined) > MAX_FILES:
        notes.append("The others: artifacts/quarantine/quarantine.json")
    echo(json_, result, Listing("Photos", facts, notes=notes))
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
    low, high = result["accuracy_interval"]
    title = f"{name}: accuracy {result['accuracy']:.4f} ({low:.3f} to {high:.3f}) on "
    title += f"{result['n']} photos"
    title += "".join(f", {score} {shown(result[score])}" for score in ("loss", "auc", "ece"))
    columns = ("label", "precision", "recall", "f1", "support")
    unread = [f"{file['file']}: {file['error']}" for file in result["unreadable"]]
    echo(json_, result, Listing(title, result["per_class"], columns, unread))


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
    errors = [f"{one['file']}: {one['error']}" for one in predictions if "error" in one]
    few = len(classifier.labels) <= MAX_COLUMNS
    columns = ("photo", "read as", *(classifier.labels if few else ("probability",)))
    rows = []
    for one in predictions:
        if "error" not in one:
            read = one["label"] if one["certain"] else f"? {one['label']}"
            row = {"photo": one["file"], "read as": read}
            row["probability"] = one["probabilities"][one["label"]]
            rows.append(one["probabilities"] | row)
    listing = Listing(f"{name}; ? means that no label is clear", rows, columns, errors)
    echo(json_, {"model": name, "predictions": predictions}, listing)
    if errors:
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

        limits = Limits(workspace.settings, host)
        bound, url = listen(host, port, anywhere=limits.token is not None)
        from flows.serve.app import make_app
        from flows.serve.follower import open_source
        from flows.serve.review import open_captures
        from tasks.data.traffic import Traffic

        captures = open_captures(workspace)
        source = open_source(workspace, model)
        service = make_app(source, limits, captures, Traffic(workspace.traffic()))
        loaded = source.model.description if source.model else None
        line = f"Serving on {url} ({loaded or 'no model yet'}). Ctrl-C stops it."
        echo(json_, {"url": url, "model": loaded, "problem": source.problem}, line)
        run_service(service, bound)


@app.command()
def up(json_: Json = False) -> None:
    """Start S3, MLflow, Prefect and a worker on loopback, with the schedule."""
    workspace = open_workspace()
    from flows.local.stack import up as start

    running, fresh = start(workspace.project, workspace.settings)
    notes = [
        "-: as the environment says, or in .local/; logs: .local/logs/; login: handsigns open",
        "handsigns status, predict and retrain use it. To stop it: make down",
    ]
    title = "Service" if fresh else "Service, already up"
    echo(json_, {**running, "started": fresh}, Listing(title, running, notes=notes))


@app.command()
def down(json_: Json = False) -> None:
    """Stop what `up` started, and all that it started; the data stays."""
    project = open_project()
    from flows.local.stack import down as stop

    stopped = stop(project)
    echo(json_, {"stopped": stopped}, "The service is down." if stopped else "Nothing was up.")


@app.command()
def deploy(
    pool: Annotated[Pool, typer.Option(help="Runs the deployments.")] = "handsigns",
    json_: Json = False,
) -> None:
    """Register work pools, deployments and the crash automations with Prefect."""
    with open_workspace() as workspace:
        from flows.deploy import deploy as register

        api = workspace.services.prefect_named()
        if api is None:
            raise SettingsError(
                "No Prefect server is known. Set PREFECT_API_URL, or run `handsigns up` first."
            )
        names = register(workspace.project, workspace.settings, api, pool)
    echo(json_, {"api": api, "pool": pool, "deployments": names}, f"{', '.join(names)} on {pool}")
