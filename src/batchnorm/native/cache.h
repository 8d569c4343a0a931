// How much the caches of this machine hold.
#pragma once

#include <cstdint>

namespace batchnorm {

// The last level, which the threads share.
std::int64_t cache_bytes();

// Says so many bytes instead, or again the truth if 0: for tests, of what large batches do.
void pretend_cache(std::int64_t bytes);

}  // namespace batchnorm
