// The structures of DLPack, https://dmlc.github.io/dlpack: how frameworks tell each other of tensors.
#pragma once

#include <cstdint>

namespace batchnorm::dlpack {

constexpr std::int32_t processor = 1;  // a device: what the CPU reads
enum : std::uint8_t { integer = 0, floating = 2, bfloat = 4 };

struct Device { std::int32_t type, id; };
struct DataType { std::uint8_t code, bits; std::uint16_t lanes; };
struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    DataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};

// 0.8: what a capsule holds.
struct Managed {
    Tensor tensor;
    void* context;
    void (*deleter)(Managed*);
};

// 1.3: the functions that a class of tensors offers as __dlpack_c_exchange_api__.
struct Exchange {
    struct { std::uint32_t major, minor; } version;
    void* older;
    void (*allocate)();
    void (*managed_from_object)();
    void (*managed_to_object)();
    int (*tensor_from_object)(void* object, Tensor* tensor);  // not 0: a Python error is set
    void (*current_stream)();
};

}  // namespace batchnorm::dlpack
