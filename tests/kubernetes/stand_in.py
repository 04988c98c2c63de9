"""A stand-in for the image of deploy/Dockerfile: the same entry point, user and paths, made from this machine's Python.

Its layers are what `pip install stepstream[kafka,s3]` brings (without Triton), the interpreter and the system libraries
that those link to, and the sources of this tree. They are kept in the cache and streamed into containerd, so nothing is
pulled and no Docker is needed. With a real image at hand the cluster run takes that instead (`--image`, `--image-tar`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from packaging.requirements import Requirement
from programs import CACHE

__all__ = ["Image", "pause_image", "stand_in", "write_archive"]

ROOT = Path(__file__).resolve().parents[2]
USER = 10001
PREFIX = "opt/python"
SITE = f"{PREFIX}/lib/python3.11/site-packages"
PACKAGES = ("connectors", "data", "models", "operators", "pipeline", "weights")
LEFT_OUT = {"triton"}  # a gigabyte that only torch.compile on a GPU uses
SETTINGS: dict[str, object] = {
    "User": f"{USER}:{USER}",
    "Entrypoint": ["stepstream"],
    "Cmd": ["run", "/etc/stepstream/pipeline.yaml", "--metrics-port", "9464"],
    "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/tmp", "LD_LIBRARY_PATH=/opt/lib"],
    "WorkingDir": "/var/lib/stepstream",
}
ENTRY = f"#!/{PREFIX}/bin/python3.11\nfrom stepstream.pipeline.cli import main\n\nmain()\n"


class Image:
    """An OCI image: its layers, named by their sha256, and a label that makes each of several versions another one."""

    def __init__(self, layers: list[Path], version: str, settings: dict[str, object]) -> None:
        self.layers = layers
        config = {**settings, "Labels": {"org.opencontainers.image.version": version}}
        layer_ids = [f"sha256:{layer.stem}" for layer in layers]
        rootfs = {"type": "layers", "diff_ids": layer_ids}
        self.config = json.dumps({"architecture": "amd64", "os": "linux", "config": config, "rootfs": rootfs}).encode()


def write_archive(images: Mapping[str, Image], out: IO[bytes], there: Collection[str] = ()) -> None:
    """Writes an OCI archive, as `ctr images import` takes it; names such as docker.io/library/stepstream:0.1.0.

    `there`: digests (sha256:...) of what the reader has; such layers are left out.
    """
    manifests: list[dict[str, object]] = []
    blobs: list[bytes] = []
    for name, image in images.items():
        layers = [_descriptor("layer.v1.tar", layer.stem, layer.stat().st_size) for layer in image.layers]
        config = _described("config.v1+json", image.config)
        top = {"schemaVersion": 2, "mediaType": _media("manifest.v1+json"), "config": config, "layers": layers}
        manifest = json.dumps(top).encode()
        blobs += [image.config, manifest]
        named = {"annotations": {"io.containerd.image.name": name}}
        manifests.append(_described("manifest.v1+json", manifest) | named)
    with tarfile.open(fileobj=out, mode="w|", bufsize=1 << 20) as archive:
        _add(archive, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        _add(archive, "index.json", json.dumps({"schemaVersion": 2, "manifests": manifests}).encode())
        for content in blobs:
            _add(archive, f"blobs/sha256/{hashlib.sha256(content).hexdigest()}", content)
        for layer in dict.fromkeys(layer for image in images.values() for layer in image.layers):
            if f"sha256:{layer.stem}" in there:
                continue
            info = tarfile.TarInfo(f"blobs/sha256/{layer.stem}")
            info.size = layer.stat().st_size
            with layer.open("rb") as content_of_layer:
                archive.addfile(info, content_of_layer)


def _media(kind: str) -> str:
    return f"application/vnd.oci.image.{kind}"


def _descriptor(kind: str, digest: str, size: int) -> dict[str, object]:
    return {"mediaType": _media(kind), "digest": f"sha256:{digest}", "size": size}


def _described(kind: str, content: bytes) -> dict[str, object]:
    return _descriptor(kind, hashlib.sha256(content).hexdigest(), len(content))


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), mode
    archive.addfile(info, io.BytesIO(content))


def stand_in(version: str) -> Image:
    """The image of this tree; its big layer is made once for a set of installed packages."""
    site = Path(sysconfig.get_path("purelib"))
    packages = sorted(_closure("stepstream[kafka,s3]") - {"stepstream"} - LEFT_OUT)
    key = hashlib.sha256("\n".join(f"{n}=={importlib.metadata.version(n)}" for n in packages).encode()).hexdigest()
    folder = CACHE / "image"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / f"packages-{key[:16]}"
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(_layer(folder, [*_python(), *_packages(site, packages), *_libraries(site)], {}).name)
    own = {
        "usr/local/bin/stepstream": (ENTRY.encode(), 0o755),
        "etc/passwd": (f"root:x:0:0::/root:/bin/sh\nstepstream:x:{USER}:{USER}::/tmp:/bin/sh\n".encode(), 0o644),
    }
    return Image([link.resolve(), _layer(folder, _sources(), own)], version, SETTINGS)


def pause_image() -> Image:
    """What holds a pod's network: a program that sleeps."""
    folder = CACHE / "image"
    folder.mkdir(parents=True, exist_ok=True)
    return Image([_layer(folder, [("pause", CACHE / "bin" / "pause")], {})], "1", {"Entrypoint": ["/pause"]})


def _closure(wanted: str) -> set[str]:
    """The names of installed distributions that a requirement leads to."""
    found: set[str] = set()
    todo = [Requirement(wanted)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        found.add(name)
        for text in importlib.metadata.requires(name) or ():
            inner = Requirement(text)
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(inner)
    return found


Entry = tuple[str, Path]


def _python() -> Iterator[Entry]:
    home = Path(sys.base_prefix)
    yield f"{PREFIX}/bin/python3.11", Path(sys.executable).resolve()
    for library in home.glob("lib/libpython3.11.so*"):
        yield f"opt/lib/{library.name}", library.resolve()
    standard = home / "lib" / "python3.11"
    for path in sorted(standard.rglob("*")):
        part = path.relative_to(standard)
        if part.parts[0] in {"site-packages", "test", "idlelib", "tkinter", "ensurepip"} or "__pycache__" in part.parts:
            continue
        if path.is_file():
            yield f"{PREFIX}/lib/python3.11/{part}", path


def _packages(site: Path, names: Iterable[str]) -> Iterator[Entry]:
    for name in names:
        for file in importlib.metadata.distribution(name).files or ():
            path = Path(str(file.locate()))
            if ".." not in file.parts and "__pycache__" not in file.parts and path.is_file():
                yield f"{SITE}/{path.relative_to(site)}", path


def _libraries(site: Path) -> list[Entry]:
    """The system libraries that the interpreter and the packages link to, and the loader."""
    shared = [str(path) for path in (Path(sys.base_prefix) / "lib/python3.11/lib-dynload").glob("*.so")]
    shared += [str(path) for path in site.rglob("*.so") if path.parts[-2] not in {"open3d", "bytewax"}]
    told = subprocess.run(
        ["ldd", str(Path(sys.executable).resolve()), *shared], capture_output=True, text=True, check=False
    )
    found = sorted(set(re.findall(r"^\s+(?:\S+ => )?(/\S+) \(0x", told.stdout, re.MULTILINE)))
    system = [Path(path) for path in found if path.startswith(("/lib", "/usr/lib"))]
    entries = [(str(path).lstrip("/"), path.resolve()) for path in system]
    shell = Path("/bin/sh").resolve()
    return [
        *entries,
        ("bin/sh", shell),
        ("etc/ssl/certs/ca-certificates.crt", Path("/etc/ssl/certs/ca-certificates.crt")),
    ]


def _sources() -> Iterator[Entry]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{SITE}/stepstream/{path.relative_to(ROOT)}", path
    # What Debian's tzdata brings: without it not even UTC is a time zone.
    for path in sorted(Path("/usr/share/zoneinfo").rglob("*")):
        if path.is_file() and path.relative_to("/usr/share/zoneinfo").parts[0] not in {"posix", "right"}:
            yield str(path).lstrip("/"), path.resolve()
    for path in sorted(Path(sysconfig.get_path("purelib")).glob("stepstream-*.dist-info/*")):
        if path.is_file() and path.name in {"METADATA", "entry_points.txt", "RECORD"}:
            yield f"{SITE}/{path.parent.name}/{path.name}", path


class _Hashing:
    """Writes on, and knows the sha256 of what it wrote."""

    def __init__(self, out: IO[bytes]) -> None:
        self.out, self.digest = out, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.out.write(content)


def _layer(folder: Path, entries: Iterable[Entry], own: dict[str, tuple[bytes, int]]) -> Path:
    """An uncompressed layer named by its sha256, owned by root, readable by all, without times."""
    half = folder / f"half-{os.getpid()}"
    with half.open("wb") as out:
        hashing = _Hashing(out)
        with tarfile.open(fileobj=hashing, mode="w|", bufsize=1 << 20) as archive:  # type: ignore[call-overload]
            for name, path in dict(entries).items():
                info = tarfile.TarInfo(name)
                info.size, info.mode = path.stat().st_size, 0o755 if os.access(path, os.X_OK) else 0o644
                with path.open("rb") as content:
                    archive.addfile(info, content)
            for name, (text, mode) in own.items():
                _add(archive, name, text, mode)
            for name in ("tmp", "var/lib/stepstream", "etc/stepstream") if own else ():
                info = tarfile.TarInfo(name)
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
    return half.rename(folder / f"{hashing.digest.hexdigest()}.tar")
