#include "buffers.h"

#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

#include <pthread.h>
#include <sys/mman.h>

namespace batchnorm {

namespace {

constexpr std::size_t huge_page = std::size_t{2} << 20;

struct Block {
    void* data;
    std::size_t bytes;
};

struct Pool {
    std::mutex mutex;
    std::list<Block> waiting;  // the longest waiting first
    std::unordered_map<void*, std::size_t> taken;
    std::size_t waiting_bytes = 0, limit = 0;
};

// Never destroyed: tensors give their memory back until the very end of a process.
Pool& pool() {
    static Pool* const instance = [] {
        Pool* made = new Pool;
        // a process that forks must not leave the lock taken in its child
        pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                       [] { pool().mutex.unlock(); });
        return made;
    }();
    return *instance;
}

// New memory, aligned to huge pages and advised to be made of them before anyone touches it.
void* map_block(std::size_t bytes) {
    char* mapped = static_cast<char*>(mmap(nullptr, bytes + huge_page, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    const std::size_t head = -reinterpret_cast<std::uintptr_t>(mapped) % huge_page;
    if (head) munmap(mapped, head);
    munmap(mapped + head + bytes, huge_page - head);
#if defined(MADV_HUGEPAGE)
    madvise(mapped + head, bytes, MADV_HUGEPAGE);
#endif
    return mapped + head;
}

void drop_oldest(Pool& from) {
    const Block block = from.waiting.front();
    from.waiting.pop_front();
    from.waiting_bytes -= block.bytes;
    munmap(block.data, block.bytes);
}

}  // namespace

void* take_block(std::size_t bytes) {
    bytes = (bytes + huge_page - 1) / huge_page * huge_page;
    Pool& from = pool();
    const std::lock_guard<std::mutex> lock(from.mutex);
    for (auto block = from.waiting.rbegin(); block != from.waiting.rend(); ++block) {
        if (block->bytes < bytes || block->bytes > bytes + bytes / 8) continue;
        const Block found = *block;
        from.waiting.erase(std::next(block).base());
        from.waiting_bytes -= found.bytes;
        from.taken[found.data] = found.bytes;
        return found.data;
    }
    void* const data = map_block(bytes);
    from.taken[data] = bytes;
    return data;
}

void give_block(void* data) {
    Pool& to = pool();
    const std::lock_guard<std::mutex> lock(to.mutex);
    const auto entry = to.taken.find(data);
    const Block block{data, entry->second};
    to.taken.erase(entry);
    if (block.bytes > to.limit) {
        munmap(block.data, block.bytes);
        return;
    }
#if defined(MADV_FREE)
    madvise(block.data, block.bytes, MADV_FREE);
#endif
    to.waiting.push_back(block);
    to.waiting_bytes += block.bytes;
    while (to.waiting_bytes > to.limit) drop_oldest(to);
}

std::size_t limit_blocks(std::size_t bytes) {
    Pool& of = pool();
    const std::lock_guard<std::mutex> lock(of.mutex);
    const std::size_t before = of.limit;
    of.limit = bytes;
    while (of.waiting_bytes > of.limit) drop_oldest(of);
    return before;
}

std::size_t release_blocks() {
    Pool& of = pool();
    const std::lock_guard<std::mutex> lock(of.mutex);
    const std::size_t bytes = of.waiting_bytes;
    while (!of.waiting.empty()) drop_oldest(of);
    return bytes;
}

}  // namespace batchnorm
