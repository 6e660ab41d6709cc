"""Packages, extras and the C++ ops. Versions that are known to work together are in constraints.txt.

The kernels alone:  pip install --no-build-isolation .
With the trainer:   pip install --no-build-isolation -c constraints.txt '.[train]'
To mine a corpus:   pip install --no-build-isolation -c constraints.txt '.[train,corpus]'

torch comes before: the C++ ops are built against the torch that will load them, which build isolation would hide.
"""

import importlib.util
import os
import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
(VERSION,) = re.findall(r'__version__ = "(.+)"', (HERE / "triton_kernels/_version.py").read_text(encoding="utf-8"))

# Without the last two gcc does not vectorise loops that call exp or select.
CFLAGS = ["-O3", "-fno-trapping-math", "-fno-math-errno"]
# Apple's clang knows no OpenMP; there the ops run on one thread.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []

EXTRAS = {
    # The trainer. megatron-core 0.17 and 0.18 were not looked at: see dsm_train/megatron/fixes.py.
    "train": [
        "megatron-core>=0.16.1,<0.20,!=0.17.*,!=0.18.*",
        "packaging",
        "psutil",
        "transformers>=5.5,<6",
        "tokenizers",
        "safetensors",
        "tyro>=1.0.17",
        "PyYAML",
        "pyarrow",
        "tensorboard",
        "matplotlib",
    ],
    # Mining a corpus, beside the trainer. datatrove's own extras are left out: [io] brings pandas and more that nothing
    # here uses, [processing] another build of fastText; regex, which it imports, is in none but that.
    "corpus": [
        "datatrove>=0.10.1,<0.11",
        "regex",
        "fastwarc>=2,<3",
        "resiliparse>=2,<3",
        "fasttext-numpy2",
        "xxhash>=3",
        "zstandard",
        "warcio",
    ],
    # What a GPU adds that torch's CUDA build does not bring already.
    "gpu": ["triton>=3.6"],
    "te": ["transformer-engine[pytorch]>=2.8"],
    "flash": ["flash-attn>=2.8"],
    "bench": ["liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"],
    "dev": ["pytest>=9", "ruff", "pyright", "ninja"],
}


def obstacle() -> str:
    """Say what keeps the C++ ops from being built here, with its remedy; empty if nothing does."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}); install one (Debian: apt install g++)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "there are no headers of Python (Python.h); install them (Debian: apt install python3-dev)"
    if importlib.util.find_spec("torch") is None:
        return "torch is not there; install torch, setuptools, wheel and ninja, pass --no-build-isolation"
    return ""


def cpp_ops() -> dict:
    """The extension module of the C++ ops and the command that builds it; nothing where it cannot be built."""
    if reason := obstacle():
        print(f"dsm-train: without C++ ops (on the CPU PyTorch references serve, slower): {reason}", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").rglob("*.cpp"))
    module = CppExtension("triton_kernels._C", sources, extra_compile_args=CFLAGS + OPENMP, extra_link_args=OPENMP)
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(
    name="dsm-train",
    version=VERSION,
    description="The DeepSeekMath recipe as a Megatron-core trainer, with Triton kernels for GRPO",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["triton_kernels", "triton_kernels.*", "dsm_train", "dsm_train.*"]),
    package_data={"dsm_train": ["py.typed"], "dsm_train.corpus.demo": ["demo.yaml"], "triton_kernels": ["py.typed"]},
    # torch's CUDA build brings its own Triton; the CPU build does not, and other systems have none.
    install_requires=["torch>=2.11", "numpy", 'triton>=3.6; platform_system == "Linux"'],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dsm-train = dsm_train.__main__:main"]},
    **cpp_ops(),
)
