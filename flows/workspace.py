"""One checkout and its services, each opened when it is first needed."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flows.local.clients import configured_s3
from flows.local.stack import Services
from flows.settings import Settings
from tasks.errors import HandsignsError
from tasks.io import read_json
from tasks.project import Project
from tasks.releases.champion import Champion, Move, read_champion, sync_alias
from tasks.releases.signing import Trust
from tasks.services.s3 import S3Address, Storage
from tasks.stage import Progress

if TYPE_CHECKING:
    from tasks.data.importer import ImportReport, Inbox
    from tasks.model.inference import Classifier
    from tasks.services.dvc import Pipeline, Remote
    from tasks.services.mlflow import Registry

_log = logging.getLogger(__name__)


class Workspace:
    """What commands and flows work on; a context that stops the servers it started."""

    def __init__(self, project: Project, settings: Settings) -> None:
        self.project = project
        self.settings = settings
        # Marks that MLflow's alias may not name the champion; see `repair_alias`.
        self.alias_pending = project.local / "alias_pending"

    def __enter__(self) -> Self:
        folder = self.project.local.resolve()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.services = Services(self.settings, folder)
        return self

    def __exit__(self, *_: object) -> None:
        self.services.stop()

    @cached_property
    def pipeline(self) -> "Pipeline":
        """The stages and the versions of the data."""
        from tasks.services.dvc import Pipeline

        return Pipeline(self.project, self.remote())

    @cached_property
    def storage(self) -> Storage:
        """Where releases are."""
        return Storage(self.services.s3(), self.trust)

    @cached_property
    def trust(self) -> Trust:
        """The keys that releases are signed and verified with."""
        known, secret = self.settings, self.settings.signing_passphrase
        passphrase = secret.get_secret_value() if secret else None
        return Trust(known.public_keys, known.signing_key, passphrase, self.project.champions_seen)

    @cached_property
    def registry(self) -> "Registry":
        """The model registry."""
        from tasks.services.mlflow import Registry

        return Registry(
            self.services.mlflow(),
            self.settings.model_name,
            self.services.mlflow_artifacts(),
            self.services.mlflow_login(),
        )

    def classifier(self, name: str) -> "tuple[Classifier, str]":
        """Load a model by name, version or path; the classifier and its description."""
        path = Path(name)
        if not path.exists():
            self.services.s3(wait=False)  # it gets ready during the imports below

        from tasks.model.inference import load_classifier
        from tasks.params import load_params
        from tasks.releases.release import open_release, verify_folder

        if path.is_dir():
            manifest = verify_folder(path, None, self.trust)
            return open_release(path), f"release {manifest.id}"
        if path.is_file():
            params = load_params(self.project.params)
            classifier = load_classifier(path, params.preprocess, params.labels)
            return classifier, f"file {path}, in no verified release"
        release, folder = self.release(name)
        return open_release(folder), f"{name}, release {release}"

    def release(self, name: str) -> tuple[str, Path]:
        """Fetch and verify a release; its id and its local folder."""
        from tasks.releases.release import fetch

        release = self._find(name)
        return release, fetch(self.storage, release, self.project.releases)

    def verify(self, name: str) -> dict[str, Any]:
        """Read a release back in full and compare it with its manifest."""
        from tasks.releases.release import verify

        release = verify(self.storage, self._find(name))
        champion = self.champion()
        moves = champion.pointer.moves if champion else ()
        files = release.manifest.files
        return {
            "id": release.id,
            "uri": release.uri,
            "files": len(files),
            "bytes": sum(digest.bytes for digest in files.values()),
            "facts": release.manifest.facts,
            "signature": self.trust.describe(),
            "forced": [
                move.describe() for move in moves if move.release == release.id and move.forced
            ],
        }

    def _find(self, name: str) -> str:
        from tasks.releases.catalog import find_release

        return find_release(self.storage, lambda: self.registry, name)

    def champion(self) -> Champion | None:
        """The present champion."""
        return read_champion(self.storage)

    def promote(
        self, version: int, reason: str, force: bool = False, by: str | None = None
    ) -> Move:
        """Make a version the champion; with force also against the gate or a comparison."""
        from tasks.releases.champion import promote

        with self.alias_follows():
            return promote(
                self.storage, self.registry, self.project, version, reason, force=force, by=by
            )

    def rollback(self, reason: str, by: str | None = None, expected: str | None = None) -> Move:
        """Return to the champion before the present one, or before the expected one."""
        from tasks.releases.champion import rollback

        seen = expected and self._find(expected)
        with self.alias_follows():
            return rollback(self.storage, self.registry, reason, by=by, expected=seen)

    def rebuild_registry(self) -> list[dict[str, Any]]:
        """Register the releases in storage that the registry lost."""
        from tasks.releases.catalog import rebuild_registry

        added = rebuild_registry(self.storage, self.registry)
        return [{"version": one.number, "release": one.content_id} for one in added]

    def inbox(self) -> "Inbox | None":
        """List the inbox; None if none is set."""
        if (place := self.settings.inbox) is None:
            return None
        from tasks.data.importer import Inbox, list_bucket, list_folder

        if place.startswith("s3://"):
            name, _, prefix = place.removeprefix("s3://").partition("/")
            bucket = Storage(replace(self.services.s3(), bucket=name))
            listing = list_bucket(bucket, prefix)
        else:
            listing = list_folder(Path(place))
        return Inbox(self.project, place, listing, self.pipeline.data_version())

    def import_new(self, inbox: "Inbox", progress: Progress) -> "ImportReport":
        """Import new photos into `data/`, not yet as a version; they replace a rendered sample."""
        from tasks.data.directory import fetch_data

        project, pipeline = self.project, self.pipeline
        source = pipeline.data_source()
        if source == "photos":
            fetch_data(project, pipeline, progress)
        # What a person put beside the rendered photos must not be removed.
        replace = source == "sample" and not (
            project.data.is_dir() and pipeline.data_state() == "edited"
        )
        report = inbox.import_new(replace, progress)
        _log.info(
            "Inbox %s: %d photos imported%s, %d known already, %d quarantined.",
            inbox.name,
            sum(report.imported.values()),
            " in place of the rendered sample" if replace and report.usable else "",
            sum(report.already_there.values()),
            len(report.quarantined),
        )
        return report

    @contextmanager
    def alias_follows(self) -> Iterator[None]:
        """Move the champion within the block; a crash leaves a mark for the next run."""
        self.alias_pending.touch()
        yield
        self.repair_alias()

    def repair_alias(self) -> bool:
        """Let MLflow's alias name the champion; log, don't raise, if that fails."""
        try:
            if said := sync_alias(self.storage, self.registry):
                _log.warning(said)
        except HandsignsError as error:
            _log.warning("The next run repairs MLflow's alias, which did not follow: %s", error)
            return False
        self.alias_pending.unlink(missing_ok=True)
        return True

    def status(self) -> dict[str, Any]:
        """Where data, registry, champion and the last run stand."""
        from tasks.params import load_params

        load_params(self.project.params)  # DVC would blame dvc.yaml for a fault in it
        champion, versions = self.champion(), self.versions()
        last = read_json(self.project.run) or {}
        moves = champion.pointer.moves if champion else ()
        roles = {role: one for one in versions for role in one["aliases"]}
        if champion:
            # The pointer decides; the registry may lack its version, or number it anew.
            release, number = champion.pointer.release, champion.pointer.version
            known = [one for one in versions if one["release"] == release]
            roles["champion"] = known[0] if known else self._role(number, release)
        return {
            "data": {
                "version": self.pipeline.data_version(),
                "source": self.pipeline.data_source(),
            },
            "signatures": self.trust.describe(),
            "stale": sorted(self.pipeline.changed()),
            "champion": champion
            and {**roles["champion"], "overruled": list(champion.pointer.overruled)},
            "challenger": roles.get("challenger"),
            "history": [
                {**move.model_dump(mode="json"), "told": move.describe()} for move in moves
            ],
            "last_run": {name: last.get(name) for name in ("status", "reason")} if last else None,
        }

    def versions(self) -> list[dict[str, Any]]:
        """Registered versions, newest first, with what their releases say of themselves."""
        champion = self.champion()
        moves = champion.pointer.moves if champion else ()
        return [
            {
                **self._role(one.number, one.content_id),
                "aliases": list(one.aliases),
                "promoted": [move.at for move in moves if move.release == one.content_id],
                "forced": any(move.forced for move in moves if move.release == one.content_id),
            }
            for one in sorted(self.registry.versions(), key=lambda one: -one.number)
        ]

    def _role(self, version: int, release: str | None) -> dict[str, Any]:
        if release is None:
            return {"version": version, "release": None, "uri": "no release"}
        place = f"releases/{release}/"
        found = {"version": version, "release": release, "uri": self.storage.uri(place)}
        try:
            metrics, index, manifest = (
                json.loads(self.storage.get(place + name))
                for name in ("metrics.json", "dataset.json", "manifest.json")
            )
            scores = {name: float(metrics[name]) for name in ("accuracy", "loss")}
            made = {"photos": len(index["photos"]), "created": manifest["facts"]["created"]}
        except (HandsignsError, ValueError, LookupError, TypeError):
            return found  # `verify` says what is wrong with it
        return {**found, **scores, **made}

    def remote(self) -> "Remote | None":
        """The DVC remote of the settings; one in S3 uses the same service as releases."""
        from tasks.services.dvc import Remote

        url, known = self.settings.dvc_remote_url, self.settings
        if url is None:
            return None
        if not url.startswith("s3://"):
            return Remote(url, {})
        if known.s3_endpoint_url or known.aws_access_key_id:
            options = _dvc_options(configured_s3(known))
            if not known.s3_endpoint_url:  # AWS
                del options["endpointurl"]
            return Remote(url, options)
        return Remote(url, {}, lambda: _dvc_options(self.services.s3()))


def _dvc_options(address: S3Address) -> dict[str, str]:
    options = {
        "endpointurl": address.endpoint_url,
        "region": address.region,
        "access_key_id": address.access_key_id,
        "secret_access_key": address.secret_access_key,
        "session_token": address.session_token,
    }
    return {name: text for name, text in options.items() if text}
