"""Maps the top-level folders to packages and builds the C++ kernels; everything else stands in pyproject.toml.

`kernels/` is installed as `rgpb.kernels`: as a top-level module its name would collide with another package's.
The C++ kernels (`csrc/`) are built where torch can be imported and there is a compiler; without them the package
installs and works all the same. Flags such as a sanitizer's come last, from CXXFLAGS, and from LDFLAGS.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
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

    def build_extension(self, ext: Extension) -> None:
        """Build, or raise the CompileError that setuptools turns into a warning, since `ext` is optional."""
        try:
            self._build(ext)
        except Exception as error:
            left_out("the compiler failed; its message is above, `pip install -v` shows it")
            raise CompileError(str(error)) from error

    def _build(self, ext: Extension) -> None:
        def compiled(source: str) -> str:
            flags = [*COMMON, *FLAGS[source], *(f"-isystem{place}" for place in ext.include_dirs)]
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
    cmdclass={"build_ext": BuildKernels},
)
