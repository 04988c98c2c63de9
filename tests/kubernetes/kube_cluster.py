"""A real Kubernetes of one node: etcd, API server, controller manager, scheduler, containerd and kubelet.

It lives in namespaces of its own (network, mounts, processes), which `in_own_namespaces` enters by starting the program
again: no port, bridge or mount meets anybody else's, and when the program ends, all of it ends. Only containerd's
content is kept, in the cache, so that an image is imported once.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from programs import CACHE

__all__ = ["NODE", "NODE_IP", "STATE", "KubeCluster", "in_own_namespaces", "wait_until"]

NODE, NODE_IP, SUBNET, BRIDGE = "node-1", "10.97.0.1", "10.97.0.0/24", "k8sstep0"
STATE = Path("/var/lib/stepstream")
"""Bound to a folder of ours: the same path outside and inside of the pods."""
_BOUND = ("/var/lib/kubelet", "/var/lib/cni", "/var/log/pods", "/var/log/containers", "/run/containerd", str(STATE))
_MARK = "STEPSTREAM_KUBERNETES_INSIDE"


def in_own_namespaces() -> None:
    """Goes on in new network, mount and process namespaces; returns there, and never outside."""
    if os.environ.get(_MARK) == "1":
        return
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    environment = {**os.environ, _MARK: "1"}
    sys.stdout.flush()
    sys.exit(subprocess.run([*command, *sys.orig_argv], env=environment, check=False).returncode)


def wait_until(what: str, reached: Callable[[], Any], timeout_s: float, every_s: float = 0.5) -> Any:
    """What `reached` returns as soon as that is true. Raises TimeoutError with `what`."""
    deadline = time.monotonic() + timeout_s
    while True:
        if found := reached():
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {timeout_s:.0f} s: {what}")
        time.sleep(every_s)


class KubeCluster:
    """Ready inside a `with`. `folder`: logs, keys, etcd's data, what pods mount."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.programs = folder.resolve(), programs
        self.token = secrets.token_hex(16)
        self.kubeconfig = self.folder / "kubeconfig"
        self.socket = self.folder / "containerd.sock"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Self:
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._prepare()
            self._start_control_plane()
            self._start_node()
        except BaseException:
            self.stop()
            raise
        self.seconds["node ready"] = time.monotonic() - began
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends all programs; the pods' processes end with the process namespace."""
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

    # ---- what a test does with it

    def kubectl(self, *arguments: str, given: str | None = None, timeout_s: float = 120) -> str:
        """kubectl's standard output. Raises RuntimeError with what it said."""
        done = subprocess.run(
            self.command(*arguments), input=given, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def command(self, *arguments: str) -> list[str]:
        """The command line of a kubectl for this cluster."""
        return [str(self.programs / "kubectl"), "--kubeconfig", str(self.kubeconfig), *arguments]

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get ... -o json`."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, manifests: str, *arguments: str) -> list[str]:
        """Server-side, with every unknown or doubled field an error; a line for each object."""
        options = ("--server-side", "--validate=strict", "--force-conflicts")
        return self.kubectl("apply", *options, *arguments, "-f", "-", given=manifests).splitlines()

    def images(self) -> set[str]:
        """The names that the node knows."""
        return set(self._ctr("images", "list", "-q").split())

    def contents(self) -> set[str]:
        """Digests of what the node's content store holds."""
        return set(self._ctr("content", "list", "-q").split())

    def import_image(self, write: Callable[[IO[bytes]], None]) -> None:
        """Imports an archive that `write` writes."""
        process = subprocess.Popen(
            [*self._ctr_command(), "images", "import", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None and process.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            write(process.stdin)
        process.stdin.close()
        said = process.stderr.read().decode()
        if process.wait():
            raise RuntimeError(f"ctr images import: {said}")

    def tag(self, image: str, other: str) -> None:
        """Another name for an image."""
        self._ctr("images", "tag", "--force", image, other)

    def log_tail(self, name: str, lines: int = 15) -> str:
        """The end of a program's log."""
        return "\n".join((self.folder / f"{name}.log").read_text("utf-8", "replace").splitlines()[-lines:])

    # ---- how it is set up

    def _run(self, *command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def _ctr_command(self) -> list[str]:
        return ["ctr", "--address", str(self.socket), "-n", "k8s.io"]

    def _ctr(self, *arguments: str) -> str:
        return self._run(*self._ctr_command(), *arguments)

    def _start(self, name: str, program: str, *options: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen([program, *options], stdout=log, stderr=log)

    def _wait(self, name: str, reached: Callable[[], Any], timeout_s: float) -> None:
        def alive() -> Any:
            if self.processes[name].poll() is not None:
                raise RuntimeError(f"{name} ended:\n{self.log_tail(name)}")
            return reached()

        try:
            wait_until(f"{name} is up", alive, timeout_s)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log_tail(name)}") from error

    def _prepare(self) -> None:
        self._run("mount", "--make-rshared", "/")
        for path in _BOUND:
            inner = self.folder / "bound" / path.strip("/").replace("/", "-")
            inner.mkdir(parents=True, exist_ok=True)
            Path(path).mkdir(parents=True, exist_ok=True)
            self._run("mount", "--bind", str(inner), path)
            self._run("mount", "--make-rshared", path)
        self._run("ip", "link", "set", "lo", "up")
        self._run("ip", "link", "add", BRIDGE, "type", "bridge")
        self._run("ip", "address", "add", f"{NODE_IP}/24", "dev", BRIDGE)
        self._run("ip", "link", "set", BRIDGE, "up")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        self._run("openssl", "genrsa", "-out", str(self.folder / "service-account.key"), "2048")
        (self.folder / "tokens.csv").write_text(f'{self.token},admin,admin,"system:masters"\n')
        (self.folder / "resolv.conf").write_text("")
        cluster = {"server": "https://127.0.0.1:6443", "insecure-skip-tls-verify": True}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": self.token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }
        self.kubeconfig.write_text(json.dumps(config))

    def _start_control_plane(self) -> None:
        etcd, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
        data = self.folder / "etcd"
        shutil.rmtree(data, ignore_errors=True)
        self._start(
            "etcd",
            "etcd",
            "--data-dir",
            str(data),
            "--listen-client-urls",
            etcd,
            "--advertise-client-urls",
            etcd,
            "--listen-peer-urls",
            peer,
            "--initial-advertise-peer-urls",
            peer,
            "--initial-cluster",
            f"default={peer}",
            "--unsafe-no-fsync",
        )
        key = str(self.folder / "service-account.key")
        options = {
            "etcd-servers": etcd,
            "bind-address": "127.0.0.1",
            "advertise-address": NODE_IP,
            "secure-port": "6443",
            "cert-dir": str(self.folder / "certificates"),
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": key,
            "service-account-signing-key-file": key,
            "token-auth-file": str(self.folder / "tokens.csv"),
            "authorization-mode": "RBAC",
            "endpoint-reconciler-type": "none",
            "allow-privileged": "true",
            "service-cluster-ip-range": "10.98.0.0/24",
            "kubelet-preferred-address-types": "InternalIP",
        }
        self._start("kube-apiserver", str(self.programs / "kube-apiserver"), *_flags(options))
        self._wait("kube-apiserver", lambda: _answers("https://127.0.0.1:6443/readyz", self.token), 90)
        common = {"kubeconfig": str(self.kubeconfig), "leader-elect": "false"}
        manager = {"service-account-private-key-file": key, "bind-address": "127.0.0.1", **common}
        self._start("kube-controller-manager", str(self.programs / "kube-controller-manager"), *_flags(manager))
        scheduler = {"bind-address": "127.0.0.1", **common}
        self._start("kube-scheduler", str(self.programs / "kube-scheduler"), *_flags(scheduler))

    def _start_node(self) -> None:
        cni = self.folder / "cni"
        cni.mkdir(exist_ok=True)
        ipam = {
            "type": "host-local",
            "ranges": [[{"subnet": SUBNET, "gateway": NODE_IP}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "hairpinMode": True, "ipam": ipam}
        plugins = {"cniVersion": "1.0.0", "name": "bridge", "plugins": [bridge]}
        (cni / "10-bridge.conflist").write_text(json.dumps(plugins))
        (self.folder / "containerd.toml").write_text(
            _CONTAINERD.format(folder=self.folder, root=CACHE / "containerd", cni=cni)
        )
        self._start("containerd", "containerd", "--config", str(self.folder / "containerd.toml"))
        self._wait(
            "containerd",
            lambda: subprocess.run([*self._ctr_command(), "version"], capture_output=True, check=False).returncode == 0,
            60,
        )
        self._forget_containers()
        kubelet = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "failSwapOn": False,
            "evictionHard": {},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "resolvConf": str(self.folder / "resolv.conf"),
            "address": NODE_IP,
            "healthzPort": 0,
        }
        (self.folder / "kubelet.json").write_text(json.dumps(kubelet))
        options = {
            "config": str(self.folder / "kubelet.json"),
            "kubeconfig": str(self.kubeconfig),
            "hostname-override": NODE,
            "node-ip": NODE_IP,
            "cert-dir": str(self.folder / "kubelet-certificates"),
        }
        self._start("kubelet", str(self.programs / "kubelet"), *_flags(options))
        self._wait("kubelet", self._node_ready, 120)

    def _forget_containers(self) -> None:
        """What an earlier run's containers left in the kept metadata: the kubelet would try to bring them back."""
        for name in self._ctr("containers", "list", "-q").split():
            self._ctr("containers", "delete", name)

    def _node_ready(self) -> bool:
        with contextlib.suppress(RuntimeError):
            conditions = self.get("node", NODE)["status"]["conditions"]
            return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
        return False


def _flags(options: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def _answers(url: str, token: str) -> bool:
    import ssl

    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    # Its certificate is made at its start and signed by itself; this is loopback in a namespace of our own.
    unverified = ssl._create_unverified_context()
    try:
        with urllib.request.urlopen(request, timeout=5, context=unverified) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


_CONTAINERD = """\
version = 2
root = "{root}"
state = "{folder}/containerd-state"
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/local/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{cni}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""
