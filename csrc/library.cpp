// Makes `triton_kernels._C` importable. Each file in cpu/ registers its kernel with torch.ops.dsm when it is loaded;
// the ops themselves are defined in Python (triton_kernels/_register.py).
#include <Python.h>

extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
