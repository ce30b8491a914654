"""A clone that has the results is clean under every command of DVC that a user types."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "status": "Data and pipelines are up to date.",
    "checkout": "",
    "data status": "No changes.",
    "stage list --all": "report",
    "dag": "prepare",
    "metrics show": "experiments/report/text.json",
    "params diff HEAD": "",
    "exp list --all": "saved",
    "exp show --csv": "saved",
    "exp apply saved": "have been applied",
    "gc --workspace --dry --force": "",
    "push": "Everything is up to date.",
    "pull": "Everything is up to date.",
    "repro --dry": "Data and pipelines are up to date.",
}
# What `dvc gc` says first, whatever it finds.
ANNOUNCED = "WARNING: This will remove all cache except items used in the workspace of the current repo.\n"


@pytest.fixture(scope="module")
def call(warm_dvc):
    """Runs a command, which must succeed, and gives what it prints."""
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}
    for who in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{who}_NAME": "atr", f"GIT_{who}_EMAIL": "atr@localhost"}

    def call(folder, *command):
        if command[0] == "dvc":
            done = warm_dvc.run("-m", *command, cwd=folder, env=environment)
        else:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    return call


@pytest.fixture(scope="module")
def clone(call, tmp_path_factory):
    """A clone of a repository like ours in which all stages have run and an experiment was saved."""
    home = tmp_path_factory.mktemp("clone")
    origin, clone = home / "origin", home / "clone"
    for name in call(ROOT, "git", "ls-files", "-z").split("\0")[:-1]:
        if (ROOT / name).is_file():
            (origin / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, origin / name)
    call(origin, "git", "init", "-q")
    leave_results(origin)
    call(origin, "dvc", "remote", "add", "-q", "--default", "store", str(home / "remote"))
    call(origin, "dvc", "commit", "--force", "--quiet")
    call(origin, "git", "add", "--all")
    call(origin, "git", "commit", "-qm", "ran")
    call(origin, "dvc", "exp", "save", "-q", "-n", "saved")
    call(origin, "dvc", "push", "-q")
    call(home, "git", "clone", "-q", origin, clone)
    call(clone, "git", "fetch", "-q", "origin", "refs/exps/*:refs/exps/*")
    call(clone, "dvc", "pull", "-q")
    return clone


def leave_results(folder):
    """Something in place of each output of a stage, without running any."""
    with Repo(str(folder)) as repo:
        paths = [Path(out.fs_path) for out in repo.index.outs]
    for path in paths:
        if not path.exists():
            file = path if path.suffix else path / "part"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")
    (folder / "data/features/pretrain/components.png").touch()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_clone_is_clean_under(command, call, clone):
    said = call(clone, "dvc", *command.split())
    assert COMMANDS[command] in said
    assert "data/micro/training" not in said
    assert {"ERROR", "WARNING"} & set(said.replace(ANNOUNCED, "").replace(":", " ").split()) == set()
