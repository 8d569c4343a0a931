#include "tensors.h"

#include <memory>

#include "buffers.h"

namespace batchnorm {

namespace {

struct Owner {
    dlpack::Managed managed;
    std::vector<std::int64_t> shape, strides;
};

dlpack::DataType described(Type type) {
    switch (type) {
        case Type::float64: return {dlpack::floating, 64, 1};
        case Type::float32: return {dlpack::floating, 32, 1};
        case Type::bfloat16: return {dlpack::bfloat, 16, 1};
        case Type::float16: return {dlpack::floating, 16, 1};
    }
    return {};
}

void give_back(dlpack::Managed* managed) {
    give_block(managed->tensor.data);
    delete static_cast<Owner*>(managed->context);
}

void forget(PyObject* capsule) {  // a capsule that nobody made a tensor of
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    give_back(static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

// Known after `meet`; they live as long as the process.
const dlpack::Exchange* exchange = nullptr;
PyTypeObject* tensor_class = nullptr;
PyTypeObject* parameter_class = nullptr;

}  // namespace

PyObject* make_capsule(Type type, const std::vector<std::int64_t>& shape,
                       const std::vector<std::int64_t>& strides) {
    const dlpack::DataType dtype = described(type);
    std::size_t bytes = dtype.bits / 8;
    for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
    auto owner = std::make_unique<Owner>();
    owner->shape = shape;
    owner->strides = strides;
    owner->managed = {{take_block(bytes), {dlpack::processor, 0}, static_cast<std::int32_t>(shape.size()),
                       dtype, owner->shape.data(), owner->strides.data(), 0},
                      owner.get(), give_back};
    return PyCapsule_New(&owner.release()->managed, "dltensor", forget);
}

bool meet(PyObject* tensor, PyObject* parameter) {
    constexpr std::uint32_t known = 1;
    PyObject* const capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
    const void* const offered = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
    Py_XDECREF(capsule);  // the class keeps it
    PyErr_Clear();
    const auto* const found = static_cast<const dlpack::Exchange*>(offered);
    if (!found || found->version.major != known || !found->tensor_from_object) return false;
    tensor_class = reinterpret_cast<PyTypeObject*>(Py_NewRef(tensor));
    parameter_class = reinterpret_cast<PyTypeObject*>(Py_NewRef(parameter));
    exchange = found;
    return true;
}

bool describe(PyObject* object, dlpack::Tensor& described) {
    const PyTypeObject* const type = Py_TYPE(object);
    if (!exchange || (type != tensor_class && type != parameter_class)) return false;
    if (exchange->tensor_from_object(object, &described)) {
        PyErr_Clear();
        return false;
    }
    described.data = static_cast<char*>(described.data) + described.byte_offset;
    return described.device.type == dlpack::processor && described.data && described.dtype.lanes == 1;
}

bool type_of(const dlpack::Tensor& tensor, Type& type) {
    for (const Type candidate : {Type::float64, Type::float32, Type::bfloat16, Type::float16}) {
        const dlpack::DataType expected = described(candidate);
        if (tensor.dtype.code != expected.code || tensor.dtype.bits != expected.bits) continue;
        type = candidate;
        return true;
    }
    return false;
}

}  // namespace batchnorm
