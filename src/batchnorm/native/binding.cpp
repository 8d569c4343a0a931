// What Python sees: addresses, steps and sizes go in, numbers come out. The checks are in Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <limits>
#include <vector>

#include "buffers.h"
#include "cache.h"
#include "call.h"
#include "tensors.h"

namespace nb = nanobind;

namespace batchnorm {

namespace {

using Address = std::uintptr_t;
using Integer = std::int64_t;

template <class A> A* pointer(Address address) { return reinterpret_cast<A*>(address); }

Tensor tensor(Address address, Integer outer, Integer inner) {
    return {pointer<void>(address), outer, inner};
}

PerChannel per_channel(Address address, int type) {
    return {pointer<const void>(address), static_cast<Type>(type)};
}

void put(void* to, Type type, Integer at, double value) {
    if (type == Type::float64) static_cast<double*>(to)[at] = value;
    else static_cast<float*>(to)[at] = static_cast<float>(value);
}

// Other threads of Python run while a large batch is worked on.
template <class F> void let_others_run(const Call& call, F work) {
    if (call.N * call.C * call.S < 1 << 14) return work();
    const nb::gil_scoped_release released;
    work();
}

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

// running += (batch - running) * rate, by the m2 of `count` values; see update_running in
// functional/batch_norm.py. A momentum of NaN averages over all batches.
void follow(double count, Integer C, Address batch_mean, Address batch_m2, Address running_mean,
            Address running_var, int running_type, double momentum, Address tracked) {
    const double* const mean = pointer<double>(batch_mean);
    const double* const m2 = pointer<double>(batch_m2);
    if (!(count > 1)) return;
    const double rate = tracked && std::isnan(momentum) ? 1.0 / (*pointer<Integer>(tracked) + 1) : momentum;
    const bool moved = running_type == static_cast<int>(Type::float32)
        ? move(pointer<float>(running_mean), pointer<float>(running_var), C, mean, m2, rate, 1 / (count - 1))
        : move(pointer<double>(running_mean), pointer<double>(running_var), C, mean, m2, rate, 1 / (count - 1));
    if (moved && tracked) *pointer<Integer>(tracked) += 1;
}

// What does not change from call to call on batches of one shape.
struct Plan {
    bool planar;
    int type;
    Integer N, C, S;
    int activation;
    double parameter, eps, correction;

    void fill(Call& call, int threads, Address mask, Address weight, int weight_type, Address bias,
              int bias_type, Address mean, Address inverse_std) const {
        call.type = static_cast<Type>(type);
        call.planar = planar;
        call.N = N, call.C = C, call.S = S;
        call.threads = threads;
        call.activation = static_cast<Activation>(activation);
        call.parameter = parameter;
        call.mask = pointer<const void>(mask);
        call.weight = per_channel(weight, weight_type);
        call.bias = per_channel(bias, bias_type);
        call.mean = pointer<double>(mean);
        call.inverse_std = pointer<double>(inverse_std);
    }

    // Writes y (0: only collects) and, where m2 is given, mean, inverse_std and m2 of the batch.
    // With running statistics mean and inverse_std are taken from those. Returns the count of values
    // per channel, where they were counted.
    double forward(int threads, Address x, Integer x_outer, Integer x_inner, Address y,
                   Integer y_outer, Integer y_inner, Address residual, Integer residual_outer,
                   Integer residual_inner, Address mask, Address weight, int weight_type,
                   Address bias, int bias_type, Address mean, Address inverse_std, Address m2,
                   Address running_mean, Address running_var, int running_type) const {
        Forward call;
        fill(call, threads, mask, weight, weight_type, bias, bias_type, mean, inverse_std);
        double count = 0;
        call.x = tensor(x, x_outer, x_inner);
        call.y = tensor(y, y_outer, y_inner);
        call.residual = tensor(residual, residual_outer, residual_inner);
        call.collect = m2 != 0;
        call.eps = eps, call.correction = correction;
        call.m2 = pointer<double>(m2);
        call.count = &count;
        call.running_mean = per_channel(running_mean, running_type);
        call.running_var = per_channel(running_var, running_type);
        let_others_run(call, [&] { kernels().forward(call); });
        return count;
    }

    // Writes dx (0: only the sums) and dresidual (0: not wanted). `reduce`: the sums are computed.
    // `through`: the moments depend on x, by the sums over `count` values. The sums are also written
    // as the gradients of weight and bias, where those are wanted.
    void backward(int threads, Address x, Integer x_outer, Integer x_inner, Address dy,
                  Integer dy_outer, Integer dy_inner, Address dx, Integer dx_outer,
                  Integer dx_inner, Address residual, Integer residual_outer,
                  Integer residual_inner, Address dresidual, Address mask, Address weight,
                  int weight_type, Address bias, int bias_type, Address mean, Address inverse_std,
                  bool reduce, bool through, double count, Address sum_g, Address sum_g_xhat,
                  Address dweight, int dweight_type, Address dbias, int dbias_type) const {
        Backward call;
        fill(call, threads, mask, weight, weight_type, bias, bias_type, mean, inverse_std);
        call.x = tensor(x, x_outer, x_inner);
        call.dy = tensor(dy, dy_outer, dy_inner);
        call.dx = tensor(dx, dx_outer, dx_inner);
        call.residual = tensor(residual, residual_outer, residual_inner);
        call.dresidual = tensor(dresidual, dx_outer, dx_inner);
        call.reduce = reduce, call.through = through;
        call.count = count, call.correction = correction;
        std::vector<double> own(sum_g ? 0 : 2 * C);  // sums that nobody asked for
        call.sum_g = sum_g ? pointer<double>(sum_g) : own.data();
        call.sum_g_xhat = sum_g ? pointer<double>(sum_g_xhat) : call.sum_g + C;
        let_others_run(call, [&] { kernels().backward(call); });
        for (Integer c = 0; c < C && dweight; ++c)
            put(pointer<void>(dweight), static_cast<Type>(dweight_type), c, call.sum_g_xhat[c]);
        for (Integer c = 0; c < C && dbias; ++c)
            put(pointer<void>(dbias), static_cast<Type>(dbias_type), c, call.sum_g[c]);
    }
};

}  // namespace

NB_MODULE(_native, module) {
    nb::set_leak_warnings(false);  // plans are kept in a cache of Python's until the very end
    nb::class_<Plan>(module, "Plan")
        .def(nb::init<bool, int, Integer, Integer, Integer, int, double, double, double>())
        .def("forward", &Plan::forward)
        .def("backward", &Plan::backward);
    module.def("follow", &follow);
    module.def("instructions", &instructions);
    module.def("use_instructions", &use_instructions);
    module.def("cache_bytes", &cache_bytes);
    module.def("limit_buffers", &limit_blocks);
    module.def("release_buffers", &release_blocks);
    module.def("make_capsule", [](int type, const std::vector<Integer>& shape, const std::vector<Integer>& strides) {
        return nb::steal(make_capsule(static_cast<Type>(type), shape, strides));
    });
}

}  // namespace batchnorm
