// How much the caches of this machine hold.
#pragma once

#include <cstdint>

namespace batchnorm {

// The last level, which the threads share.
std::int64_t cache_bytes();

}  // namespace batchnorm
