// What Python gives: addresses, steps and sizes, or tensors that are read here.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "groups.h"
#include "tensors.h"

namespace batchnorm {

namespace nb = nanobind;

using Address = std::uintptr_t;
using Integer = std::int64_t;

template <class A> A* pointer(Address address) { return reinterpret_cast<A*>(address); }

inline Tensor tensor(Address address, Integer outer, Integer inner) {
    return {pointer<void>(address), outer, inner};
}

inline PerChannel per_channel(Address address, int type) {
    return {pointer<const void>(address), static_cast<Type>(type)};
}

inline bool is_float(Type type) { return type == Type::float32 || type == Type::float64; }

inline nb::object new_tensor(Type type, const std::vector<Integer>& shape,
                             const std::vector<Integer>& strides, void*& data) {
    PyObject* const made = make_tensor(type, shape, strides, data);
    if (!made) throw nb::python_error();
    return nb::steal(made);
}

// Reads C numbers, one a channel, of a tensor or None; false if they have to be converted first.
inline bool read_channels(nb::handle object, Integer C, PerChannel& values) {
    if (object.is_none()) return true;
    dlpack::Tensor tensor;
    if (!describe(object.ptr(), tensor) || !type_of(tensor, values.type)) return false;
    if (tensor.ndim != 1 || tensor.shape[0] != C || (C > 1 && tensor.strides[0] != 1)) return false;
    values.data = tensor.data;
    return true;
}

inline bool read_counter(nb::handle object, Integer*& counter) {
    if (object.is_none()) return true;
    dlpack::Tensor tensor;
    if (!describe(object.ptr(), tensor) || tensor.ndim != 0) return false;
    if (tensor.dtype.code != dlpack::integer || tensor.dtype.bits != 64) return false;
    counter = static_cast<Integer*>(tensor.data);
    return true;
}

// Writes the gradient of a parameter: the sums of all groups.
inline void put_sum(void* to, Type type, Integer C, Integer groups, const double* sums) {
    for (Integer c = 0; c < C; ++c) {
        double sum = 0;
        for (Integer g = 0; g < groups; ++g) sum += sums[g * C + c];
        if (type == Type::float64) static_cast<double*>(to)[c] = sum;
        else static_cast<float*>(to)[c] = static_cast<float>(sum);
    }
}

// Other threads of Python run while a large batch is worked on.
template <class AnyCall> void run_beside_python(const AnyCall& call) {
    if (call.values < 1 << 14) return run(call);
    const nb::gil_scoped_release released;
    run(call);
}

}  // namespace batchnorm
