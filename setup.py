"""Packages, extras and the C++ ops. Versions that are known to work together are in constraints.txt.

The kernels alone:  pip install --no-build-isolation .
With the trainer:   pip install --no-build-isolation -c constraints.txt '.[train]'
To mine a corpus:   pip install --no-build-isolation -c constraints.txt '.[train,corpus]'
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError:
    sys.exit(
        "building dsm needs torch and setuptools first: pip install -c constraints.txt torch setuptools ninja wheel, "
        "then pip install --no-build-isolation ."
    )

HERE = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").rglob("*.cpp"))

# Without the last two gcc does not vectorise loops that call exp or select.
CFLAGS = ["-O3", "-fno-trapping-math", "-fno-math-errno"]
# Apple's clang knows no OpenMP; there the ops run on one thread.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []

EXTRAS = {
    # The trainer.
    "train": [
        "megatron-core>=0.16.1,<0.17",
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
    "reason": ["reasoning-gym==0.1.25"],
    "wandb": ["wandb>=0.20"],
    "bench": ["liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"],
    "dev": ["pytest>=9", "ruff", "pyright", "ninja"],
}

setup(
    name="dsm",
    version="0.1.0",
    description="The DeepSeekMath recipe as a Megatron-core trainer, with Triton kernels for GRPO",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["triton_kernels", "triton_kernels.*", "dsm_train", "dsm_train.*"]),
    package_data={"dsm_train.corpus.demo": ["demo.yaml"]},
    # torch's CUDA build brings its own Triton; the CPU build does not, and other systems have none.
    install_requires=["torch>=2.11", "numpy", 'triton>=3.6; platform_system == "Linux"'],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dsm-train = dsm_train.__main__:main"]},
    ext_modules=[
        CppExtension("triton_kernels._C", SOURCES, extra_compile_args=CFLAGS + OPENMP, extra_link_args=OPENMP)
    ],
    cmdclass={"build_ext": BuildExtension},
)
