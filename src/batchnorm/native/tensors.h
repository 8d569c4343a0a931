// Recycled memory as a tensor of any framework: a DLPack capsule whose deleter gives it back.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "call.h"

namespace batchnorm {

// A new capsule around a block for a tensor of that shape and those steps, which fill it densely.
PyObject* make_capsule(Type type, const std::vector<std::int64_t>& shape,
                       const std::vector<std::int64_t>& strides);

}  // namespace batchnorm
