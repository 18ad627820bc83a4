"""Builds the native extension with CMake and ninja.

``IMPLICIT_STEER_NATIVE`` decides what happens: ``auto`` (default) builds it where a compiler, CMake and ninja are
found and otherwise installs pure Python, whose version says so, since pip shows nothing else of a build that succeeds;
``require`` fails instead; ``off`` never builds it.
``IMPLICIT_STEER_CUDA`` decides likewise about its CUDA kernels, which need nvcc: ``auto`` compiles them for the GPUs of
this machine, and not at all where there is none; ``require`` without GPUs for every architecture in CMakeLists.txt;
``IMPLICIT_STEER_CUDA_ARCHITECTURES``, like ``"80 90"``, says instead what they are compiled for.
"""

from __future__ import annotations

import importlib.util
import os
import re
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
RECORD = "_not_built.txt"  # beside them: what _native.py tells where they are not
NOT_BUILT = "+native.extension.not.built"  # the version's local part then
OLDEST_GPU = 80  # compute capability, without the point, of the oldest GPUs that the kernels are written for


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


def gpus() -> list[str]:
    """Compute capabilities of this machine's GPUs, without the point, like ``["80", "90"]``."""
    import torch

    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, check=True, capture_output=True, text=True, timeout=15).stdout
        found = re.findall(r"^\s*(\d+)\.(\d)\s*$", printed, re.MULTILINE)
    except subprocess.TimeoutExpired:  # a driver that hangs would stop torch, too
        found = []
    except (OSError, subprocess.CalledProcessError):  # without nvidia-smi, or with one that knows no compute_cap
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found = [torch.cuda.get_device_capability(device) for device in range(count)]
    return sorted({f"{major}{minor}" for major, minor in found}, key=int)


def cuda_definitions() -> dict[str, str]:
    """What CMake is told about the CUDA kernels."""
    mode, wanted = mode_of("IMPLICIT_STEER_CUDA"), os.environ.get("IMPLICIT_STEER_CUDA_ARCHITECTURES", "").split()
    if mode == "off" or wanted:
        found = wanted
    else:
        found = gpus()
        wanted = [capability for capability in found if int(capability) >= OLDEST_GPU]
    if mode == "auto" and not wanted:
        print(
            f"CUDA kernels: not built. They are for GPUs of compute capability {OLDEST_GPU} or newer; here: "
            f"{', '.join(found) or 'no GPU'}. IMPLICIT_STEER_CUDA=require builds them all the same, with nvcc; "
            'IMPLICIT_STEER_CUDA_ARCHITECTURES="80 90" says for which.',
            flush=True,
        )
        mode = "off"
    return {"CUDA_KERNELS": mode} | ({"CUDA_ARCHITECTURES": ";".join(wanted)} if wanted else {})


class CMakeBuild(build_ext):
    """CMake builds the shared object into the package folder."""

    def run(self) -> None:
        """Build, or not, as ``IMPLICIT_STEER_NATIVE`` says."""
        for output in (*self.outputs(), self.record()):  # of an earlier build: neither shipped nor read by another one
            output.unlink(missing_ok=True)
        if MODE != "off" and not MISSING:
            self.build_native()
            return
        message = f"native extension: not built, this machine lacks {', '.join(MISSING)}."
        if MODE == "require":
            raise SystemExit(f"{message} IMPLICIT_STEER_NATIVE=require asks for it.")
        if MODE == "auto":
            self.warn(f"{message} {PACKAGE} is installed as pure Python; install what is missing and reinstall.")
        self.record().parent.mkdir(parents=True, exist_ok=True)
        self.record().write_text("off" if MODE == "off" else ", ".join(MISSING), encoding="utf-8")

    def build_native(self) -> None:
        """Configure and build; ``SystemExit`` where that fails."""
        import torch

        build = ROOT / "build" / f"native-{sysconfig.get_platform()}"
        definitions = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": self.package_folder(),
            "PACKAGE_VERSION": self.distribution.get_version(),
            "TORCH_DIR": Path(torch.__file__).parent,
            "TORCH_VERSION": torch.__version__,
            **cuda_definitions(),
        }
        # Without those of an earlier build, which CMake would remember.
        configure = ["-UCUDA_ARCHITECTURES", *(f"-D{name}={value}" for name, value in definitions.items())]
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

    def record(self) -> Path:
        return self.package_folder() / RECORD

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


MODE, MISSING = mode_of("IMPLICIT_STEER_NATIVE"), missing_tools()
setup(
    ext_modules=[Extension(f"{PACKAGE}._ops", sources=[])],
    cmdclass={"bdist_wheel": Wheel, "build_ext": CMakeBuild},
    options={"egg_info": {"tag_build": NOT_BUILT}} if MODE == "auto" and MISSING else {},
)
