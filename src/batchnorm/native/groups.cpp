#include "groups.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

namespace batchnorm {

namespace {

std::int64_t bytes_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

template <class A> void advance(A*& numbers, std::int64_t by) {
    if (numbers) numbers += by;
}

std::vector<Tensor*> operands(Forward& call) { return {&call.x, &call.residual, &call.y}; }

std::vector<Tensor*> operands(Backward& call) {
    return {&call.x, &call.residual, &call.dy, &call.dx, &call.dresidual};
}

// What both calls have, of one group.
template <class Whole> Whole group_of(const Whole& whole, std::int64_t g) {
    Whole call = whole;
    const std::int64_t first = g * whole.group;
    call.N = g + 1 < whole.groups ? whole.group : whole.N - first;
    call.groups = 1;
    for (Tensor* const tensor : operands(call))
        if (tensor->data)
            tensor->data = static_cast<char*>(tensor->data) + first * tensor->outer * bytes_of(call.type);
    if (call.mask)
        call.mask = static_cast<const char*>(call.mask) +
                    first * call.S * std::max<std::int64_t>(4, bytes_of(call.type));
    advance(call.mean, g * call.C);
    advance(call.inverse_std, g * call.C);
    advance(call.count, g);
    return call;
}

void run_group(const Forward& whole, std::int64_t g, int threads, int beside) {
    Forward call = group_of(whole, g);
    call.threads = threads, call.beside = beside;
    advance(call.m2, g * call.C);
    kernels().forward(call);
}

void run_group(const Backward& whole, std::int64_t g, int threads, int beside) {
    Backward call = group_of(whole, g);
    call.threads = threads, call.beside = beside;
    advance(call.sum_g, g * call.C);
    advance(call.sum_g_xhat, g * call.C);
    kernels().backward(call);
}

// Side by side where all threads have about as many groups to do: then no group is shared out.
template <class Whole> void run_groups(const Whole& whole) {
    const int threads = whole.threads;
    const bool side_by_side = threads > 1 && whole.values >= 1 << 15 &&
                              (whole.groups % threads == 0 || whole.groups >= 4 * threads);
    if (!side_by_side) {
        for (std::int64_t g = 0; g < whole.groups; ++g) run_group(whole, g, threads, 1);
        return;
    }
    std::atomic<bool> failed{false};  // nothing may be thrown out of a team
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t g = 0; g < whole.groups; ++g) {
        try {
            run_group(whole, g, 1, threads);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    }
    if (failed) throw std::bad_alloc();
}

}  // namespace

void run(const Forward& call) { call.groups == 1 ? kernels().forward(call) : run_groups(call); }

void run(const Backward& call) { call.groups == 1 ? kernels().backward(call) : run_groups(call); }

}  // namespace batchnorm
