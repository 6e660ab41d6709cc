// Makes `triton_kernels._C` importable. Each of the other files registers its ops' kernels with torch.ops.dsm when it is loaded;
// the ops themselves are defined in Python (triton_kernels/_register.py).
#include <Python.h>

extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
