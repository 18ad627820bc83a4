"""Builds the native extension with CMake and ninja.

``IMPLICIT_STEER_NATIVE`` decides what happens: ``auto`` (default) builds it where a compiler, CMake and ninja are
found and otherwise installs pure Python with a warning; ``require`` fails instead; ``off`` never builds it.
``IMPLICIT_STEER_CUDA`` decides likewise about its CUDA kernels, which need nvcc; ``IMPLICIT_STEER_CUDA_ARCHITECTURES``,
like ``"80 90"``, what they are compiled for.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "implicit_steer"
LIBRARIES = ("_ops.so", "libimplicit_steer_cuda.so")  # independent of Python, so without its suffix


def missing_tools() -> list[str]:
    """What building needs and this machine lacks."""
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        missing.append(f"a C++17 compiler ({' or '.join(compilers)})")
    return missing if importlib.util.find_spec("torch") else [*missing, "the Python package torch"]


def mode_of(variable: str) -> str:
    """``auto``, ``require`` or ``off``: what the environment variable says."""
    mode = os.environ.get(variable, "auto")
    if mode not in ("auto", "require", "off"):
        raise SystemExit(f"{variable}: expected auto, require or off, got {mode!r}.")
    return mode


class CMakeBuild(build_ext):
    """CMake builds the shared object into the package folder."""

    def run(self) -> None:
        """Build, or not, as ``IMPLICIT_STEER_NATIVE`` says."""
        mode = mode_of("IMPLICIT_STEER_NATIVE")
        for output in self.outputs():  # of an earlier build: neither shipped nor loaded by a build without them
            output.unlink(missing_ok=True)
        if mode == "off":
            return
        if missing := missing_tools():
            message = f"native extension: not built, this machine lacks {', '.join(missing)}."
            if mode == "require":
                raise SystemExit(f"{message} IMPLICIT_STEER_NATIVE=require asks for it.")
            self.warn(f"{message} {PACKAGE} is installed as pure Python; install what is missing and reinstall.")
            return
        self.build_native()

    def build_native(self) -> None:
        """Configure and build; ``SystemExit`` where that fails."""
        import torch

        build = ROOT / "build" / f"native-{sysconfig.get_platform()}"
        definitions = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": self.package_folder(),
            "PACKAGE_VERSION": self.distribution.get_version(),
            "TORCH_DIR": Path(torch.__file__).parent,
            "TORCH_VERSION": torch.__version__,
            "CUDA_KERNELS": mode_of("IMPLICIT_STEER_CUDA"),
        }
        if architectures := os.environ.get("IMPLICIT_STEER_CUDA_ARCHITECTURES"):
            definitions["CUDA_ARCHITECTURES"] = ";".join(architectures.split())
        configure = [f"-D{name}={value}" for name, value in definitions.items()]
        try:
            subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *configure], check=True)
            subprocess.run(["cmake", "--build", build], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "native extension: the build failed, see above. IMPLICIT_STEER_NATIVE=off installs without it."
            ) from error

    def package_folder(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / PACKAGE

    def outputs(self) -> list[Path]:
        return [self.package_folder() / name for name in LIBRARIES]

    def get_outputs(self) -> list[str]:
        return [str(output) for output in self.outputs() if output.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in (ROOT / "CMakeLists.txt", *sorted(ROOT.glob("csrc/**/*.*")))]


class Wheel(bdist_wheel):
    """One wheel for every Python 3: nothing in it is compiled against Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3, no Python ABI, and this platform where the native extension is inside."""
        native = self.get_finalized_command("build_ext").get_outputs()
        return "py3", "none", super().get_tag()[2] if native else "any"


setup(ext_modules=[Extension(f"{PACKAGE}._ops", sources=[])], cmdclass={"bdist_wheel": Wheel, "build_ext": CMakeBuild})
