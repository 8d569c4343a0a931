// Memory for large results that does not cost page faults on every call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace batchnorm {

// Blocks that tensors gave back wait here for the next ones of about their size: ten seconds, for
// then they go back to the system; and there is never more of them than the limit.
void* take_block(std::size_t bytes);
void give_block(void* block);

// The most that may wait, in bytes; 0 recycles nothing. Returns the limit before.
std::size_t limit_blocks(std::size_t bytes);

// Gives all that waits back to the system. Returns how many bytes that were.
std::size_t release_blocks();

}  // namespace batchnorm
