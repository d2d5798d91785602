"""Maps the top-level folders to packages and builds the C++ kernels; everything else stands in pyproject.toml.

`kernels/` is installed as `rgpb.kernels`: as a top-level module its name would collide with another package's.
The C++ kernels (`csrc/`) are built where torch can be imported and there is a compiler; without them the package
installs and works all the same. Flags such as a sanitizer's come last, from CXXFLAGS, and from LDFLAGS.

Their library is loaded by torch and knows no Python: one wheel, `py3-none-PLATFORM`, is for every version of it. With
SOURCE_DATE_EPOCH set, the same sources, torch and compiler make the same bits, wheel and sdist.
"""

from __future__ import annotations

import gzip
import os
import platform
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

NAME = "rgpb.kernels._cpp"
X86 = platform.machine().lower() in ("x86_64", "amd64")
# What tells these sources from others: `rgpb.kernels.cpp_rows` refuses a library of older ones.
TAG = sha256(b"".join(path.read_bytes() for path in sorted(Path("csrc").iterdir()))).hexdigest()[:12]
TORCH = ["-std=c++20", "-fopenmp", f'-DRGPB_TAG="{TAG}"', *["-DRGPB_X86"] * X86]
# Each instruction set is a file of its own; which one runs is decided when the library is loaded.
FLAGS = {
    "csrc/ops.cpp": TORCH,
    "csrc/products.cpp": TORCH,
    "csrc/rows_baseline.cpp": [],
    **({
        "csrc/rows_avx2.cpp": ["-mavx2", "-mfma"],
        "csrc/rows_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    } if X86 else {}),
}  # fmt: skip
COMMON = [
    "-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", "-Wall",
    "-Wextra",
]  # fmt: skip


def left_out(reason: str) -> None:
    """The one line that says what an install lacks."""
    print(f"rgpb: installing without the C++ kernels for CPUs: {reason}", file=sys.stderr)


class BuildKernels(build_ext):
    """Compiles each file with its own flags, as many at a time as there are cores."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the interpreter's name."""
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extension(self, ext: Extension) -> None:
        """Build, or raise the CompileError that setuptools turns into a warning, since `ext` is optional."""
        try:
            self._build(ext)
        except Exception as error:
            left_out("the compiler failed; its message is above, `pip install -v` shows it")
            raise CompileError(str(error)) from error

    def _build(self, ext: Extension) -> None:
        def compiled(source: str) -> str:
            flags = [*COMMON, *FLAGS[source]]
            for place in ext.include_dirs:  # headers name themselves in messages, wherever they lie here
                flags += [f"-isystem{place}", f"-ffile-prefix-map={place}=torch"]
            flags += os.environ.get("CXXFLAGS", "").split()
            (made,) = self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # OpenMP's own library isn't linked: its symbols come from the one that torch has loaded, so that torch and the
        # kernels share one set of threads.
        self.compiler.link_shared_object(
            objects, str(target), libraries=ext.libraries, library_dirs=ext.library_dirs, target_lang="c++"
        )


class Wheel(bdist_wheel):
    """For any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Sources(sdist):
    """With SOURCE_DATE_EPOCH, an archive that says nothing of who packed it and when."""

    def make_archive(self, base_name: str, format: str, *args: Any, **keywords: Any) -> str:
        made: str = super().make_archive(base_name, format, *args, **keywords)
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if format != "gztar" or epoch is None:
            return made

        def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.mtime, info.uid, info.gid, info.uname, info.gname, info.pax_headers = int(epoch), 0, 0, "", "", {}
            return info

        new = Path(f"{made}.new")
        with (
            tarfile.open(made) as old, new.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=int(epoch)) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):  # fmt: skip
            for info in sorted(old, key=lambda info: info.name):
                archive.addfile(plain(info), old.extractfile(info))
        new.replace(made)
        return made


def extensions() -> list[Extension]:
    """The C++ kernels, or nothing where they can't be built."""
    if find_spec("torch") is None:
        left_out("no torch here; install torch first, then rgpb with `pip install --no-build-isolation`")
        return []
    if os.name == "nt":
        left_out("they need GCC's vector extensions")
        return []
    from torch.utils import cpp_extension

    return [
        Extension(
            NAME, list(FLAGS), include_dirs=cpp_extension.include_paths(), libraries=["torch_cpu", "c10"],
            library_dirs=cpp_extension.library_paths(), optional=True, language="c++",
            depends=["csrc/rows.h", "csrc/rows.inl", "csrc/token_losses.inl"],
        )
    ]  # fmt: skip


library = find_packages(include=["rgpb", "rgpb.*"])
row_kernels = [f"rgpb.{name}" for name in find_packages(include=["kernels", "kernels.*"])]

setup(
    packages=library + row_kernels,
    package_dir={"rgpb": "rgpb", "rgpb.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel, "sdist": Sources},
)
