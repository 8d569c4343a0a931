// The tensors of torch, without its headers, by DLPack.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "call.h"
#include "dlpack.h"

namespace batchnorm {

// A new capsule around a recycled block, for a tensor of that shape and those steps, which fill it
// densely; its deleter gives the block back.
PyObject* make_capsule(Type type, const std::vector<std::int64_t>& shape,
                       const std::vector<std::int64_t>& strides);

// Remember the two classes whose tensors `describe` reads; false if torch does not let them be read.
bool meet(PyObject* tensor, PyObject* parameter);

// Write where an object's values lie, and how. False if it is none of those two classes itself, or
// there are no values in the CPU's memory.
bool describe(PyObject* object, dlpack::Tensor& described);

// Write the type of described values; false if the kernels have none like it.
bool type_of(const dlpack::Tensor& described, Type& type);

}  // namespace batchnorm
