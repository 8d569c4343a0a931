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

struct Version { std::uint32_t major, minor; };

// A tensor with what owns its memory.
struct Managed {
    Version version;
    void* context;
    void (*deleter)(Managed*);
    std::uint64_t flags;
    Tensor tensor;
};

// The functions that a class of tensors offers as its __dlpack_c_exchange_api__. Those that return a
// number set a Python error where it is not 0.
struct Exchange {
    Version version;
    void* older;
    void (*allocate)();
    void (*managed_from_object)();
    int (*managed_to_object)(Managed* managed, void** object);
    int (*tensor_from_object)(void* object, Tensor* tensor);
    void (*current_stream)();
};

}  // namespace batchnorm::dlpack
