"""The verbs about versions: which there are, which one is champion, and the keys that sign them."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.output import (
    Json,
    Listing,
    echo,
    open_project,
    open_workspace,
    out,
    shown,
    shown_progress,
)
from tasks.errors import HandsignsError, ReleaseError, ServiceError, SettingsError

if TYPE_CHECKING:
    from flows.workspace import Workspace
    from tasks.releases.champion import Move

versions_app = typer.Typer()
keys_app = typer.Typer(help="Make keys, and sign releases.", no_args_is_help=True)


Named = Annotated[str, typer.Argument(help="champion, challenger, or a version's number.")]
Number = Annotated[int, typer.Argument(help="A version's number; `handsigns versions` lists them.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the champion's history.")]


@versions_app.command()
def status(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show hashes and addresses.")] = False,
    json_: Json = False,
) -> None:
    """Show data, stages out of date, champion, challenger and the last run."""
    with open_workspace() as workspace:
        from flows.local.stack import find_running
        from tasks.io import read_json
        from tasks.params import load_params

        project = workspace.project
        load_params(project.params)  # DVC would blame dvc.yaml for a fault in it
        moves, last = _moves(workspace), read_json(project.run) or {}
        roles = {role: one for one in _versions(workspace, moves) for role in one["aliases"]}
        champion = roles.get("champion")
        if moves and (champion is None or champion["release"] != moves[-1].release):
            # The pointer decides; the registry may lack its version, or number it differently.
            champion = _scored(workspace, moves[-1].version, moves[-1].release)
        running, pipeline = find_running(workspace.services.folder), workspace.pipeline
        found: dict[str, Any] = {
            "data": {"version": pipeline.data_version(), "source": pipeline.data_source()},
            "signatures": workspace.trust.describe(),
            "stale": sorted(pipeline.changed()),
            "champion": {**champion, "overruled": list(moves[-1].overruled)}
            if champion and moves
            else None,
            "challenger": roles.get("challenger"),
            "history": [
                {**move.model_dump(mode="json"), "told": move.describe()} for move in moves
            ],
            "last_run": {name: last.get(name) for name in ("status", "reason")} if last else None,
            "service": running or None,
        }
    data = found["data"]["version"] or "no version"
    facts = {"data": f"{data if verbose else data[:8]} ({found['data']['source']})"}
    facts["out of date"] = ", ".join(found["stale"]) or "nothing"
    for role in ("champion", "challenger"):
        one = found[role] or {"version": None}
        names = ["accuracy", "loss", "photos", "created", "overruled", *(["uri"] * verbose)]
        names += ["comparison"] if role == "challenger" and one != roles.get("champion") else []
        about = [f"{name} {shown(one[name])}" for name in names if one.get(name)]
        facts[role] = ", ".join([f"version {shown(one['version'])}", *about])
    facts["last run"] = "{status}: {reason}".format_map(last) if last else "none has ended yet"
    up = {name: one for name, one in (found["service"] or {}).items() if name != "pid"}
    facts["service"] = shown(up) if up else "not up; handsigns up starts it"
    facts["signatures"] = found["signatures"]
    facts["moves"] = "\n".join(move.describe() for move in moves[-5:]) or "-"
    echo(json_, found, Listing("Status", facts))


@versions_app.command()
def versions(json_: Json = False) -> None:
    """List every version with its scores and its part in the champion's history."""
    with open_workspace() as workspace:
        found = _versions(workspace, _moves(workspace))
    columns = ("version", "accuracy", "loss", "photos", "created", "aliases", "forced")
    title = "Versions" if found else "There are no versions yet."
    echo(json_, {"versions": found}, Listing(title, found, columns))


def _moves(workspace: "Workspace") -> "tuple[Move, ...]":
    champion = workspace.champion()
    return champion.pointer.moves if champion else ()


def _versions(workspace: "Workspace", moves: "tuple[Move, ...]") -> list[dict[str, Any]]:
    """Registered versions, newest first."""
    from tasks.releases.champion import COMPARISON

    return [
        {
            **_scored(workspace, one.number, one.content_id),
            "aliases": list(one.aliases),
            "promoted": [move.at for move in moves if move.release == one.content_id],
            "forced": any(move.forced for move in moves if move.release == one.content_id),
            "comparison": one.tags.get(COMPARISON),
        }
        for one in sorted(workspace.registry.versions(), key=lambda one: -one.number)
    ]


def _scored(workspace: "Workspace", version: int, release: str | None) -> dict[str, Any]:
    """A version with what its release says of itself."""
    if release is None:
        return {"version": version, "release": None, "uri": "no release"}
    storage, place = workspace.storage, f"releases/{release}/"
    found = {"version": version, "release": release, "uri": storage.uri(place)}
    try:
        metrics, index, manifest = (
            json.loads(storage.get(f"{place}{name}.json"))
            for name in ("metrics", "dataset", "manifest")
        )
        made = {"photos": len(index["photos"]), "created": manifest["facts"]["created"]}
        return {**found, **{name: float(metrics[name]) for name in ("accuracy", "loss")}, **made}
    except (HandsignsError, ValueError, LookupError, TypeError):
        return found  # `verify` says what is wrong with it


@versions_app.command()
def runs(
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many.")] = 20,
    json_: Json = False,
) -> None:
    """Show what happened lately: retrains with their reasons, and moves of the champion."""
    with open_workspace() as workspace:
        moves = _moves(workspace)
    from flows.report import logged_runs

    found = logged_runs(workspace.project)
    for move in moves:
        moved = {"at": move.at, "what": f"v{move.version} is champion", "status": "moved"}
        found.append({**moved, "reason": move.reason})
    found = sorted(found, key=lambda one: one["at"])[-number:]
    title = "Runs, the newest last" if found else "There was no run yet."
    echo(json_, {"runs": found}, Listing(title, found, ("at", "what", "reason")))


@versions_app.command()
def compare(first: Named, second: Named, json_: Json = False) -> None:
    """Score two versions on the same photos, those that neither was trained on."""
    with open_workspace() as workspace, shown_progress() as progress:
        releases = {name: workspace.release(name)[1] for name in (first, second)}
        from tasks.releases.champion import METRICS
        from tasks.releases.comparison import compare_releases

        found, picture = compare_releases(workspace.project, releases, progress)
    old, new = found.champion, found.challenger
    pairs = [(name, getattr(old, name), getattr(new, name)) for name in METRICS]
    pairs += [(f"recall of {r['label']}", r["champion"], r["challenger"]) for r in found.recalls]
    rows = [{"": name, first: before, second: after} for name, before, after in pairs]
    notes = [
        f"Version {second} is right on {found.won} photos that {first} misreads, and wrong on "
        f"{found.lost} others: {found.verdict} (McNemar p = {found.p_value:.3g}).",
        f"Photos that they read differently: {picture}" if picture else "They read all alike.",
    ]
    title = f"{old.n} photos that neither was trained on"
    listing = Listing(title, rows, ("", first, second), notes)
    result = {"first": first, "second": second, "picture": picture and str(picture)}
    echo(json_, {**result, **found.to_json()}, listing)


@versions_app.command()
def verify(version: Named, json_: Json = False) -> None:
    """Check a release's signature, read it back and compare every byte with its manifest."""
    with open_workspace() as workspace:
        from tasks.releases.release import release_uri
        from tasks.releases.release import verify as read_back

        release = read_back(workspace.storage, workspace.find(version))
        moves = [move for move in _moves(workspace) if move.release == release.id and move.forced]
        uri = release_uri(workspace.storage, release.id)
    files, signature = release.files, workspace.trust.describe()
    found = {
        "id": release.id,
        "uri": uri,
        "files": len(files),
        "bytes": sum(digest.bytes for digest in files.values()),
        "facts": release.facts,
        "signature": signature,
        "forced": [move.describe() for move in moves],
    }
    shown = f"{uri}: {len(files)} files, {found['bytes']} bytes, as the manifest says."
    echo(json_, found, " ".join([shown, signature, *(move.describe() for move in moves)]))


@versions_app.command()
def reproduce(version: Named, json_: Json = False) -> None:
    """Rebuild a release from its recorded code, data and parameters, and compare."""
    with open_workspace() as workspace, shown_progress() as progress:
        from flows.reproduce import reproduce as rebuild

        found = rebuild(workspace, version, progress)
    echo(json_, asdict(found), found.describe())
    if not found.identical:
        raise typer.Exit(1)


@versions_app.command()
def promote(
    version: Number,
    reason: Reason = "",
    force: Annotated[
        bool,
        typer.Option("--force", help="Overrule failed checks; needs --reason, and is kept."),
    ] = False,
    json_: Json = False,
) -> None:
    """Make a version the champion."""
    with open_workspace() as workspace:
        from flows.run import show_move

        move = workspace.promote(version, reason or ("" if force else "promoted by hand"), force)
        show_move(workspace, move)
    echo(json_, move.model_dump(mode="json"), move.describe())


@versions_app.command()
def rollback(
    reason: Reason = "rolled back by hand",
    from_: Annotated[
        str | None,
        typer.Option("--from", help="Version to roll back from; another champion stays."),
    ] = None,
    json_: Json = False,
) -> None:
    """Return to the champion before the present one."""
    with open_workspace() as workspace:
        from flows.run import show_move

        move = workspace.rollback(reason, expected=from_)
        show_move(workspace, move)
    echo(json_, move.model_dump(mode="json"), move.describe())


@versions_app.command("rebuild-registry")
def rebuild_registry(json_: Json = False) -> None:
    """Register the releases in storage that the registry lost."""
    with open_workspace() as workspace:
        from tasks.releases.catalog import rebuild_registry as rebuild

        added = rebuild(workspace.storage, workspace.registry)
    lines = [f"Version {one.number} is release {one.content_id}." for one in added]
    result = [{"version": one.number, "release": one.content_id} for one in added]
    echo(json_, {"added": result}, "\n".join(lines) or "The registry has every release.")


@versions_app.command()
def prune(
    keep: Annotated[int, typer.Option(min=0, help="Champions before the present one.")] = 5,
    days: Annotated[float, typer.Option(min=0, help="Keep what is younger.")] = 30.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report.")] = False,
    json_: Json = False,
) -> None:
    """Remove releases, cached photos and records of runs that nothing needs any more."""
    with open_workspace() as workspace, shown_progress() as progress:
        if api := workspace.services.prefect_named():
            from flows.local.clients import point_prefect_at

            point_prefect_at(api, workspace.services.folder, workspace.settings)
        from flows.upkeep import describe_pruned, remove_unneeded

        found = remove_unneeded(workspace, keep, days, dry_run, progress)
    echo(json_, found, describe_pruned(found))


@versions_app.command("open")
def open_(what: Literal["prefect", "mlflow", "page"], json_: Json = False) -> None:
    """Print the address and login of a page, and open it where there is a browser."""
    project = open_project()
    from flows.local.clients import local_credentials
    from flows.local.stack import find_running
    from flows.settings import load_settings

    settings, running = load_settings(), find_running(project.local.resolve())
    configured = {"prefect": settings.prefect_api_url, "mlflow": settings.mlflow_tracking_uri}
    named = configured.get(what)
    running["page"] = "http://127.0.0.1:8000"  # the default of `serve`
    url = named or running.get(what)
    if url is None:
        raise ServiceError(f"No {what} is up. Start it with `handsigns up`.")
    url = url.removesuffix("/api")
    login = None if named or what == "page" else local_credentials(project.local).login
    echo(json_, {"url": url, "login": login}, f"{url}{f'   login {login}' if login else ''}")
    if out.is_terminal and {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        typer.launch(url)


@keys_app.command()
def new(
    folder: Annotated[
        Path | None, typer.Option(help="Takes both keys; .local/keys if not named.")
    ] = None,
    json_: Json = False,
) -> None:
    """Make a key pair; HANDSIGNS_SIGNING_PASSPHRASE, if set, locks the private key."""
    from flows.settings import load_settings
    from tasks.releases.signing import fingerprint, new_keys, public_pem, short

    secret = load_settings().signing_passphrase
    place = (folder or open_project().keys).resolve()
    private, public = new_keys(place, secret.get_secret_value() if secret else None)
    name = short(fingerprint(public_pem(public)))
    shown = (
        f"Key {name}. Keep {private} out of git and where releases are made, as "
        f"HANDSIGNS_SIGNING_KEY; give {public} to all who use them, in HANDSIGNS_PUBLIC_KEYS."
    )
    echo(json_, {"key": name, "private": str(private), "public": str(public)}, shown)


@keys_app.command()
def sign(json_: Json = False) -> None:
    """Sign the champion, and every release that was one, with the present key."""
    with open_workspace() as workspace:
        from tasks.releases.champion import sign_pointer
        from tasks.releases.release import sign_release

        workspace.trust.check_signer()
        if workspace.trust.signing_key is None:
            raise SettingsError(
                "HANDSIGNS_SIGNING_KEY is not set. Make a key with `handsigns keys new` and set it."
            )
        champion = sign_pointer(workspace.storage)
        failed = {}
        releases = {move.release for move in champion.pointer.moves} if champion else set()
        for release in releases:
            try:
                sign_release(workspace.storage, release)
            except ReleaseError as error:  # the others must not stay unsigned for it
                failed[release] = str(error)
    signed = sorted(releases - failed.keys())
    result = {"releases": signed, "not_signed": failed}
    echo(json_, result, Listing("Signed: the champion pointer and releases", result))
    if failed:
        raise typer.Exit(1)
