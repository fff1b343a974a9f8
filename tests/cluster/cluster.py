"""A SLURM of two nodes on this machine, with daemons, ports and files of its own: no other is touched or needed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.helpers import REPO, free_port

SECONDS = 150
"""That a job may take, its times in the queue included."""
NODES = ("127.0.0.1", "127.0.0.2")
"""Names that resolve everywhere, as those of nodes do on a cluster."""

# proctrack/linuxproc and task/none: control groups are often not to be had in a container. Cores and GPUs are on paper:
# as many as the scripts ask for.
CONFIGURATION = """
ClusterName=clipq
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
KillWait=20
MinJobAge=3600
JobCompType=jobcomp/none
PartitionName=all Nodes=ALL Default=YES MaxTime=5 State=UP
"""


def why_not() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.geteuid() != 0:
        return "only root can start the daemons of SLURM"
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "setpriv") if _path_of(name) is None]
    return f"{', '.join(missing)} missing: tests/cluster/install_slurm.sh installs SLURM" if missing else None


def _path_of(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Cluster:
    """Jobs on the cluster, submitted from `world`."""

    def __init__(self, configuration: Path, world: Path) -> None:
        self.world = world
        self.environment = os.environ | {
            "SLURM_CONF": str(configuration),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")])),
            "CLIPQ_HOME": str(REPO),
            "CLIPQ_VENV": sys.prefix,
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *command: str, check: bool = True) -> str:
        """What a command of SLURM says."""
        done = subprocess.run(
            command, cwd=self.world, env=self.environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        """Submits a script of `slurm/`, as two tasks on two nodes unless `options` say otherwise; its number."""
        small = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=5")
        return self.call("sbatch", "--parsable", *small, *options, str(REPO / "slurm" / script), *arguments)

    def show(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, ExitCode, Restarts and so on."""
        shown = self.call("scontrol", "show", "job", "--oneliner", job)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def shorten(self, job: str) -> None:
        """Lets the time of a job be up in 40 to 100 seconds, so that a warning 100 before it comes at once.

        At once is within 30 seconds, since SLURM looks that often. Limits are whole minutes, and a job that
        had one minute from the start could get its warning before it trains.
        """
        hours, minutes, seconds = map(int, self.show(job)["RunTime"].split(":"))
        limit = hours * 60 + minutes + (seconds + 40 + 59) // 60
        self.call("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")

    def wait(self, job: str, state: str) -> dict[str, str]:
        """Waits for a job to come to a state. One that was queued again need not wait its two minutes."""
        deadline, hastened = time.monotonic() + SECONDS, set()
        while (shown := self.show(job))["JobState"] != state:
            assert time.monotonic() < deadline, f"job {job} is {shown['JobState']}: {shown['Reason']}\n{self.log(job)}"
            ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
            assert shown["JobState"] not in ended, f"job {job} is {shown['JobState']}\n{self.log(job)}"
            restarts = shown["Restarts"]
            if shown["JobState"] == "PENDING" and shown["Reason"] == "BeginTime" and restarts not in hastened:
                hastened.add(restarts)
                # Not at once: what ended in the same second is taken for the job that begins, which is then refused.
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now+4", "TimeLimit=5")
            time.sleep(0.2)
        return shown

    def log(self, job: str) -> str:
        """What a job has written, the logs of its nodes included."""
        files = sorted(self.world.glob(f"*_{job}.log")) + sorted(self.world.glob(f"*_{job}_*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files)


def wait_for(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.01)


@contextmanager
def running(folder: Path, world: Path) -> Iterator[Cluster]:
    """Starts the daemons, and ends them and all that runs under them."""
    host, lines = socket.gethostname(), []
    for node in NODES:
        lines.append(f"NodeName={node} NodeHostname={host} NodeAddr={node} Port={free_port()} CPUs=96 Gres=gpu:8")
    (folder / "slurm.conf").write_text(
        "\n".join([CONFIGURATION.format(folder=folder, host=host, port=free_port()), *lines, ""])
    )
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(256))
    key.chmod(0o400)
    files = {"key": key, **{f: folder / f"munge.{f}" for f in ("socket", "pid-file", "log-file", "seed-file")}}
    cluster = Cluster(folder / "slurm.conf", world)
    with ExitStack() as daemons:
        start = cluster.environment
        # --force: where the folder lies is none of its business, only tests are at stake
        munge = [f"--{'key-file' if name == 'key' else name}={path}" for name, path in files.items()]
        daemons.enter_context(_daemon(folder, "munged", "--foreground", "--force", *munge, env=start))
        wait_for(files["socket"].exists, (folder / "munged.log").read_text)
        controller = daemons.enter_context(_daemon(folder, "slurmctld", "-D", "-i", env=start))
        for node in NODES:
            daemons.enter_context(_daemon(folder, "slurmd", "-D", "-N", node, env=start))
        daemons.callback(_clear, cluster)
        told = [folder / f"{name}.log" for name in ("munged", "slurmctld", "slurmd")]

        def ready() -> bool:
            assert controller.poll() is None, "slurmctld ended"
            return cluster.call("sinfo", "--noheader", "--format=%D%T", check=False) == f"{len(NODES)}idle"

        wait_for(ready, lambda: "the nodes do not come up\n" + "\n".join(log.read_text() for log in told))
        yield cluster


def _clear(cluster: Cluster) -> None:
    """Ends all jobs, while there are daemons to end them."""
    cluster.call("scancel", "--user=root", check=False)
    deadline = time.monotonic() + 30
    while cluster.call("squeue", "--noheader", check=False) and time.monotonic() < deadline:
        time.sleep(0.2)


@contextmanager
def _daemon(folder: Path, name: str, *arguments: str, env: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A daemon in the foreground. It ends with this process, also where that is killed."""
    program = _path_of(name)
    assert program
    with (folder / f"{name}.log").open("a") as log:
        command = ["setpriv", "--pdeathsig", "TERM", program, *arguments]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
