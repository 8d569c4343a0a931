// The tensors of torch, without its headers, by DLPack.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "call.h"
#include "dlpack.h"

namespace batchnorm {

// Remember the two classes whose tensors are read and made here; false if torch does not let them.
bool find_exchange(PyObject* tensor, PyObject* parameter);

// A new tensor of that shape and those steps, which fill its memory densely, with no values yet; large
// ones lie in recycled memory. Writes where they lie. Null, with a Python error, if torch cannot make it.
PyObject* make_tensor(Type type, const std::vector<std::int64_t>& shape,
                      const std::vector<std::int64_t>& strides, void*& data);

// Whether new tensors are full of NaN: for tests, which then see what nobody wrote.
void poison_tensors(bool on);

// Write where an object's values lie, and how. False if it is none of those two classes itself, or
// there are no values in the CPU's memory.
bool describe(PyObject* object, dlpack::Tensor& described);

// Write the type of described values; false if the kernels have none like it.
bool type_of(const dlpack::Tensor& described, Type& type);

}  // namespace batchnorm
