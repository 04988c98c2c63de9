"""A wheel of torch without CUDA, made of the installed one: for where PyPI is reached, the index of CPU wheels is not.

PyPI's torch for Linux is 1.1 GB and needs 3 GB of CUDA's libraries at import. Here `libtorch_cpu.so` and all else stay
the very files of that build; the CUDA parts, which they are linked against, give way to libraries that define the same
symbols, find no device, and do nothing else. `torch.distributed` has NCCL in its bindings and is switched off. For
tests of the image only.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

from engine import CACHE

__all__ = ["cpu_wheel", "index_of"]

_DROPPED = ("libcaffe2_nvrtc.so", "libtorch_cuda.so", "libtorch_cuda_linalg.so", "libtorch_nvshmem.so")
_LEFT_OUT = re.compile(r"torch/((include|share|test)/|bin/protoc)")
_PORT = 18_943  # the same each time if it is free: the address is part of what a build's cache goes by
_NO_DEVICE = 100  # cudaErrorNoDevice
_ANSWER = {"libtorch_cuda.so": "lea zeros(%rip),%rax"}
_SWITCHED_OFF = """    from torch import _C as _without

    del _without._c10d_init, _without._rpc_init, _without._dist_autograd_init
    _without._has_cuda = False
"""


def _symbols(library: Path) -> Iterator[tuple[str, str, str, bool, bool, int]]:
    """(name, version, type, whether defined, whether weak, bytes) of a library's dynamic symbols."""
    command = ["readelf", "-W", "--dyn-syms", str(library)]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        columns = line.split()
        if len(columns) >= 8 and columns[0].rstrip(":").isdigit():
            name, _, version = columns[7].partition("@")
            yield name, version.strip("@"), columns[3], columns[6] != "UND", columns[4] == "WEAK", int(columns[2], 0)


def _missing(kept: list[Path], dropped: list[Path]) -> dict[str, dict[str, tuple[str, str, int]]]:
    """Library -> symbol -> (version, type, bytes): what the kept ones need and nobody but CUDA defines."""
    needed: dict[str, str] = {}
    defined: set[str] = set()
    for library in kept:
        for name, version, _, there, weak, _ in _symbols(library):
            if there:
                defined.add(name)
            elif not weak:
                needed[name] = max(needed.get(name, ""), version)
    theirs = {s[0]: (s[2], s[5]) for library in dropped for s in _symbols(library) if s[3]}
    stubs: dict[str, dict[str, tuple[str, str, int]]] = {
        "libtorch_cuda.so": {},
        "libcudnn.so.9": {},
        "libcufile.so.0": {},
    }
    for name, version in needed.items():
        if name in defined:
            continue
        if name in theirs:
            stubs["libtorch_cuda.so"][name] = ("", *theirs[name])
        elif version.startswith("libcu"):
            stubs.setdefault(version, {})[name] = (version, "FUNC", 0)
        elif name.startswith("cuFile"):
            stubs["libcufile.so.0"][name] = ("", "FUNC", 0)
    return stubs


def _assembly(soname: str, symbols: dict[str, tuple[str, str, int]]) -> str:
    lines = [".text"]
    for name, (_, kind, size) in symbols.items():
        head = f'.globl "{name}"\n.type "{name}",'
        if name.startswith("_ZTI"):  # C++ type information: pybind11 looks at the name in it
            data = f'.quad _ZTVN10__cxxabiv117__class_type_infoE+16, "{name}.n", 0\n"{name}.n": .asciz "{name[4:]}"'
            lines.append(f'.data\n.balign 16\n{head}@object\n.size "{name}",24\n"{name}": {data}\n.text')
        elif kind == "OBJECT":
            lines.append(f'.data\n.balign 16\n{head}@object\n.size "{name}",{size}\n"{name}": .zero {size}\n.text')
        else:
            lines.append(f'{head}@function\n"{name}": jmp .Lall')
    answer = _ANSWER.get(soname, f"mov ${_NO_DEVICE},%eax")
    lines.append(f'.Lall: {answer}\nret\n.local zeros\n.comm zeros,65536,64\n.section .note.GNU-stack,"",@progbits\n')
    return "\n".join(lines)


def _write_stubs(torch: Path, folder: Path) -> list[Path]:
    libraries = torch / "lib"
    kept = [p for p in [*sorted(libraries.glob("*.so*")), *torch.glob("_C*.so")] if p.name not in _DROPPED]
    written = []
    for soname, symbols in _missing(
        kept, [libraries / name for name in _DROPPED if (libraries / name).exists()]
    ).items():
        source, versions, target = folder / "stub.s", folder / "stub.map", folder / soname
        source.write_text(_assembly(soname, symbols))
        names = {version for version, _, _ in symbols.values() if version}
        versions.write_text("".join(f"{name} {{ global: *; }};\n" for name in names))
        script = [f"-Wl,--version-script={versions}"] if names else []
        link = ["gcc", "-shared", "-nostdlib", "-o", str(target), str(source), f"-Wl,-soname,{soname}", *script]
        subprocess.run(link, check=True, capture_output=True)
        written.append(target)
    return written


def _python_file(name: str, text: str) -> str:
    """The two files of the package that say that there is CUDA."""
    if name == "torch/version.py":
        return re.sub(r"(?m)^cuda: .*$", "cuda: Optional[str] = None", re.sub(r"\+cu\d+", "+cpu", text))
    line = "    from torch._C import *  # noqa: F403\n"
    if line not in text:
        raise RuntimeError("torch/__init__.py is not as it was: where does it import torch._C?")
    return text.replace(line, line + _SWITCHED_OFF)


def cpu_wheel() -> Path:
    """The wheel, made at the first call for this version of torch. Raises OSError, CalledProcessError without gcc."""
    found = metadata.distribution("torch")
    folder = CACHE / "torch-cpu"
    tag = re.search(r"^Tag: (\S+)", found.read_text("WHEEL") or "", re.MULTILINE)
    version = f"{found.version.split('+')[0]}+cpu"
    wheel = folder / f"torch-{version}-{tag[1] if tag else 'py3-none-any'}.whl"
    if wheel.exists():
        return wheel
    if shutil.which("gcc") is None or shutil.which("readelf") is None:
        raise FileNotFoundError("gcc and readelf")
    torch = Path(str(found.locate_file("torch")))
    half, work = wheel.with_suffix(".half"), folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    record: list[str] = []
    with zipfile.ZipFile(half, "w", zipfile.ZIP_STORED) as out:

        def add(name: str, content: bytes) -> None:
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={digest},{len(content)}")
            out.writestr(name, content)

        for file in found.files or []:
            name, path = file.as_posix(), Path(str(found.locate_file(file)))
            if not name.startswith(("torch", "functorch")) or ".dist-info/" in name or path.suffix == ".pyc":
                continue
            if path.name in _DROPPED or _LEFT_OUT.match(name):
                continue
            if name in ("torch/version.py", "torch/__init__.py"):
                add(name, _python_file(name, path.read_text()).encode())
            else:
                add(name, path.read_bytes())
        for stub in _write_stubs(torch, work):
            add(f"torch/lib/{stub.name}", stub.read_bytes())
        info = f"torch-{version}.dist-info"
        described = re.sub(r"(?m)^Version: .*$", f"Version: {version}", found.read_text("METADATA") or "")
        add(f"{info}/METADATA", re.sub(r"(?m)^Requires-Dist: (nvidia|cuda|triton).*\n", "", described).encode())
        add(f"{info}/WHEEL", (found.read_text("WHEEL") or "").encode())
        out.writestr(f"{info}/RECORD", "".join(f"{line}\n" for line in [*record, f"{info}/RECORD,,"]))
    shutil.rmtree(work)
    half.rename(wheel)
    return wheel


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def index_of(wheel: Path) -> Iterator[str]:
    """A package index on loopback with this one wheel, while the `with` lasts; its address."""
    root = wheel.parent / "index"
    shutil.rmtree(root, ignore_errors=True)
    (root / "torch").mkdir(parents=True)
    (root / "torch" / wheel.name).hardlink_to(wheel)
    (root / "torch" / "index.html").write_text(f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>\n')
    serve = partial(_Quiet, directory=str(root))
    try:
        server = ThreadingHTTPServer(("127.0.0.1", _PORT), serve)
    except OSError:
        server = ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        shutil.rmtree(root)
