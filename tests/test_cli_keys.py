"""Making keys on the command line."""

import json
import stat
import subprocess
from pathlib import Path

import pytest

from flows.keys import refuse_tracked
from tasks.errors import SettingsError
from tasks.releases.signing import PUBLIC_KEY, new_keys
from tests.fixtures.checkouts import BIN


def test_a_new_pair_lies_where_it_was_asked_for(tmp_path: Path) -> None:
    command = [BIN / "handsigns", "keys", "new", "--folder", tmp_path / "keys", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    told = json.loads(done.stdout)
    assert done.returncode == 0
    assert stat.S_IMODE(Path(told["private"]).stat().st_mode) == 0o600
    assert len(told["key"]) == 16
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 1
    assert "must not be replaced" in again.stderr
    assert again.stderr.count("\n") == 1


def test_half_a_pair_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / PUBLIC_KEY).write_text("somebody's")
    with pytest.raises(SettingsError, match=f"must not be replaced.*{PUBLIC_KEY}"):
        new_keys(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PUBLIC_KEY]


def test_no_private_key_where_git_would_take_it(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("/.local/\n")
    refuse_tracked(tmp_path / ".local" / "keys")
    with pytest.raises(SettingsError, match="git would take a private key"):
        refuse_tracked(tmp_path / "keys")
