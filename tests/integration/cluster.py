"""A real Apache Kafka (KRaft) on loopback for tests: one node or three, each a process that can be killed and stopped.

Its jars come from Maven Central (5 s) into a cache folder: `$STEPSTREAM_TEST_CACHE`, default ~/.cache/stepstream-tests.
"""

from __future__ import annotations

import base64
import ctypes
import fcntl
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from kafka import KafkaAdminClient
from kafka.errors import KafkaError

__all__ = ["PASSWORD", "USER", "Cluster", "die_with_parent", "libraries", "unavailable"]

USER, PASSWORD = "alice", "wonderland-7"

_POM = Path(__file__).with_name("pom.xml")
_PR_SET_PDEATHSIG = 1
_JAVA = ("java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
_BROKER = ("-Xmx384m", "-Dlog4j2.level=INFO")
_SPAWNER = ThreadPoolExecutor(1, "spawner")
"""PR_SET_PDEATHSIG takes the *thread* that starts a process for its parent: this one lives as long as we do."""


def _java_version() -> int:
    if shutil.which("java") is None:
        return 0
    told = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(\d+)', told)
    return int(found[1]) if found else 0


def libraries() -> Path:
    """The folder of jars, made at the first call; safe to call from several processes."""
    pom = _POM.read_bytes()
    root = Path(os.environ.get("STEPSTREAM_TEST_CACHE") or Path.home() / ".cache" / "stepstream-tests")
    folder = root / f"kafka-{hashlib.sha256(pom).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    jars = folder / "libs"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not jars.is_dir():
            half = folder / "half"
            shutil.rmtree(half, ignore_errors=True)
            command = ["mvn", "-q", "-B", "-f", str(_POM), "dependency:copy-dependencies", "-DincludeScope=runtime"]
            subprocess.run(
                [*command, f"-DoutputDirectory={half}"], check=True, capture_output=True, text=True, timeout=300
            )
            half.rename(jars)
    return jars


def unavailable() -> str | None:
    """Why no broker can be started here; None if one can."""
    if _java_version() < 17:
        return "no Java 17 or later for a Kafka broker"
    try:
        libraries()
    except FileNotFoundError:
        return "no Maven to fetch Kafka's jars with"
    except subprocess.CalledProcessError as error:
        said = (error.stdout + error.stderr).strip().splitlines() or ["no reason"]
        return f"Kafka's jars cannot be fetched: {said[0]}"
    except (subprocess.SubprocessError, OSError) as error:
        return f"Kafka's jars cannot be fetched: {error}"
    return None


def _free_ports(count: int) -> list[int]:
    """Below those that Linux gives to outgoing connections: a client must not get the port of a broker that is down."""
    found: set[int] = set()
    while len(found) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                found.add(port)
    return list(found)


def die_with_parent() -> None:
    """In a new process: it is killed when the one that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Cluster:
    """One or three brokers, numbered from 1. Listening for clients in plain text; with `secure`, also SASL and TLS.

    Use it in a `with`: it is ready inside, and nothing of it is left behind. `options` are brokers' properties.
    """

    def __init__(self, folder: Path, nodes: int = 1, *, secure: bool = False, **options: str) -> None:
        self.folder, self.nodes, self.secure = folder, nodes, secure
        self.options = {name.replace("_", "."): value for name, value in options.items()}
        # Not one that begins with "-", as one of 64 does: StorageTool takes it for an option.
        self.id = "k" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]
        names = ("PLAINTEXT", "CONTROLLER", *(("SASL_PLAINTEXT", "SSL") if secure else ()))
        free = iter(_free_ports(nodes * len(names)))
        self.ports = {node: {name: next(free) for name in names} for node in range(1, nodes + 1)}
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def servers(self, listener: str = "PLAINTEXT") -> str:
        """host:port of every broker, as clients take it."""
        return ",".join(f"127.0.0.1:{ports[listener]}" for ports in self.ports.values())

    @property
    def ca_file(self) -> Path:
        """The certificate that the TLS listener's is signed by."""
        return self.folder / "ca.pem"

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.secure:
            self._make_certificate()
        try:
            for node in self.ports:
                self._configure(node)
                self.start(node)
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """kill -9 for every node."""
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()

    # ---- what can happen to a node

    def start(self, node: int) -> None:
        """Starts a node, with the ports and data that it had."""
        jars = libraries() / "*"
        with (self.folder / f"node-{node}.log").open("ab") as log:
            self.processes[node] = _SPAWNER.submit(
                subprocess.Popen,
                [*_JAVA, *_BROKER, "-cp", str(jars), "kafka.Kafka", str(self._properties(node))],
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            ).result()

    def kill(self, node: int) -> None:
        """kill -9."""
        self.processes[node].kill()
        self.processes[node].wait()

    def pause(self, node: int) -> None:
        """SIGSTOP: its connections stay open and nobody answers."""
        self.processes[node].send_signal(signal.SIGSTOP)

    def resume(self, node: int) -> None:
        """SIGCONT."""
        self.processes[node].send_signal(signal.SIGCONT)

    def wait_ready(self, timeout_s: float = 90) -> None:
        """Until every node is registered and in sync for every partition there is."""
        deadline, reason = time.monotonic() + timeout_s, "not asked"
        while time.monotonic() < deadline:
            for node, process in self.processes.items():
                if process.poll() is not None:
                    raise RuntimeError(f"broker {node} ended with {process.returncode}:\n{self.log_tail(node)}")
            reason = self._not_ready()
            if reason is None:
                return
            time.sleep(0.2)
        raise TimeoutError(f"the brokers were not ready in {timeout_s} s: {reason}\n{self.log_tail(1)}")

    def _not_ready(self) -> str | None:
        for node, ports in self.ports.items():
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", ports["PLAINTEXT"])):
                    return f"broker {node} does not listen"
        try:
            client = KafkaAdminClient(bootstrap_servers=self.servers().split(","), bootstrap_timeout_ms=2000)
        except (KafkaError, OSError) as error:
            return repr(error)
        try:
            brokers = len(client.describe_cluster()["brokers"])
            if brokers < self.nodes:
                return f"{brokers} of {self.nodes} brokers"
            for topic in client.describe_topics():
                for partition in topic["partitions"]:
                    if len(partition["isr_nodes"]) < len(partition["replica_nodes"]):
                        return f"{topic['name']}/{partition['partition_index']} is not in sync"
        except (KafkaError, OSError) as error:
            return repr(error)
        finally:
            client.close()
        return None

    def log_tail(self, node: int, lines: int = 15) -> str:
        """The end of what a node has logged."""
        text = (self.folder / f"node-{node}.log").read_text("utf-8", "replace")
        return "\n".join(text.splitlines()[-lines:])

    # ---- how a node is set up

    def _properties(self, node: int) -> Path:
        return self.folder / f"node-{node}.properties"

    def _configure(self, node: int) -> None:
        ports = self.ports[node]
        voters = ",".join(f"{n}@127.0.0.1:{p['CONTROLLER']}" for n, p in self.ports.items())
        data = self.folder / f"data-{node}"
        copies = min(3, self.nodes)
        properties = {
            "process.roles": "broker,controller",
            "node.id": str(node),
            "controller.quorum.voters": voters,
            "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in ports.items()),
            "listener.security.protocol.map": ",".join(f"{n}:{'PLAINTEXT' if n == 'CONTROLLER' else n}" for n in ports),
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": str(data),
            "default.replication.factor": str(copies),
            "min.insync.replicas": str(max(1, copies - 1)),
            "offsets.topic.replication.factor": str(copies),
            "offsets.topic.num.partitions": "3",
            "transaction.state.log.replication.factor": str(copies),
            "transaction.state.log.min.isr": str(max(1, copies - 1)),
            "transaction.state.log.num.partitions": "3",
            "group.initial.rebalance.delay.ms": "0",
            "auto.create.topics.enable": "false",
            "group.min.session.timeout.ms": "1000",
            "log.cleaner.dedupe.buffer.size": "2097152",
            "log.index.size.max.bytes": "1048576",
            **(self._security() if self.secure else {}),
            **self.options,
        }
        text = "".join(f"{name}={value}\n" for name, value in properties.items())
        self._properties(node).write_text(text)
        format_ = ["kafka.tools.StorageTool", "format", "-t", self.id, "-c", str(self._properties(node))]
        if self.secure:
            format_ += ["--add-scram", f"SCRAM-SHA-512=[name={USER},password={PASSWORD}]"]
        subprocess.run([*_JAVA, "-cp", str(libraries() / "*"), *format_], check=True, capture_output=True, timeout=60)

    def _security(self) -> dict[str, str]:
        prefix = "listener.name.sasl_plaintext"
        plain = "org.apache.kafka.common.security.plain.PlainLoginModule"
        scram = "org.apache.kafka.common.security.scram.ScramLoginModule"
        return {
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
            f"{prefix}.plain.sasl.jaas.config": f'{plain} required user_{USER}="{PASSWORD}";',
            f"{prefix}.scram-sha-512.sasl.jaas.config": f"{scram} required;",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.folder / "broker.pem"),
        }

    def _make_certificate(self) -> None:
        """A certificate of 127.0.0.1 that signs itself, by openssl."""
        key, certificate = self.folder / "key.pem", self.ca_file
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
                *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)),
            ],
            check=True,
            capture_output=True,
        )
        (self.folder / "broker.pem").write_bytes(key.read_bytes() + certificate.read_bytes())
