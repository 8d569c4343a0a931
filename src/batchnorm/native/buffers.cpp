#include "buffers.h"

#include <chrono>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <unordered_map>

#include <pthread.h>
#include <sys/mman.h>

namespace batchnorm {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t huge_page = std::size_t{2} << 20;
constexpr std::chrono::milliseconds patience{10000};

struct Block {
    void* data;
    std::size_t bytes;
    Clock::time_point since;
};

#if defined(__SANITIZE_ADDRESS__)  // which sees past the end of what its own allocator gave
constexpr std::size_t small_step = 64, large_step = 64;

void* map_block(std::size_t bytes) {
    void* const data = std::aligned_alloc(64, bytes);
    if (!data) throw std::bad_alloc();
    return data;
}

void unmap(void* data, std::size_t) { std::free(data); }
#else
constexpr std::size_t small_step = std::size_t{64} << 10, large_step = huge_page;

char* map_bytes(std::size_t bytes) {
    void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(mapped);
}

// New memory; if large, aligned to huge pages and advised to be made of them before anyone touches it.
void* map_block(std::size_t bytes) {
    if (bytes < huge_page) return map_bytes(bytes);
    char* const mapped = map_bytes(bytes + huge_page);
    const std::size_t head = -reinterpret_cast<std::uintptr_t>(mapped) % huge_page;
    if (head) munmap(mapped, head);
    munmap(mapped + head + bytes, huge_page - head);
#if defined(MADV_HUGEPAGE)
    madvise(mapped + head, bytes, MADV_HUGEPAGE);
#endif
    return mapped + head;
}

void unmap(void* data, std::size_t bytes) { munmap(data, bytes); }
#endif

// Blocks that wait are on a list, the longest waiting first. A thread that runs only while there are
// any gives back those that nobody asked for in time.
struct Pool {
    std::mutex mutex;
    std::list<Block> waiting;
    std::unordered_map<void*, std::size_t> taken;
    std::size_t waiting_bytes = 0, limit = 0;
    bool watched = false;

    void drop_oldest() {
        const Block block = waiting.front();
        waiting.pop_front();
        waiting_bytes -= block.bytes;
        unmap(block.data, block.bytes);
    }

    // In a child that was forked, where no thread watches, and what waits is a copy of the parent's.
    void start_anew() {
        watched = false;
        while (!waiting.empty()) drop_oldest();
        mutex.unlock();
    }
};

// Never destroyed: tensors give their memory back until the very end of a process.
Pool& pool() {
    static Pool* const instance = [] {
        // a process that forks must not leave the lock taken in its child
        pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                       [] { pool().start_anew(); });
        return new Pool;
    }();
    return *instance;
}

void watch() {
    Pool& from = pool();
    for (;;) {
        std::this_thread::sleep_for(patience / 4);
        const std::lock_guard<std::mutex> lock(from.mutex);
        while (!from.waiting.empty() && Clock::now() - from.waiting.front().since > patience)
            from.drop_oldest();
        from.watched = !from.waiting.empty();
        if (!from.watched) return;
    }
}

}  // namespace

void* take_block(std::size_t bytes) {
    const std::size_t step = bytes < huge_page ? small_step : large_step;
    bytes = (bytes + step - 1) / step * step;
    Pool& from = pool();
    const std::lock_guard<std::mutex> lock(from.mutex);
    for (auto block = from.waiting.rbegin(); block != from.waiting.rend(); ++block) {
        if (block->bytes < bytes || block->bytes > bytes + bytes / 8) continue;
        const Block found = *block;
        from.taken.emplace(found.data, found.bytes);  // first: if it throws, the block still waits
        from.waiting.erase(std::next(block).base());
        from.waiting_bytes -= found.bytes;
        return found.data;
    }
    void* const data = map_block(bytes);
    try {
        from.taken.emplace(data, bytes);
    } catch (...) {
        unmap(data, bytes);
        throw;
    }
    return data;
}

void give_block(void* data) {
    Pool& to = pool();
    const std::lock_guard<std::mutex> lock(to.mutex);
    const auto entry = to.taken.find(data);
    const Block block{data, entry->second, Clock::now()};
    to.taken.erase(entry);
    to.waiting.push_back(block);
    to.waiting_bytes += block.bytes;
    while (to.waiting_bytes > to.limit) to.drop_oldest();
    if (to.watched || to.waiting.empty()) return;
    try {
        std::thread(watch).detach();
        to.watched = true;
    } catch (const std::system_error&) {  // no thread to be had: nothing may wait
        while (!to.waiting.empty()) to.drop_oldest();
    }
}

std::size_t limit_blocks(std::size_t bytes) {
    Pool& of = pool();
    const std::lock_guard<std::mutex> lock(of.mutex);
    const std::size_t before = of.limit;
    of.limit = bytes;
    while (of.waiting_bytes > of.limit) of.drop_oldest();
    return before;
}

std::size_t release_blocks() {
    Pool& of = pool();
    const std::lock_guard<std::mutex> lock(of.mutex);
    const std::size_t bytes = of.waiting_bytes;
    while (!of.waiting.empty()) of.drop_oldest();
    return bytes;
}

}  // namespace batchnorm
