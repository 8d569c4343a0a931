#include "tensors.h"

#include <memory>

#include "buffers.h"

namespace batchnorm {

namespace {

// The structures of DLPack 0.8, https://dmlc.github.io/dlpack
struct Device { std::int32_t type, id; };
struct DataType { std::uint8_t code, bits; std::uint16_t lanes; };
struct Described {
    void* data;
    Device device;
    std::int32_t ndim;
    DataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};
struct Managed {
    Described tensor;
    void* context;
    void (*deleter)(Managed*);
};
struct Owner {
    Managed managed;
    std::vector<std::int64_t> shape, strides;
};

DataType described(Type type) {
    constexpr std::uint8_t floating = 2, bfloat = 4;
    switch (type) {
        case Type::float64: return {floating, 64, 1};
        case Type::float32: return {floating, 32, 1};
        case Type::bfloat16: return {bfloat, 16, 1};
        case Type::float16: return {floating, 16, 1};
    }
    return {};
}

void give_back(Managed* managed) {
    give_block(managed->tensor.data);
    delete static_cast<Owner*>(managed->context);
}

void forget(PyObject* capsule) {  // a capsule that nobody made a tensor of
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    give_back(static_cast<Managed*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

}  // namespace

PyObject* make_capsule(Type type, const std::vector<std::int64_t>& shape,
                       const std::vector<std::int64_t>& strides) {
    const DataType dtype = described(type);
    std::size_t bytes = dtype.bits / 8;
    for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
    auto owner = std::make_unique<Owner>();
    owner->shape = shape;
    owner->strides = strides;
    owner->managed = {{take_block(bytes), {1, 0}, static_cast<std::int32_t>(shape.size()), dtype,
                       owner->shape.data(), owner->strides.data(), 0},
                      owner.get(), give_back};
    return PyCapsule_New(&owner.release()->managed, "dltensor", forget);
}

}  // namespace batchnorm
