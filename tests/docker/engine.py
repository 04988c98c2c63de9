"""A Docker engine with compose for tests: the machine's own if there is one, else a `dockerd` that is started here.

What is started here lives below `$STEPSTREAM_TEST_DOCKER` (default /tmp/stepstream-docker): socket, images and log.
Several processes (pytest-xdist's) share one: whoever started it stops it when the others are done with it.
It has no default bridge, so that it does not meddle with another engine's; containers talk over compose's networks.
Compose is built from its Go module into `$STEPSTREAM_TEST_CACHE` (default ~/.cache/stepstream-tests) where it is not.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

__all__ = ["CACHE", "COMPOSE_VERSION", "Engine", "unavailable"]

COMPOSE_VERSION = "v2.40.3"
CACHE = Path(os.environ.get("STEPSTREAM_TEST_CACHE") or Path.home() / ".cache" / "stepstream-tests")
FOLDER = Path(os.environ.get("STEPSTREAM_TEST_DOCKER") or "/tmp/stepstream-docker")
_DEBIANS = Path("/usr/bin/docker")
_ADDRESSES = "base=10.213.0.0/16,size=24"
_START_S = 60


def _answers(*command: str) -> bool:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    return False


def _has_engine() -> bool:
    return shutil.which("docker") is not None and _answers("docker", "info", "--format", "{{.ServerVersion}}")


def unavailable() -> str | None:
    """Why there is no engine and none can be started; None if there is one or one can."""
    if _has_engine():
        return None
    if shutil.which("docker") is None or shutil.which("dockerd") is None:
        return "no Docker engine answers, and there is no dockerd to start one (Debian: docker.io)"
    if os.geteuid() != 0:
        return "no Docker engine answers, and only root can start one"
    if shutil.which("iptables") is None:
        return "no Docker engine answers, and dockerd needs iptables"
    if not _answers("docker", "compose", "version") and _compose_file() is None and shutil.which("go") is None:
        return "no compose v2: neither `docker compose` nor Go to build it with"
    return None


def _compose_file() -> Path | None:
    file = CACHE / f"compose-{COMPOSE_VERSION}" / "cli-plugins" / "docker-compose"
    return file if file.exists() else None


def _build_compose() -> Path:
    """The folder to give as DOCKER_CONFIG: compose is its plugin. Built at the first call; RuntimeError if it fails."""
    folder = CACHE / f"compose-{COMPOSE_VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _compose_file() is None:
            module = folder / "module"
            shutil.rmtree(module, ignore_errors=True)
            module.mkdir()
            package = "github.com/docker/compose/v2"
            built = module / "docker-compose"
            version = f"-X {package}/internal.Version={COMPOSE_VERSION}"
            for step in (
                ("go", "mod", "init", "compose"),
                ("go", "get", "-tool", f"{package}/cmd@{COMPOSE_VERSION}"),
                ("go", "build", "-ldflags", f"-s -w {version}", "-o", str(built), f"{package}/cmd"),
            ):
                done = subprocess.run(step, cwd=module, capture_output=True, text=True, timeout=900, check=False)
                if done.returncode:
                    raise RuntimeError(f"compose cannot be built: {' '.join(step)}: {done.stderr[-2000:]}")
            plugins = folder / "cli-plugins"
            plugins.mkdir(exist_ok=True)
            built.rename(plugins / "docker-compose")
            shutil.rmtree(module)
    return folder


class Engine:
    """An engine that answers inside a `with`; one that was started there is stopped behind it.

    `own`: whether it is one of ours, below `folder`, and so without access to registries.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder, self.own = folder, not _has_engine()
        self.process: subprocess.Popen[bytes] | None = None
        self._use: IO[str] | None = None
        self.environment = {**os.environ, "DOCKER_CLI_HINTS": "false", "COMPOSE_MENU": "false"}
        self.client = "docker"
        if self.own:
            # Debian's client of the same version has BuildKit inside; a newer one wants a plugin for it.
            self.client = str(_DEBIANS) if _DEBIANS.exists() else "docker"
            self.environment |= {"DOCKER_HOST": f"unix://{folder / 'docker.sock'}", "DOCKER_BUILDKIT": "1"}

    def __enter__(self) -> Self:
        if self.own:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.alone("start"):
                self._start()
                self._use = (self.folder / "in-use").open("w")
                fcntl.flock(self._use, fcntl.LOCK_SH)
        try:
            if not self.answers("compose", "version"):
                self.environment["DOCKER_CONFIG"] = str(_build_compose())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stops what was started here, when nobody else uses it any more."""
        if self._use is None:
            return
        while self.process is not None:
            with self.alone("start"):
                if self._alone_here():
                    self._stop(self.process)
                    break
            time.sleep(0.5)
        self._use.close()

    def _alone_here(self) -> bool:
        """Whether no other process uses the engine."""
        assert self._use is not None
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._use, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Inside of it no other process does what has this name with the engine."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{what}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _start(self) -> None:
        if self.answers("info"):
            return
        # dockerd that finds forwarding off turns it on and makes the firewall drop all that is not its own.
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        (self.folder / "pid").unlink(missing_ok=True)
        with (self.folder / "dockerd.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *("dockerd", "--host", f"unix://{self.folder / 'docker.sock'}", "--bridge", "none"),
                    *("--data-root", str(self.folder / "data"), "--exec-root", str(self.folder / "exec")),
                    *("--pidfile", str(self.folder / "pid"), "--storage-driver", "overlay2"),
                    *("--default-address-pool", _ADDRESSES, "--log-level", "warn"),
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while not self.answers("info"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "dockerd.log").read_text("utf-8", "replace").splitlines()[-15:]
                raise RuntimeError("dockerd did not start:\n" + "\n".join(tail))
            time.sleep(0.2)

    # ---- commands

    def command(self, *arguments: str) -> list[str]:
        """The command line of `docker ...` for this engine; `environment` goes with it."""
        return [self.client, *arguments]

    def docker(self, *arguments: str, timeout_s: float = 600, **given: Any) -> str:
        """What `docker ...` writes to stdout. Raises RuntimeError with what it said if it fails."""
        done = subprocess.run(
            self.command(*arguments),
            env=self.environment | given.pop("environment", {}),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            **given,
        )
        if done.returncode:
            said = (done.stdout[-4000:] + done.stderr[-4000:]).strip()
            raise RuntimeError(f"docker {' '.join(arguments)}: exit code {done.returncode}\n{said}")
        return done.stdout

    def answers(self, *arguments: str) -> bool:
        """Whether `docker ...` succeeds."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired, OSError):
            self.docker(*arguments, timeout_s=20)
            return True
        return False

    def has_image(self, name: str) -> bool:
        """Whether the engine has an image of this name."""
        return self.answers("image", "inspect", name)

    def inspect(self, name: str) -> dict[str, Any]:
        """What `docker inspect` says of one thing."""
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", name))
        return found[0]

    def kill_nine(self, container: str) -> None:
        """kill -9 of a container's first process from outside, which its restart policy takes for a crash."""
        os.kill(int(self.inspect(container)["State"]["Pid"]), signal.SIGKILL)
