"""The verbs `handsigns keys new` and `handsigns keys sign`."""

import subprocess
from pathlib import Path
from typing import Annotated

import typer

from flows.command import Json, open_project, open_workspace
from flows.output import echo
from tasks.errors import SettingsError

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
    echo(json_, {"key": name, "private": str(private), "public": str(public)}, said)


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
    echo(json_, {"releases": releases, "not_signed": gone}, "\n".join(told))
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
