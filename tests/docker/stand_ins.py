"""Base images under the names that the Dockerfile and the compose file start from, made of what this machine has.

They take the place of images that cannot be pulled, so that the files under test are the shipped ones, byte for byte:
Debian's files are the host's, Python is the one that runs the tests, Kafka's jars are Maven's, Prometheus is Debian's
package. An image that the engine has, or can pull, is used as it is. Grafana cannot be had: the tests leave it out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from engine import CACHE, Engine

__all__ = ["KAFKA", "PROMETHEUS", "PYTHON", "stand_in"]

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PYTHON = re.findall(r"^ARG PYTHON_IMAGE=(\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)[0]
_COMPOSE = (DEPLOY / "compose.yaml").read_text() if (DEPLOY / "compose.yaml").exists() else ""
KAFKA, PROMETHEUS = (
    next(iter(re.findall(rf"^\s+image: ({name}:\S+)", _COMPOSE, re.MULTILINE)), f"{name}:none")
    for name in ("apache/kafka", "prom/prometheus")
)

_BASE = "stepstream-test/debian:host"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
_PACKAGES = (
    *("base-files", "bash", "ca-certificates", "coreutils", "dash", "debianutils", "diffutils", "findutils", "grep"),
    *("gzip", "hostname", "libc-bin", "login", "mawk", "netbase", "passwd", "perl-base", "sed", "tar", "tzdata"),
    *("libbz2-1.0", "libexpat1", "libffi8", "liblzma5", "libncursesw6", "libreadline8", "libsqlite3-0", "libssl3"),
    *("libstdc++6", "libuuid1", "zlib1g"),
)
_LEFT_OUT = re.compile(r"/usr/share/(doc|man|locale|info|lintian|bash-completion)/|/usr/share/zoneinfo/right")
_JAVA_MODULES = (
    "java.base,java.compiler,java.desktop,java.logging,java.management,java.management.rmi,java.naming,java.rmi,"
    "java.scripting,java.security.jgss,java.security.sasl,java.sql,java.xml,jdk.crypto.ec,jdk.jfr,jdk.management,"
    "jdk.unsupported,jdk.zipfs"
)
# What apache/kafka does with its environment: KAFKA_NODE_ID=1 is node.id=1; a new data folder is formatted.
_KAFKA_RUN = r"""#!/bin/bash
set -euo pipefail
for name in $(compgen -e KAFKA_); do
  case "$name" in KAFKA_HEAP_OPTS|KAFKA_OPTS|KAFKA_JVM_PERFORMANCE_OPTS) continue ;; esac
  key=$(tr 'A-Z_' 'a-z.' <<<"${name#KAFKA_}")
  printf '%s=%s\n' "$key" "${!name}"
done > /tmp/server.properties
cd /tmp
export CLASSPATH='/opt/kafka/libs/*'
quick='-XX:+UseSerialGC -XX:TieredStopAtLevel=1'
[ -e "${KAFKA_LOG_DIRS}/meta.properties" ] ||
  java $quick kafka.tools.StorageTool format -t "${CLUSTER_ID}" -c /tmp/server.properties
exec java ${KAFKA_HEAP_OPTS:--Xmx1g} $quick kafka.Kafka /tmp/server.properties
"""
# Busybox's, as far as a health check uses it: wget -q -O /dev/null http://HOST:PORT/PATH
_WGET = r"""#!/bin/bash
address=${!#}
address=${address#http://}
host=${address%%/*}
exec 3<>"/dev/tcp/${host%:*}/${host#*:}" || exit 1
printf 'GET /%s HTTP/1.0\r\nHost: %s\r\n\r\n' "${address#*/}" "$host" >&3
read -r _ status _ <&3
[ "$status" = 200 ]
"""
_DOCKERFILES = {
    "python": f"""
FROM {_BASE}
COPY python /usr/local
RUN ["/bin/bash", "-c", "ldconfig && ln -sf python3 /usr/local/bin/python"]
ENV LANG=C.UTF-8 PIP_CERT={_CERTIFICATES} SSL_CERT_FILE={_CERTIFICATES}
CMD ["python3"]
""",
    "kafka": f"""
FROM {_BASE}
COPY java /opt/java
COPY libs /opt/kafka/libs
COPY run /etc/kafka/docker/run
RUN groupadd -g 1000 appuser && useradd -u 1000 -g 1000 -M appuser \\
 && install -d -o 1000 -g 1000 /var/lib/kafka/data /mnt/shared/config /etc/kafka/secrets
ENV PATH=/opt/java/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
VOLUME ["/etc/kafka/secrets", "/var/lib/kafka/data", "/mnt/shared/config"]
EXPOSE 9092
USER appuser
CMD ["/etc/kafka/docker/run"]
""",
    "prometheus": f"""
FROM {_BASE}
COPY prometheus promtool wget /bin/
RUN install -d -o 65534 -g 65534 /prometheus
WORKDIR /prometheus
VOLUME ["/prometheus"]
EXPOSE 9090
USER 65534
ENTRYPOINT ["/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
""",
}


def stand_in(engine: Engine, name: str) -> str | None:
    """Sees to it that the engine has an image of this name; why it cannot have one, or None."""
    if engine.has_image(name) or (not engine.own and engine.answers("pull", "--quiet", name)):
        return None
    kind = next((kind for kind in _DOCKERFILES if kind in name.split(":")[0]), None)
    if kind is None:
        return f"{name} cannot be pulled here, and there is nothing to make a stand-in of"
    if shutil.which("dpkg-query") is None:
        return f"{name} cannot be pulled here, and a stand-in is made of Debian's packages"
    if not engine.has_image(_BASE):
        _import_debian(engine)
    context = engine.folder / "stand-in" / kind
    shutil.rmtree(context, ignore_errors=True)
    context.mkdir(parents=True)
    try:
        if (reason := _CONTENTS[kind](context)) is not None:
            return f"{name} cannot be pulled here, and for a stand-in there is {reason}"
        (context / "Dockerfile").write_text(_DOCKERFILES[kind].lstrip())
        engine.docker("build", "--network", "none", "--tag", name, str(context))
    finally:
        shutil.rmtree(context)
    return None


# ---- Debian


def _closure(names: Iterable[str]) -> list[str]:
    """The packages and all that they need, as installed here."""
    form = "${binary:Package}\t${Package}\t${Pre-Depends}, ${Depends}\n"
    listed = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True).stdout
    needs = {plain: (full, depends) for full, plain, depends in (line.split("\t") for line in listed.splitlines())}
    found: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found or name not in needs or name.startswith(("debconf", "python", "openssl")):
            continue
        found[name], depends = needs[name]
        waiting += re.findall(r"(?:^|,)\s*([a-z0-9][a-z0-9+.-]*)", depends)
    return sorted(found.values())


def _import_debian(engine: Engine) -> None:
    """`_BASE`: the host's files of a few packages."""
    listed = subprocess.run(
        ["dpkg-query", "-L", *_closure(_PACKAGES)], capture_output=True, text=True, check=True
    ).stdout
    root = engine.folder / "stand-in" / "debian"
    shutil.rmtree(root, ignore_errors=True)
    for folder in (
        "dev",
        "etc",
        "proc",
        "root",
        "run",
        "sys",
        "tmp",
        "usr/bin",
        "usr/lib64",
        "usr/sbin",
        "var/lib",
        "var/tmp",
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "tmp").chmod(0o1777)
    paths = {p for p in listed.splitlines() if p.startswith("/") and not _LEFT_OUT.search(f"{p}/")}
    paths |= {_CERTIFICATES, "/etc/nsswitch.conf", "/etc/localtime", "/usr/bin/awk", "/etc/alternatives/awk"}
    for text in sorted(paths):
        source = Path(text).parent.resolve() / Path(text).name
        if source.is_symlink() or source.is_file():
            target = root / source.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.is_symlink() and not target.exists():
                shutil.copy2(source, target, follow_symlinks=False)
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    )
    (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    packed = subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE)
    change = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    engine.docker("import", "--change", change, "-", _BASE, stdin=packed.stdout)
    packed.wait()
    shutil.rmtree(root)


# ---- what the others add


def _python(context: Path) -> str | None:
    """The Python that runs this, without what was installed into it."""
    base, version = Path(sys.base_prefix), f"python{sys.version_info.major}.{sys.version_info.minor}"
    target = context / "python"
    (target / "bin").mkdir(parents=True)
    shutil.copy2(Path(sys.base_exec_prefix) / "bin" / version, target / "bin" / version)
    (target / "bin" / "python3").symlink_to(version)
    left_out = shutil.ignore_patterns(
        "__pycache__", "test", "tests", "idlelib", "ensurepip", "turtledemo", "*.a", "config-*"
    )

    def ignore(folder: str, names: list[str]) -> set[str]:
        if Path(folder).name == "site-packages":
            return {name for name in names if not re.match(r"pip(-.*dist-info)?$", name)}
        return left_out(folder, names)

    shutil.copytree(base / "lib" / version, target / "lib" / version, ignore=ignore, symlinks=True)
    for library in (base / "lib").glob("libpython3*.so*"):
        shutil.copy2(library, target / "lib" / library.name, follow_symlinks=False)
    pip = target / "bin" / "pip"
    pip.write_text(
        "#!/usr/local/bin/python3\nimport sys\nfrom pip._internal.cli.main import main\n\nsys.exit(main())\n"
    )
    pip.chmod(0o755)
    return None


def _kafka(context: Path) -> str | None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
    import cluster

    if (reason := cluster.unavailable()) is not None:
        return reason
    shutil.copytree(cluster.libraries(), context / "libs")
    home = Path(os.path.realpath(str(shutil.which("java")))).parents[1]
    small = CACHE / f"java-{home.name}"
    if (home / "jmods").is_dir() and not small.exists():
        half = small.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        jlink = [str(home / "bin" / "jlink"), "--add-modules", _JAVA_MODULES, "--strip-debug", "--no-man-pages"]
        subprocess.run([*jlink, "--no-header-files", "--output", str(half)], check=True, capture_output=True)
        half.rename(small)
    left_out = shutil.ignore_patterns("jmods", "src.zip", "demo", "include", "man", "docs", "classes*.jsa")
    shutil.copytree(small if small.exists() else home, context / "java", ignore=left_out)
    (context / "run").write_text(_KAFKA_RUN)
    (context / "run").chmod(0o755)
    return None


def _prometheus(context: Path) -> str | None:
    for name in ("prometheus", "promtool"):
        program = shutil.which(name)
        if program is None:
            return f"no {name} on this machine (Debian: prometheus)"
        shutil.copy2(program, context / name)
    (context / "wget").write_text(_WGET)
    (context / "wget").chmod(0o755)
    return None


_CONTENTS = {"python": _python, "kafka": _kafka, "prometheus": _prometheus}
