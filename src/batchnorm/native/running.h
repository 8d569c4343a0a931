// How running statistics follow a batch's moments: see update_running in functional/running.py.
#pragma once

#include <cmath>
#include <limits>

#include "arguments.h"

namespace batchnorm {

// running += (batch - running) * rate, if all of it can be kept.
template <class A>
bool move(A* means, A* vars, Integer C, const double* mean, const double* m2, double rate, double share) {
    constexpr double largest = std::numeric_limits<A>::max(), finite = std::numeric_limits<double>::max();
    const auto stepped = [rate](double now, double batch) { return now + (batch - now) * rate; };
    bool kept = true;
    for (Integer c = 0; c < C; ++c)  // NaN is not kept either
        kept &= std::abs(stepped(means[c], mean[c])) <= largest && std::abs(mean[c]) <= finite &&
                stepped(vars[c], m2[c] * share) <= largest && m2[c] * share <= finite;
    for (Integer c = 0; c < C && kept; ++c) {
        means[c] = static_cast<A>(stepped(means[c], mean[c]));
        vars[c] = static_cast<A>(stepped(vars[c], m2[c] * share));
    }
    return kept;
}

// Moves the running statistics, by the mean and the m2 of `count` values. A momentum of NaN averages over
// all batches. False, having done nothing, if the tensors have to be converted first.
inline bool follow(double count, Integer C, const double* mean, const double* m2, nb::handle running_mean,
                   nb::handle running_var, double momentum, nb::handle tracked) {
    PerChannel means, vars;
    Integer* counter = nullptr;
    if (!read_channels(running_mean, C, means) || !read_channels(running_var, C, vars) ||
        !read_counter(tracked, counter))
        return false;
    if (!means.data || !vars.data || means.type != vars.type || !is_float(means.type)) return false;
    if (!(count > 1)) return true;
    const double rate = counter && std::isnan(momentum) ? 1.0 / (*counter + 1) : momentum;
    const auto moved = [&](auto* to_means) {
        auto* const to_vars = static_cast<decltype(to_means)>(const_cast<void*>(vars.data));
        return move(to_means, to_vars, C, mean, m2, rate, 1 / (count - 1));
    };
    void* const data = const_cast<void*>(means.data);
    if (means.type == Type::float32 ? moved(static_cast<float*>(data)) : moved(static_cast<double*>(data)))
        if (counter) *counter += 1;
    return true;
}

}  // namespace batchnorm
