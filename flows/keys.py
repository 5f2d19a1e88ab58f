"""The verbs `handsigns keys new` and `handsigns keys sign`."""

import subprocess
from pathlib import Path
from typing import Annotated

import typer

from flows.output import Json, echo, open_project, open_workspace
from tasks.errors import ReleaseError, SettingsError

keys_app = typer.Typer(help="Make keys, and sign releases.", no_args_is_help=True)


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

    place = (folder or open_project().keys).resolve()
    refuse_tracked(place)
    secret = load_settings().signing_passphrase
    private, public = new_keys(place, secret.get_secret_value() if secret else None)
    name = short(fingerprint(public_pem(public)))
    shown = (
        f"Key {name}. Keep {private} where releases are made, as HANDSIGNS_SIGNING_KEY; "
        f"give {public} to all who use them, in HANDSIGNS_PUBLIC_KEYS."
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
        signed, failed = [], {}
        for release in sorted(
            {move.release for move in champion.pointer.moves} if champion else ()
        ):
            try:
                sign_release(workspace.storage, release)
                signed.append(release)
            except ReleaseError as error:  # the others must not stay unsigned for it
                failed[release] = str(error)
    done = f"Signed: the champion pointer and {len(signed)} releases."
    lines = [done if champion else "There is no champion to sign."]
    lines += [f"Not signed, {release}: {reason}" for release, reason in failed.items()]
    echo(json_, {"releases": signed, "not_signed": failed}, "\n".join(lines))
    if failed:
        raise typer.Exit(1)


def refuse_tracked(folder: Path) -> None:
    """Refuse a folder from which the next `git add` would take a private key."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    command = ["git", "-C", str(existing), "check-ignore", "--quiet", str(folder / "signing.pem")]
    try:
        code = subprocess.run(command, capture_output=True, timeout=20, check=False).returncode  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return  # without git nothing can be added to it
    if code == 1:
        raise SettingsError(
            f"git would take a private key in '{folder}'. "
            "Name a folder that is ignored, or one outside of the checkout."
        )
