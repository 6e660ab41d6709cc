from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension
from pathlib import Path
setup(name="dsm", version="0.1.0", packages=["triton_kernels"],
      ext_modules=[CppExtension("triton_kernels._C", sorted(str(p) for p in Path("csrc").rglob("*.cpp")), extra_compile_args=["-O3", "-fopenmp"])],
      cmdclass={"build_ext": BuildExtension})
