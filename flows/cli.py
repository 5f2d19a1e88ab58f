"""Every verb of the `handsigns` command."""

import io
import logging
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from flows.local.proxy import spare_loopback
from flows.output import (
    Json,
    Model,
    Reason,
    err,
    open_project,
    open_workspace,
    out,
    print_json,
    shown_progress,
    tell,
)
from tasks.errors import HandsignsError, SettingsError
from tasks.garbage import rare_collection

if TYPE_CHECKING:
    from flows.serve.follower import ModelSource
    from flows.settings import Settings
    from tasks.project import Project

INTERRUPTED = 130
"""What the command ends with after Ctrl-C, as shells have it."""

app = typer.Typer(
    name="handsigns",
    help="Keep a hand-sign classifier fresh: import photos, retrain, promote what is better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command; whatever is refused or fails ends in one line and exit code 1."""
    _show_logs()
    spare_loopback()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of a terminal that knows few letters
            stream.reconfigure(errors="backslashreplace")
    try:
        with rare_collection():
            app()
    except HandsignsError as error:
        _fail(str(error))
    except OSError as error:
        _fail(
            f"{error.strerror or error}. Received: {error.filename or 'an operation'}. "
            "Give permission or make room, then run again."
        )
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _interrupted()
        raise


def _show_logs() -> None:
    """What flows and tasks have to say goes to standard error, in plain lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("flows", "tasks"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)


def _interrupted() -> NoReturn:
    _say("Interrupted. What was there before is whole; run again to go on.")
    sys.exit(INTERRUPTED)


def _fail(line: str) -> None:
    _say(line)
    sys.exit(1)


def _say(line: str) -> None:
    err.print(" ".join(line.split()), highlight=False, markup=False, soft_wrap=True)


_WHERE = """\
Look at artifacts/run.json, artifacts/plots/, and
  handsigns status           who is champion
  handsigns predict PHOTO    what it sees"""


@app.command()
def retrain(
    force: Annotated[bool, typer.Option(help="Run every stage, changed or not.")] = False,
    json_: Json = False,
) -> None:
    """Bring the model up to date: stages, gate, release, registry, champion."""
    from flows.output import run_table
    from flows.run import retrain as run

    with open_workspace() as workspace, shown_progress() as progress:
        report = run(workspace, force, progress)
    if json_:
        print_json(report.model_dump(mode="json"))
    else:
        out.print(run_table(report))
        if report.status != "failed":  # what failed has said all there is
            out.print(_WHERE, highlight=False)
    if report.status == "cancelled":
        raise KeyboardInterrupt
    if report.status in ("rejected", "failed"):
        raise typer.Exit(1)


@app.command()
def status(json_: Json = False) -> None:
    """Show the data's version, stages out of date, champion and challenger."""
    from flows.output import status_table

    with open_workspace() as workspace:
        found = workspace.status()
    tell(json_, found, status_table(found))


_log = logging.getLogger(__name__)


@app.command()
def sample(json_: Json = False) -> None:
    """Render the sample data set into data/ and version it."""
    from tasks.data.directory import recover
    from tasks.data.sources import render

    project = open_project()
    pipeline = open_workspace(project).pipeline
    with shown_progress() as progress:
        recover(project)
        said = render(project, pipeline, progress)
    tell(json_, {"version": pipeline.data_version(), "said": said}, said)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Class folders, a .zip of them, or an .h5 file.")],
    test: Annotated[Path | None, typer.Option(help="The test set, where it is apart.")] = None,
    replace: Annotated[bool, typer.Option(help="Hold these photos only.")] = False,
    json_: Json = False,
) -> None:
    """Bring photos into data/, set bad files aside, and version the result."""
    from flows.output import import_table
    from tasks.data.importer import import_photos
    from tasks.data.sources import fetch_data

    project = open_project()
    with open_workspace(project) as workspace, shown_progress() as progress:
        pipeline = workspace.pipeline
        held = pipeline.data_source()  # a damaged data.dvc is told before photos are exchanged
        # A sample that was never rendered is nothing that photos could be added to.
        if not replace and held == "photos":
            fetch_data(project, pipeline, progress)
        beside = held == "sample" and not replace and project.data.is_dir()
        report = import_photos(project, source, test, replace, progress)
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


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Class folders 0 to 5 of photos.")],
    model: Model = "champion",
    json_: Json = False,
) -> None:
    """Score a model on labelled photos: accuracy, loss, AUC, each class."""
    from flows.output import scores_table

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
    from flows.output import predictions_table

    with open_workspace() as workspace, shown_progress() as progress:
        classifier, name = workspace.classifier(model)
        from tasks.model.inference import classify_files

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
        from flows.run import promote as move_to

        move = move_to(workspace, version, reason or ("" if force else "promoted by hand"), force)
    tell(json_, move.model_dump(mode="json"), move.describe())


@app.command()
def rollback(
    reason: Reason = "rolled back by hand",
    from_: Annotated[
        str | None,
        typer.Option("--from", help="Version to roll back from; another champion stays."),
    ] = None,
    json_: Json = False,
) -> None:
    """Give the champion's place back to the version that had it before."""
    with open_workspace() as workspace:
        from flows.run import rollback as move_back

        move = move_back(workspace, reason, from_)
    tell(json_, move.model_dump(mode="json"), move.describe())


@app.command("rebuild-registry")
def rebuild_registry(json_: Json = False) -> None:
    """Register the releases in storage that the registry lost."""
    with open_workspace() as workspace:
        added = workspace.rebuild_registry()
    lines = [f"Version {one['version']} is release {one['release']}." for one in added]
    tell(json_, {"added": added}, "\n".join(lines) or "The registry has every release.")


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    model: Model = "champion",
    json_: Json = False,
) -> None:
    """Serve a page and an interface that read signs; the champion is followed."""
    from flows.settings import load_settings

    project, settings = open_project(), load_settings()
    token = settings.serve_token
    from flows.serve.server import listen, run_service

    with listen(host, port, bool(token)) as listening:
        source = _source(project, settings, model)
        from flows.serve.app import make_app
        from flows.serve.limits import Limits

        limits = Limits(
            settings.serve_rate,
            settings.serve_max_mb * 2**20,
            token.get_secret_value() if token else None,
            listening.hosts,
        )
        service = make_app(source, limits)
        url = listening.url
        told = source.model.description if source.model else None
        line = f"Serving on {url} ({told or 'no model yet'}). Ctrl-C stops it."
        tell(json_, {"url": url, "model": told, "problem": source.problem}, line)
        sys.stdout.flush()
        try:
            run_service(service, listening)
        finally:
            source.stop()


def _source(project: "Project", settings: "Settings", model: str) -> "ModelSource":
    from flows.local.stack import SharedStorage
    from flows.serve.follower import Follower, LoadedModel, StaticModel
    from flows.workspace import Workspace

    workspace = Workspace(project, settings)
    if model != "champion":
        with workspace:
            return StaticModel(LoadedModel(*workspace.classifier(model)))
    shared = SharedStorage(settings, project, workspace.trust)
    follower = Follower(shared.opened, project.releases, settings.serve_follow_seconds)
    follower.start()
    return follower


@app.command()
def up(json_: Json = False) -> None:
    """Start S3, MLflow, Prefect and a worker on loopback, with the schedule."""
    from flows.local.up import up as start
    from flows.output import service_table
    from flows.settings import load_settings

    running, fresh = start(open_project(), load_settings())
    tell(json_, {**running.model_dump(), "started": fresh}, service_table(running, fresh))


@app.command()
def down(json_: Json = False) -> None:
    """Stop what `up` started, and all that it started; the data stays."""
    from flows.local.up import down as stop

    stopped = stop(open_project())
    tell(json_, {"stopped": stopped}, "The service is down." if stopped else "Nothing was up.")


@app.command()
def deploy(
    pool: Annotated[str, typer.Option(help="Work pool that runs the deployments.")] = "handsigns",
    silence: Annotated[
        float, typer.Option(help="Seconds without a sign of life until a run counts as crashed.")
    ] = 90.0,
    json_: Json = False,
) -> None:
    """Register work pools, deployments and the crash automations with Prefect."""
    from flows.deploy import POOLS
    from flows.deploy import deploy as register
    from flows.local.servers import HEARTBEAT_SECONDS
    from flows.local.stack import Services
    from flows.settings import load_settings
    from tasks.errors import SettingsError

    project, settings = open_project(), load_settings()
    if not HEARTBEAT_SECONDS < silence < float("inf"):
        raise typer.BadParameter(
            f"must be more than the {HEARTBEAT_SECONDS} s between two signs of life, and finite "
            f"(received {silence:g})",
            param_hint="--silence",
        )
    if pool not in POOLS:
        raise SettingsError(
            f"There is no such work pool. Received: {pool!r}. Take one of {', '.join(POOLS)}."
        )
    api = Services(settings, project.local.resolve()).prefect_named()
    if api is None:
        raise SettingsError(
            "No Prefect server is known. Set PREFECT_API_URL, or run `handsigns up` first."
        )
    names = register(project, settings, api, pool, silence)
    tell(json_, {"api": api, "pool": pool, "deployments": names}, f"{', '.join(names)} on {pool}")


keys_app = typer.Typer(help="Make keys, and sign what is there.", no_args_is_help=True)


@keys_app.command()
def new(
    folder: Annotated[
        Path | None, typer.Option(help="Takes both keys; .local/keys if not named.")
    ] = None,
    json_: Json = False,
) -> None:
    """Make a key pair; HANDSIGNS_SIGNING_PASSPHRASE, if set, locks the private key."""
    from flows.settings import load_settings
    from tasks.releases.signing import fingerprint, new_keys, public_pem

    place = (folder or open_project().keys).resolve()
    refuse_tracked(place)
    secret = load_settings().signing_passphrase
    private, public = new_keys(place, secret.get_secret_value() if secret else None)
    name = fingerprint(public_pem(public))[:16]
    said = (
        f"Key {name}. Keep {private} where releases are made, as HANDSIGNS_SIGNING_KEY; "
        f"give {public} to all who use them, in HANDSIGNS_PUBLIC_KEYS."
    )
    tell(json_, {"key": name, "private": str(private), "public": str(public)}, said)


@keys_app.command()
def sign(json_: Json = False) -> None:
    """Sign the champion, and every release that was one, with the present key."""
    from tasks.errors import ReleaseError
    from tasks.releases.pointer import sign_pointer
    from tasks.releases.release import sign_release

    with open_workspace() as workspace:
        workspace.trust.check_signer()
        if workspace.trust.signing_key is None:
            raise SettingsError(
                "There is no key to sign with. Received: no HANDSIGNS_SIGNING_KEY. Make one with "
                "`handsigns keys new` and set it."
            )
        champion = sign_pointer(workspace.storage)
        moves = champion.pointer.moves if champion else ()
        releases, gone = [], {}
        for release in sorted({move.release for move in moves}):
            try:
                sign_release(workspace.storage, release)
                releases.append(release)
            except ReleaseError as error:  # the others must not stay unsigned for it
                gone[release] = str(error)
    said = f"Signed: the champion pointer and {len(releases)} releases."
    told = [said if champion else "There is no champion to sign."]
    told += [f"Not signed, {release}: {reason}" for release, reason in gone.items()]
    tell(json_, {"releases": releases, "not_signed": gone}, "\n".join(told))
    if gone:
        raise typer.Exit(1)


def refuse_tracked(folder: Path) -> None:
    """Refuse a folder from which the next `git add` would take a private key.

    Raises:
        SettingsError: it lies in a git checkout that does not ignore it.
    """
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    command = ["git", "-C", str(existing), "check-ignore", "--quiet", str(folder / "signing.pem")]
    try:
        code = subprocess.run(command, capture_output=True, timeout=20, check=False).returncode  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return  # without git nothing can be added to it
    if code == 1:
        raise SettingsError(
            f"A private key must not lie where git would take it. Received: '{folder}'. "
            "Name a folder that is ignored, or one outside of the checkout."
        )


app.add_typer(keys_app, name="keys")

if __name__ == "__main__":
    main()
