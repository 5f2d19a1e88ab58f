"""One checkout and its services, each opened when it is first needed."""

from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from flows.local.stack import Services, embedded
from flows.settings import Settings
from tasks.project import Project
from tasks.releases.pointer import Move, read_champion
from tasks.releases.signing import Trust
from tasks.services.s3 import Storage

if TYPE_CHECKING:
    from tasks.model.inference import Classifier
    from tasks.services.dvc import Pipeline, Remote
    from tasks.services.mlflow import Registry


class Workspace:
    """What commands and flows work on.

    As a context it stops, at the end, the local servers that it started.

    Args:
        project: the checkout; the working directory.
        settings: from the environment.
    """

    def __init__(self, project: Project, settings: Settings) -> None:
        self.project = project
        self.settings = settings
        self._embedded = embedded(settings, project)

    def __enter__(self) -> Self:
        self.services: Services = self._embedded.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._embedded.__exit__(kind, error, trace)

    @cached_property
    def pipeline(self) -> "Pipeline":
        """The stages and the data's versions."""
        from tasks.services.dvc import Pipeline

        return Pipeline(self.project, self.pipeline_remote())

    @cached_property
    def storage(self) -> Storage:
        """Where releases are."""
        return Storage(self.services.s3(), self.trust)

    @cached_property
    def trust(self) -> Trust:
        """Whose signatures releases must have, and how ours are made."""
        known = self.settings
        secret = known.signing_passphrase
        return Trust(
            known.public_keys,
            known.signing_key,
            secret.get_secret_value() if secret else None,
            self.project.champions_seen,
        )

    @cached_property
    def registry(self) -> "Registry":
        """Where versions are."""
        from tasks.services.mlflow import Registry

        return Registry(
            self.services.mlflow(),
            self.settings.model_name,
            self.services.mlflow_artifacts(),
            self.services.mlflow_login(),
        )

    def classifier(self, name: str) -> "tuple[Classifier, str]":
        """Load a model that a person named.

        Args:
            name: `champion`, `challenger`, a version's number, or the path of a
                release's folder or of a .keras or .pb file of this checkout's parameters.

        Returns:
            The classifier, and what it is in words.

        Raises:
            ReleaseError: there is no such release, or it is not what its manifest says.
        """
        path = Path(name)
        if not path.exists():
            self.services.start_s3()  # while it gets ready, the imports below run

        from tasks.model.inference import load_classifier
        from tasks.params import load_params
        from tasks.releases.release import fetch, open_release, verify_folder
        from tasks.releases.versions import find_release

        if path.is_dir():
            found = verify_folder(path, None, self.trust)
            return open_release(path), f"release {found.id}"
        if path.is_file():
            detail = load_params(self.project.params).preprocess.detail
            return load_classifier(path, detail), f"file {path}, in no verified release"
        release = find_release(self.storage, lambda: self.registry, name)
        folder = fetch(self.storage, release, self.project.releases)
        return open_release(folder), f"{name}, release {release}"

    def promote(
        self, version: int, reason: str, force: bool = False, by: str | None = None
    ) -> Move:
        """Make a version the champion; with force also one that something speaks against."""
        from tasks.releases.champion import promote

        return promote(
            self.storage, self.registry, self.project, version, reason, force=force, by=by
        )

    def rollback(self, reason: str, by: str | None = None, expected: str | None = None) -> Move:
        """Return to the champion before the present one."""
        from tasks.releases.champion import rollback
        from tasks.releases.versions import find_release

        seen = expected and find_release(self.storage, lambda: self.registry, expected)
        return rollback(self.storage, self.registry, reason, by=by, expected=seen)

    def rebuild_registry(self) -> list[dict[str, Any]]:
        """Register the releases in storage that the registry lost."""
        from tasks.releases.versions import rebuild_registry

        added = rebuild_registry(self.storage, self.registry)
        return [{"version": one.number, "release": one.content_id} for one in added]

    def release(self, name: str) -> tuple[str, Path]:
        """Fetch and verify a release that a person named; its id and its local folder."""
        from tasks.releases.release import fetch
        from tasks.releases.versions import find_release

        release = find_release(self.storage, lambda: self.registry, name)
        return release, fetch(self.storage, release, self.project.releases)

    def verify(self, name: str) -> dict[str, Any]:
        """Read a release back whole and compare it with its manifest."""
        from tasks.releases.release import verify
        from tasks.releases.versions import find_release

        release = verify(self.storage, find_release(self.storage, lambda: self.registry, name))
        files = release.manifest.files
        return {
            "id": release.id,
            "uri": release.uri,
            "files": len(files),
            "bytes": sum(digest.bytes for digest in files.values()),
            "facts": release.manifest.facts,
            "signature": self.trust.describe(),
            "forced": self._forced(release.id),
        }

    def _forced(self, release: str) -> list[str]:
        """Moves that made a release champion in spite of something, in words."""
        champion = read_champion(self.storage)
        moves = champion.pointer.moves if champion else ()
        return [move.describe() for move in moves if move.release == release and move.forced]

    def status(self) -> dict[str, Any]:
        """Where the checkout, the registry and the champion stand."""
        from tasks.params import load_params
        from tasks.services.mlflow import CHALLENGER

        load_params(self.project.params)  # DVC would blame dvc.yaml for what is wrong there
        champion = read_champion(self.storage)
        challenger = self.registry.version_by_alias(CHALLENGER)
        moves = champion.pointer.moves if champion else ()
        # The registry's numbers of today: it may have been begun anew since a move.
        numbers = {one.content_id: one.number for one in self.registry.versions()}
        return {
            "data": {
                "version": self.pipeline.data_version(),
                "source": self.pipeline.data_source(),
            },
            "signatures": self.trust.describe(),
            "stale": sorted(self.pipeline.changed()),
            "champion": champion
            and {
                **self._role(
                    numbers.get(champion.pointer.release, champion.pointer.version),
                    champion.pointer.release,
                ),
                "overruled": list(champion.pointer.overruled),
            },
            "challenger": challenger and self._role(challenger.number, challenger.content_id),
            "history": [
                {**move.model_dump(mode="json"), "told": move.describe()} for move in moves
            ],
        }

    def _role(self, version: int, release: str | None) -> dict[str, Any]:
        uri = self.storage.uri(f"releases/{release}/") if release else "no release"
        return {"version": version, "release": release, "uri": uri}

    def pipeline_remote(self) -> "Remote | None":
        """Where photos are pushed, if a setting says so."""
        from tasks.services.dvc import Remote

        known = self.settings
        if known.dvc_remote_url is None:
            return None
        options: dict[str, str] = {}
        if known.dvc_remote_url.startswith("s3://"):
            if not known.s3_endpoint_url and not known.aws_access_key_id:
                return Remote(known.dvc_remote_url, options, self._local_s3)
            secrets = {
                "access_key_id": known.aws_access_key_id,
                "secret_access_key": known.aws_secret_access_key,
                "session_token": known.aws_session_token,
            }
            options = {name: value.get_secret_value() for name, value in secrets.items() if value}
            options["region"] = known.s3_region
            if known.s3_endpoint_url:
                options["endpointurl"] = known.s3_endpoint_url
        return Remote(known.dvc_remote_url, options)

    def _local_s3(self) -> dict[str, str]:
        """What DVC is told of the local server."""
        address = self.services.s3()
        return {
            "endpointurl": address.endpoint_url,
            "access_key_id": str(address.access_key_id),
            "secret_access_key": str(address.secret_access_key),
        }
