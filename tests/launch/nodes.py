"""Two nodes on one machine: network namespaces joined by a cable, each with its own address, names and empty resolv.conf."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.runs import ROOT, environment

INTERFACE = "rhnode0"  # in both of them


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], text=True, capture_output=True, timeout=20)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def why_not() -> str | None:
    """Why no namespace can be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (the command ip)"
    name = f"rhtry-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], text=True, capture_output=True, timeout=20)
    if made.returncode != 0:
        return f"this system makes no network namespace: {made.stderr.strip()}"
    ip("netns", "del", name)
    return None


class Nodes:
    """The namespaces `names`, reached as node-0 and node-1; `close` takes everything away again."""

    def __init__(self) -> None:
        tag = uuid.uuid4().hex[:8]
        self.names = [f"rh-{tag}-{k}" for k in range(2)]
        self.started: list[subprocess.Popen[bytes]] = []
        try:
            for name in self.names:
                ip("netns", "add", name)
            a, b = self.names
            ip("link", "add", INTERFACE, "netns", a, "type", "veth", "peer", "name", INTERFACE, "netns", b)
            for k, name in enumerate(self.names):
                ip("-n", name, "addr", "add", f"10.201.77.{k + 1}/24", "dev", INTERFACE)
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", INTERFACE, "up")
                folder = Path("/etc/netns") / name  # `ip netns exec` lays these over /etc
                folder.mkdir(parents=True)
                (folder / "hosts").write_text("127.0.0.1 localhost\n10.201.77.1 node-0\n10.201.77.2 node-1\n")
                (folder / "resolv.conf").write_text("")
        except BaseException:
            self.close()
            raise

    def start(self, node: int, command: Sequence[str | Path], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Starts a command on a node; what it prints goes to `log`."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], *map(str, command)],
                cwd=ROOT, env={**environment(), **variables}, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.started.append(process)
        return process

    def cut(self, node: int) -> None:
        """Packets from and to the node vanish from now on."""
        ip("-n", self.names[node], "link", "set", INTERFACE, "down")

    def join(self, node: int) -> None:
        ip("-n", self.names[node], "link", "set", INTERFACE, "up")

    def processes(self, node: int) -> list[int]:
        """The ids of what runs on a node."""
        told = subprocess.run(["ip", "netns", "pids", self.names[node]], text=True, capture_output=True, timeout=20)
        return [int(pid) for pid in told.stdout.split()]

    def environments(self, node: int) -> list[bytes]:
        """/proc/*/environ of every process on a node."""
        found = []
        for pid in self.processes(node):
            try:
                found.append(Path(f"/proc/{pid}/environ").read_bytes())
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
        return found

    def close(self) -> None:
        for node, name in enumerate(self.names):
            for number in (signal.SIGTERM, signal.SIGKILL):
                for pid in self.processes(node):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                deadline = time.monotonic() + 10
                while self.processes(node) and time.monotonic() < deadline:
                    time.sleep(0.1)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds another's
            Path("/etc/netns").rmdir()
        for process in self.started:
            process.wait(timeout=20)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
