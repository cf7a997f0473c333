// Where many tensors lie in memory.
#pragma once

#include <Python.h>

namespace fastsam {

// Adds `survey`, `record` and `unmoved` to the module, where torch offers what they look at tensors by; -1 on an error.
int add_survey(PyObject* module);

}  // namespace fastsam
