"""The programs of a one-node Kubernetes and Helm, built from their Go modules into a cache folder.

python -m tests.kubernetes.programs [helm]: builds them (Kubernetes: 5 minutes of CPU; Helm: 75 s), or says why not.
The folder: `$STEPSTREAM_KUBERNETES_CACHE`, default ~/.cache/stepstream-kubernetes.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = [
    "CACHE",
    "DEBIAN",
    "KUBERNETES",
    "PROGRAMS",
    "build_helm",
    "build_kubernetes",
    "helm",
    "kubectl",
    "missing",
    "wait_for_builds",
]

KUBERNETES, HELM = "v1.34.2", "v3.19.5"
PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl")
DEBIAN = {
    "etcd": "etcd-server",
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "unshare": "util-linux",
    "ip": "iproute2",
}
CACHE = Path(os.environ.get("STEPSTREAM_KUBERNETES_CACHE") or Path.home() / ".cache" / "stepstream-kubernetes")
_BIN = CACHE / "bin"
_PAUSE = """package main

import "time"

func main() {
	for {
		time.Sleep(time.Hour)
	}
}
"""


def missing() -> str | None:
    """Why a one-node cluster cannot be started here as things are; None if it can."""
    if os.geteuid() != 0:
        return "a kubelet needs root"
    for program, package in DEBIAN.items():
        if shutil.which(program) is None:
            return f"no {program} (Debian's {package})"
    if not Path("/usr/lib/cni/bridge").exists():
        return "no CNI plugins (Debian's containernetworking-plugins)"
    if not all((_BIN / name).exists() for name in (*PROGRAMS, "pause")):
        return f"no Kubernetes in {_BIN}: python -m tests.kubernetes.programs builds it"
    return None


def kubectl() -> str | None:
    """A kubectl: the one on the path, or the one that was built."""
    built = _BIN / "kubectl"
    return shutil.which("kubectl") or (str(built) if built.exists() else None)


def helm() -> str | None:
    """A helm: the one on the path, or the one that was built."""
    built = _BIN / "helm"
    return shutil.which("helm") or (str(built) if built.exists() else None)


def wait_for_builds() -> None:
    """Returns when no process is building any of it."""
    lock = CACHE / "lock"
    if lock.exists():
        with lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_SH)


def _go(folder: Path, *arguments: str, **environment: str) -> str:
    command = ["nice", "-n", "5", "go", *arguments]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")
    return done.stdout.strip()


def _staging_modules(go_mod: str) -> list[str]:
    return re.findall(r"(k8s\.io/[a-z-]+) => \./staging", go_mod)


def build_kubernetes() -> Path:
    """The folder of the five programs and `pause`, built if they are not there. Raises RuntimeError, OSError."""
    source = CACHE / "src" / "kubernetes"
    source.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (_BIN / "pause").exists():
            (source / "pause.go").write_text(_PAUSE)
            _go(source, "build", "-o", str(_BIN / "pause"), "pause.go", CGO_ENABLED="0", GOFLAGS="-mod=mod")
            (source / "pause.go").unlink()
        if all((_BIN / name).exists() for name in PROGRAMS):
            return _BIN
        module = source / "go.mod"
        module.write_text("module stepstream/kubernetes\n")
        _go(source, "mod", "download", f"k8s.io/kubernetes@{KUBERNETES}")
        upstream = Path(_go(source, "env", "GOMODCACHE")) / f"k8s.io/kubernetes@{KUBERNETES}" / "go.mod"
        theirs = upstream.read_text()
        lines = ["module stepstream/kubernetes", *re.findall(r"^(?:go|godebug) .*$", theirs, re.MULTILINE)]
        lines += [f"tool k8s.io/kubernetes/cmd/{name}" for name in PROGRAMS]
        lines += [f"require k8s.io/kubernetes {KUBERNETES}"]
        # A module that is used from outside its repository does not see its own staging folders.
        lines += [f"replace {name} => {name} v0{KUBERNETES[2:]}" for name in _staging_modules(theirs)]
        module.write_text("\n".join(lines) + "\n")
        _go(source, "mod", "tidy", "-e")
        packages = [f"k8s.io/kubernetes/cmd/{name}" for name in PROGRAMS]
        _go(source, "build", "-trimpath", "-ldflags", "-s -w", "-o", f"{_BIN}/", *packages)
    return _BIN


def build_helm() -> Path:
    """Helm, built if it is not there. Raises RuntimeError, OSError."""
    source = CACHE / "src" / "helm"
    source.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (_BIN / "helm").exists():
            _go(
                source, "install", "-trimpath", "-ldflags", "-s -w", f"helm.sh/helm/v3/cmd/helm@{HELM}", GOBIN=str(_BIN)
            )
    return _BIN / "helm"


if __name__ == "__main__":
    try:
        print(build_helm() if sys.argv[1:] == ["helm"] else build_kubernetes())
    except (RuntimeError, OSError) as error:
        sys.exit(str(error))
