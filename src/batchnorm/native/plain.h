// Plain calls: tensors are checked and read here, and nothing is converted; see kernels/plain.py.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "plan.h"
#include "running.h"

namespace batchnorm {

// What a plain call found, for its backward pass: two numbers a channel of each group; and m2, where
// running statistics will follow it.
struct Statistics {
    Statistics(Integer C, std::vector<double> counts, bool of_batch)
        : C(C), groups(counts.size()), counts(std::move(counts)), of_batch(of_batch), mean(groups * C),
          inverse_std(groups * C) {}

    // Numbers a channel as a tensor, which no mode of torch sees being made.
    nb::object tensor(const std::vector<double>& numbers, bool of_groups) const {
        void* data;
        const nb::object made = of_groups && groups > 1 ? new_tensor(Type::float64, {groups, C}, {C, 1}, data)
                                                        : new_tensor(Type::float64, {C}, {1}, data);
        std::copy(numbers.begin(), numbers.end(), static_cast<double*>(data));
        return made;
    }

    // mean and inverse_std, (C) or (groups, C).
    nb::object tensors() const { return nb::make_tuple(tensor(mean, true), tensor(inverse_std, true)); }

    // count, mean and m2 of all groups together, by Chan's update.
    struct Merged {
        double count = 0;
        std::vector<double> mean, m2;
    };
    Merged merged() const {
        Merged all{counts[0], {mean.begin(), mean.begin() + C}, {m2.begin(), m2.begin() + C}};
        for (Integer g = 1; g < groups; ++g) {
            const double count = all.count + counts[g], share = counts[g] / count;
            for (Integer c = 0; c < C; ++c) {
                const double delta = mean[g * C + c] - all.mean[c];
                all.mean[c] += delta * share;
                all.m2[c] += m2[g * C + c] + delta * delta * (all.count * share);
            }
            all.count = count;
        }
        return all;
    }
    nb::object moments() const {
        const Merged all = merged();
        return nb::make_tuple(all.count, tensor(all.mean, false), tensor(all.m2, false));
    }

    // Moves running statistics, and forgets m2. False if they cannot be moved here.
    bool lead(nb::handle running_mean, nb::handle running_var, double momentum, nb::handle tracked) {
        const auto move = [&](double count, const double* own, const double* spread) {
            return follow(count, C, own, spread, running_mean, running_var, momentum, tracked);
        };
        bool moved;
        if (groups == 1) {
            moved = move(counts[0], mean.data(), m2.data());
        } else {
            const Merged all = merged();
            moved = move(all.count, all.mean.data(), all.m2.data());
        }
        if (moved) m2 = {};
        return moved;
    }

    Integer C, groups;
    std::vector<double> counts;
    bool of_batch;  // or running ones
    std::vector<double> mean, inverse_std, m2;
};

// Returns y and what was found, or None, having done nothing, where something has to be converted,
// copied or refused first. With `training` the batch's moments normalize, and running ones otherwise.
// `track`: running statistics will follow the batch's moments.
inline nb::object forward_plain(const Plan& plan, int threads, nb::handle x, nb::handle residual,
                                nb::handle weight, nb::handle bias, nb::handle running_mean,
                                nb::handle running_var, bool training, bool track) {
    Forward call;
    PerChannel means, vars;
    if (!plan.read(x, call.x) || !plan.read(residual, call.residual) ||
        !read_channels(weight, plan.C, call.weight) || !read_channels(bias, plan.C, call.bias) ||
        !read_channels(running_mean, plan.C, means) || !read_channels(running_var, plan.C, vars))
        return nb::none();
    if (!means.data != !vars.data || means.type != vars.type) return nb::none();
    if (!means.data && (track || !training)) return nb::none();
    std::vector<double> counts = plan.counts();
    for (const double count : counts)
        if (count < (training ? 2 : 1)) return nb::none();
    if (!(training ? plan.eps > 0 : plan.eps >= 0)) return nb::none();
    auto found = std::make_unique<Statistics>(plan.C, std::move(counts), training);
    const nb::object y = plan.output(call.y);
    plan.fill(call, threads);
    call.collect = training;
    call.eps = plan.eps, call.correction = plan.correction;
    call.mean = found->mean.data(), call.inverse_std = found->inverse_std.data();
    std::vector<double> m2(training ? found->mean.size() : 0);
    call.m2 = m2.data();
    call.count = found->counts.data();
    if (!training) call.running_mean = means, call.running_var = vars;
    run_beside_python(call);
    if (track) found->m2 = std::move(m2);
    return nb::make_tuple(y, std::move(found));
}

// Returns the gradients of x, weight, bias and residual, those that are wanted; or None, having done
// nothing, where something has to be converted first.
inline nb::object backward_plain(const Plan& plan, Statistics& found, int threads, nb::handle x,
                                 nb::handle dy, nb::handle residual, nb::handle weight, nb::handle bias,
                                 bool need_x, bool need_weight, bool need_bias, bool need_residual) {
    Backward call;
    if (!plan.read(x, call.x) || !plan.read(dy, call.dy) || !plan.read(residual, call.residual) ||
        !read_channels(weight, plan.C, call.weight) || !read_channels(bias, plan.C, call.bias))
        return nb::none();
    const bool through_z = need_residual && plan.activation != static_cast<int>(Activation::none);
    PerChannel to_weight, to_bias;
    const nb::object dx = need_x || through_z ? plan.output(call.dx) : nb::none();
    const nb::object dresidual = through_z ? plan.output(call.dresidual) : nb::none();
    const nb::object dweight = need_weight ? plan.output(call.weight, to_weight) : nb::none();
    const nb::object dbias = need_bias ? plan.output(call.bias, to_bias) : nb::none();
    plan.fill(call, threads);
    call.mean = found.mean.data(), call.inverse_std = found.inverse_std.data();
    call.through = need_x && found.of_batch;
    call.reduce = need_weight || need_bias || call.through;
    call.count = found.counts.data(), call.correction = plan.correction;
    std::vector<double> sums(2 * found.mean.size());
    call.sum_g = sums.data(), call.sum_g_xhat = call.sum_g + found.mean.size();
    run_beside_python(call);
    const auto put = [&](const PerChannel& to, const double* of_groups) {
        put_sum(const_cast<void*>(to.data), to.type, plan.C, plan.groups, of_groups);
    };
    if (need_weight) put(to_weight, call.sum_g_xhat);
    if (need_bias) put(to_bias, call.sum_g);
    return nb::make_tuple(need_x ? dx : nb::none(), dweight, dbias,
                          through_z || !need_residual ? dresidual : nb::borrow(dy));
}

}  // namespace batchnorm
