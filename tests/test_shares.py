"""The study over several machines: shares, in a real Slurm where it is installed."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from common import read_json, read_runs

import pytest

from tests.test_run_all import ROOT, SMALL, clone, environment, run_all  # noqa: F401, a fixture

SETTINGS = {**SMALL, "FC_LEARNING_RATES": "0.01 0.02"}
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


def test_shares_train_everything_once_and_leave_evaluation_to_a_plain_call(clone):  # noqa: F811
    printed, trained = [], []
    python = clone / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    settings = {**SETTINGS, "PYTHON": "python", "PATH": f"{python.parent}:{os.environ['PATH']}"}
    for share in ("1/2", "2/2", "1/2"):
        result = run_all(clone, "--share", share, **settings)
        assert result.returncode == 0, result.stdout + result.stderr
        printed.append(result.stdout)
        trained.append(set(read_runs(clone / "out")))
    assert "the rest waits for 4 runs of other shares" in printed[0]
    assert [len(names) for names in trained] == [3, 3 + 4 + 1, 3 + 4 + 2]
    assert all("a plain bash run_all.sh evaluates" in text for text in printed[1:])
    assert not (clone / "out/summary.json").exists()


@pytest.mark.parametrize("share", ["", "0/2", "3/2", "1", "1/2/3", "a/b"])
def test_a_share_that_is_none_is_refused(clone, share):  # noqa: F811
    result = run_all(clone, "--share", share, **SETTINGS)
    assert result.returncode != 0 and "such as 2/4" in result.stderr


@pytest.fixture
def slurm():
    """The environment of a Slurm of one node, which ends with the test."""
    path = os.environ["PATH"] + ":/usr/sbin"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"Slurm is not installed or this is not root ({', '.join(missing)} missing)")
    folder = Path(f"/tmp/slurm-{os.getpid()}")  # short: the path of a socket has a limit
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
AuthInfo=socket={folder}/munge
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
NodeName={host} CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP OverSubscribe=FORCE
""")
    place = {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": path}
    files = [f"--{name}-file={folder}/{name}" for name in ("key", "pid", "log", "seed")]
    servers = [["munged", "--foreground", f"--socket={folder}/munge", *files, "--force"]]
    servers += [["slurmctld", "-D"], ["slurmd", "-D"]]
    started = []
    for command in servers:
        started.append(
            subprocess.Popen(
                command,
                env=os.environ | place,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        time.sleep(1)
    yield place
    for server in reversed(started):
        server.terminate()
        server.wait(timeout=20)
    shutil.rmtree(folder)


def test_the_three_lines_of_the_readme_run_the_study_in_slurm(clone, slurm):  # noqa: F811
    lines = "\n".join(re.findall(r"^.*\bsbatch .*$", (ROOT / "README.md").read_text(), re.M))
    assert lines.count("sbatch") == 3
    lines = lines.replace("--gpus=1 ", "")  # this node has none
    study = {**SETTINGS, "JOBS": "1", "SEEDS": "0 1", "TRAIN_PHOTOS": "7"}
    settings = environment(study) | slurm
    subprocess.run(["bash", "-ec", lines], cwd=clone, env=settings, check=True)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        queue = subprocess.run(["squeue", "-h"], env=settings, capture_output=True, text=True)
        if not queue.stdout.strip():
            break
        time.sleep(2)
    logs = "".join(path.read_text() for path in clone.glob("slurm-*.out"))
    assert (clone / "out/report.pdf").exists(), logs[-3000:]
    summary, report = read_json(clone / "out/summary.json"), (clone / "out/report.md").read_text()
    assert {len(row["seeds"]) for row in summary["models"]} == {2}
    chosen = [row for row in summary["models"] if "last 2" not in row["label"]]  # of several rates
    assert all(row["fresh_seeds"] == [1] for row in chosen)
    assert len(summary["slopes"]) == 4 and "figures/sizes.png" in report
