#include "tensors.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "buffers.h"

namespace batchnorm {

namespace {

constexpr dlpack::Version known{1, 0};
#if defined(__SANITIZE_ADDRESS__)  // it watches what lies behind a block of its own allocator
constexpr std::size_t recycled_from = 0;
#else
constexpr std::size_t recycled_from = std::size_t{256} << 10;  // bytes
#endif
constexpr std::size_t alignment = 64;

dlpack::DataType described(Type type) {
    switch (type) {
        case Type::float64: return {dlpack::floating, 64, 1};
        case Type::float32: return {dlpack::floating, 32, 1};
        case Type::bfloat16: return {dlpack::bfloat, 16, 1};
        case Type::float16: return {dlpack::floating, 16, 1};
    }
    return {};
}

// Known after `find_exchange`; they live as long as the process.
const dlpack::Exchange* exchange = nullptr;
PyTypeObject* tensor_class = nullptr;
PyTypeObject* parameter_class = nullptr;

bool poisoned = false;

}  // namespace

PyObject* make_tensor(Type type, const std::vector<std::int64_t>& shape,
                      const std::vector<std::int64_t>& strides, void*& data) {
    const dlpack::DataType dtype = described(type);
    std::size_t bytes = dtype.bits / 8;
    for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
    dlpack::Managed* managed;
    if (bytes < recycled_from) {  // one allocation for both: aligned_alloc takes longer
        void* const memory = std::malloc(sizeof(dlpack::Managed) + alignment + bytes);
        if (!memory) throw std::bad_alloc();
        managed = new (memory) dlpack::Managed{};
        const auto end = reinterpret_cast<std::uintptr_t>(managed + 1);
        data = reinterpret_cast<void*>((end + alignment - 1) / alignment * alignment);
        managed->deleter = [](dlpack::Managed* self) { std::free(self); };
    } else {
        auto owner = std::make_unique<dlpack::Managed>();
        data = take_block(bytes);
        managed = owner.release();
        managed->deleter = [](dlpack::Managed* self) {
            give_block(self->tensor.data);
            delete self;
        };
    }
    if (poisoned) std::memset(data, 0xff, bytes);
    managed->version = known;
    // torch copies shape and strides
    managed->tensor = {data, {dlpack::processor, 0}, static_cast<std::int32_t>(shape.size()), dtype,
                       const_cast<std::int64_t*>(shape.data()), const_cast<std::int64_t*>(strides.data()), 0};
    void* object = nullptr;
    // where that fails, torch may have freed it already, or not
    return exchange->managed_to_object(managed, &object) ? nullptr : static_cast<PyObject*>(object);
}

void poison_tensors(bool on) { poisoned = on; }

bool find_exchange(PyObject* tensor, PyObject* parameter) {
    PyObject* const capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
    const void* const offered = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
    Py_XDECREF(capsule);  // the class keeps it
    PyErr_Clear();
    const auto* const found = static_cast<const dlpack::Exchange*>(offered);
    if (!found || found->version.major != known.major || !found->tensor_from_object) return false;
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
