"""A real Slurm of two nodes on this machine, in a folder and on ports of its own, for as long as tests ask for it."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = 2
CORES = 4
"""Of a node, whatever the machine has: jobs of tests share cores, as they would share a login node's."""
KILL_WAIT_S = 30
"""Between Slurm's SIGTERM and its SIGKILL, Slurm's own default."""

CONF = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={first_job}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits as long as a credential lives: 2 minutes unless this says 5 s, the least that Slurm takes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
KillWait={kill_wait}
MinJobAge=600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=2
# Jobs here make room for those of the other partition, and are not requeued for it by Slurm.
PartitionName=spare Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=CANCEL
"""


@dataclass(frozen=True)
class Slurm:
    """The cluster, as a user at its login node sees it."""

    environ: dict[str, str]
    """Of every program that is to talk to it."""
    folder: Path

    def ask(self, *command: str) -> str:
        """Run a program of Slurm's (or any other) there; its output. Its failure is the test's, in its own words."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.environ, timeout=60, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str, environ: dict[str, str] | None = None) -> str:
        """`sbatch <words>`; the job's number."""
        command = ("sbatch", "--parsable", *words)
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environ | (environ or {}), timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", job)))

    def wait(self, job: str, *states: str, timeout_s: float = 240) -> str:
        """Wait until the job shows one of these states (any in which it is over, unless given); that state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        return self.until(
            lambda: state if (state := self.show(job)["JobState"]) in (states or over) else "",
            timeout_s=timeout_s,
            what=f"job {job} to be {' or '.join(states or over)}",
        )

    def until(self, check: Callable[[], str], *, timeout_s: float = 240, what: str = "something") -> str:
        """Ask until the answer is not empty; that answer."""
        deadline = time.monotonic() + timeout_s
        while not (answer := check()):
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}\n{self.ask('squeue')}"
            time.sleep(0.2)
        return answer


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Two nodes of four cores, no GPUs; ended with everything that ran on it, whatever a test did."""
    # Debian keeps daemons where only root's PATH leads.
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("only root may start a Slurm whose jobs are to run")
    with ExitStack() as stack:
        # Not under pytest's own folder: munged wants every folder above its socket open to all.
        folder = Path(tempfile.mkdtemp(prefix="fat_train_slurm_"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        cluster = Slurm({**inherited, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}, folder)
        stack.callback(_end_all, folder)
        _start(cluster, stack)
        stack.callback(cancel_all, cluster)
        yield cluster


def _start(cluster: Slurm, stack: ExitStack) -> None:
    folder = cluster.folder
    folder.chmod(0o755)
    for name in ("state", *(f"spool-node{i}" for i in range(NODES))):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    ports = _free_ports(1 + NODES)
    # Job numbers give Lightning its port: those of another Slurm of another test process must not be the same.
    conf = CONF.format(folder=folder, ports=ports, kill_wait=KILL_WAIT_S, first_job=1 + os.getpid() % 9000)
    nodes = [
        f"NodeName=node{i} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1 + i]} CPUs={CORES}\n"
        for i in range(NODES)
    ]
    (folder / "slurm.conf").write_text("".join(nodes) + conf)

    def start(*command: str) -> None:
        log = stack.enter_context((folder / f"{command[0]}.out").open("a"))
        process = subprocess.Popen(
            command, env=cluster.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        stack.callback(_end, process)

    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    start("munged", "--foreground", *(f"--{option}={folder}/munge.{end}" for option, end in files.items()))
    cluster.until(lambda: "yes" if (folder / "munge.socket").exists() else "", timeout_s=20, what="munged")
    start("slurmctld", "-D")
    for i in range(NODES):
        start("slurmd", "-D", "-N", f"node{i}")
    try:
        cluster.until(lambda: _idle(cluster), timeout_s=60, what="idle nodes")
    except (AssertionError, subprocess.TimeoutExpired) as error:
        logs = "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log")))
        pytest.fail(f"Slurm does not start here: {error}\n{logs}")


def _idle(cluster: Slurm) -> str:
    done = subprocess.run(
        ["sinfo", "-h", "-o", "%T %D"], capture_output=True, text=True, env=cluster.environ, timeout=60, check=False
    )
    return done.stdout if done.stdout.strip() == f"idle {NODES}" else ""


def cancel_all(cluster: Slurm) -> None:
    """Nicely first: Slurm ends the jobs and their steps."""
    with suppress(AssertionError, subprocess.SubprocessError):
        for job in cluster.ask("squeue", "-h", "-o", "%A").split():
            cluster.ask("scancel", "--signal=KILL", "--full", job)
            cluster.ask("scancel", job)
        cluster.until(lambda: "" if cluster.ask("squeue", "-h") else "none", timeout_s=20, what="an empty queue")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_all(folder: Path) -> None:
    """What is left of its daemons, steps and jobs: the processes whose SLURM_CONF is in this very folder."""
    mark = f"SLURM_CONF={folder}/".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        pid = int(environ.parent.name)
        with suppress(OSError):
            if pid != os.getpid() and mark in environ.read_bytes():
                os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; none that the system gives away by itself, nor those of training (15000 on)."""
    ports: list[int] = []
    for port in random.sample(range(25000, 32000), 7000):
        with closing(socket.socket()) as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    pytest.fail("no free ports here")
