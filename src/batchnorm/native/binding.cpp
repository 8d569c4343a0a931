// What Python sees: addresses, steps and sizes go in, numbers come out, and the checks are in Python.
// The plain calls take tensors instead, and check them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
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

nb::object new_tensor(Type type, const std::vector<Integer>& shape, const std::vector<Integer>& strides,
                      void*& data) {
    PyObject* const made = make_tensor(type, shape, strides, data);
    if (!made) throw nb::python_error();
    return nb::steal(made);
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
void follow(double count, Integer C, const double* mean, const double* m2, void* running_mean,
            void* running_var, Type running_type, double momentum, Integer* tracked) {
    if (!(count > 1)) return;
    const double rate = tracked && std::isnan(momentum) ? 1.0 / (*tracked + 1) : momentum;
    const auto moved = [&](auto* means) {
        return move(means, static_cast<decltype(means)>(running_var), C, mean, m2, rate, 1 / (count - 1));
    };
    if (running_type == Type::float32 ? moved(static_cast<float*>(running_mean))
                                      : moved(static_cast<double*>(running_mean)))
        if (tracked) *tracked += 1;
}

void follow_addresses(double count, Integer C, Address mean, Address m2, Address running_mean,
                      Address running_var, int running_type, double momentum, Address tracked) {
    follow(count, C, pointer<double>(mean), pointer<double>(m2), pointer<void>(running_mean),
           pointer<void>(running_var), static_cast<Type>(running_type), momentum,
           pointer<Integer>(tracked));
}

// What a plain call of C channels was given for each, read from a tensor or None.
bool read_channels(nb::handle object, Integer C, PerChannel& values) {
    if (object.is_none()) return true;
    dlpack::Tensor tensor;
    if (!describe(object.ptr(), tensor) || !type_of(tensor, values.type)) return false;
    if (tensor.ndim != 1 || tensor.shape[0] != C || tensor.strides[0] != 1) return false;
    values.data = tensor.data;
    return true;
}

bool read_counter(nb::handle object, Integer*& counter) {
    if (object.is_none()) return true;
    dlpack::Tensor tensor;
    if (!describe(object.ptr(), tensor) || tensor.ndim != 0) return false;
    if (tensor.dtype.code != dlpack::integer || tensor.dtype.bits != 64) return false;
    counter = static_cast<Integer*>(tensor.data);
    return true;
}

bool is_float(Type type) { return type == Type::float32 || type == Type::float64; }

// What a plain call found, for its backward pass: two numbers a channel; and m2, until the running
// statistics that it was given followed.
struct Statistics {
    Statistics(Integer C, double count, bool of_batch)
        : C(C), count(count), of_batch(of_batch), mean(C), inverse_std(C) {}

    // mean and inverse_std as tensors, which no mode of torch sees being made.
    nb::object tensors() const {
        nb::object made[2];
        for (int i = 0; i < 2; ++i) {
            void* data;
            made[i] = new_tensor(Type::float64, {C}, {1}, data);
            std::copy_n((i ? inverse_std : mean).data(), C, static_cast<double*>(data));
        }
        return nb::make_tuple(made[0], made[1]);
    }

    // Moves running statistics, which `forward_plain` found fit for it.
    void lead(nb::handle running_mean, nb::handle running_var, double momentum, nb::handle tracked) {
        PerChannel means, vars;
        Integer* counter = nullptr;
        if (!read_channels(running_mean, C, means) || !read_channels(running_var, C, vars) ||
            !read_counter(tracked, counter))
            throw nb::value_error("running statistics changed during the call");
        follow(count, C, mean.data(), m2.data(), const_cast<void*>(means.data), const_cast<void*>(vars.data),
               means.type, momentum, counter);
        m2 = {};
    }

    Integer C;
    double count;
    bool of_batch;  // or running ones
    std::vector<double> mean, inverse_std, m2;
};

// What does not change from call to call on batches of one shape.
struct Plan {
    bool planar;
    int type;
    Integer N, C, S;
    int activation;
    double parameter, eps, correction;
    std::vector<Integer> shape, strides;
    Integer outer, inner;  // the steps of the batch itself

    void fill(Call& call, int threads) const {
        call.type = static_cast<Type>(type);
        call.planar = planar;
        call.N = N, call.C = C, call.S = S;
        call.threads = threads;
        call.activation = static_cast<Activation>(activation);
        call.parameter = parameter;
    }

    void fill(Call& call, int threads, Address mask, Address weight, int weight_type, Address bias,
              int bias_type, Address mean, Address inverse_std) const {
        fill(call, threads);
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

    // A new tensor that lies in memory as the batch does, which is dense.
    nb::object output(Tensor& values) const {
        nb::object made = new_tensor(static_cast<Type>(type), shape, strides, values.data);
        values.outer = outer, values.inner = inner;
        return made;
    }

    // A new tensor for the gradient of a parameter.
    nb::object output(const PerChannel& parameter, PerChannel& values) const {
        values.type = is_float(parameter.type) ? parameter.type : Type::float64;
        return new_tensor(values.type, {C}, {1}, const_cast<void*&>(values.data));
    }

    // Read a tensor, or None, of the type and the shape of the batch that lies in memory as it does.
    bool read(nb::handle object, Tensor& values) const {
        if (object.is_none()) return true;
        dlpack::Tensor tensor;
        Type own;
        if (!describe(object.ptr(), tensor) || !type_of(tensor, own)) return false;
        if (own != static_cast<Type>(type) || tensor.ndim != static_cast<int>(shape.size())) return false;
        for (std::size_t d = 0; d < shape.size(); ++d)
            if (tensor.shape[d] != shape[d] || (shape[d] > 1 && tensor.strides[d] != strides[d])) return false;
        values = {tensor.data, outer, inner};
        return true;
    }

    // Returns y and what was found, or None, having done nothing, where something has to be converted,
    // copied or refused first. With `training` the batch's moments normalize, and the running ones, where
    // they are given, can follow them afterwards; otherwise those normalize.
    nb::object forward_plain(int threads, nb::handle x, nb::handle residual, nb::handle weight,
                             nb::handle bias, nb::handle running_mean, nb::handle running_var,
                             nb::handle tracked, bool training) const {
        Forward call;
        PerChannel means, vars;
        Integer* counter = nullptr;
        if (!read(x, call.x) || !read(residual, call.residual) || !read_channels(weight, C, call.weight) ||
            !read_channels(bias, C, call.bias) || !read_channels(running_mean, C, means) ||
            !read_channels(running_var, C, vars) || !read_counter(tracked, counter))
            return nb::none();
        if (!means.data != !vars.data || means.type != vars.type) return nb::none();
        if (training ? means.data && !is_float(means.type) : !means.data) return nb::none();
        if (N * S < (training ? 2 : 1) || !(training ? eps > 0 : eps >= 0)) return nb::none();
        auto found = std::make_unique<Statistics>(C, static_cast<double>(N * S), training);
        const nb::object y = output(call.y);
        fill(call, threads);
        call.collect = training;
        call.eps = eps, call.correction = correction;
        call.mean = found->mean.data(), call.inverse_std = found->inverse_std.data();
        std::vector<double> m2(training ? C : 0);
        call.m2 = m2.data();
        call.count = &found->count;
        if (!training) call.running_mean = means, call.running_var = vars;
        let_others_run(call, [&] { kernels().forward(call); });
        if (means.data) found->m2 = std::move(m2);
        return nb::make_tuple(y, std::move(found));
    }

    // Returns the gradients of x, weight, bias and residual, those that are wanted; or None, having done
    // nothing, where something has to be converted first.
    nb::object backward_plain(Statistics& found, int threads, nb::handle x, nb::handle dy, nb::handle residual,
                              nb::handle weight, nb::handle bias, bool need_x, bool need_weight,
                              bool need_bias, bool need_residual) const {
        Backward call;
        if (!read(x, call.x) || !read(dy, call.dy) || !read(residual, call.residual) ||
            !read_channels(weight, C, call.weight) || !read_channels(bias, C, call.bias))
            return nb::none();
        const bool through_z = need_residual && activation != static_cast<int>(Activation::none);
        PerChannel to_weight, to_bias;
        const nb::object dx = need_x || through_z ? output(call.dx) : nb::none();
        const nb::object dresidual = through_z ? output(call.dresidual) : nb::none();
        const nb::object dweight = need_weight ? output(call.weight, to_weight) : nb::none();
        const nb::object dbias = need_bias ? output(call.bias, to_bias) : nb::none();
        fill(call, threads);
        call.mean = found.mean.data(), call.inverse_std = found.inverse_std.data();
        call.through = need_x && found.of_batch;
        call.reduce = need_weight || need_bias || call.through;
        call.count = static_cast<double>(N * S), call.correction = correction;
        std::vector<double> sums(2 * C);
        call.sum_g = sums.data(), call.sum_g_xhat = call.sum_g + C;
        let_others_run(call, [&] { kernels().backward(call); });
        for (Integer c = 0; c < C && need_weight; ++c)
            put(const_cast<void*>(to_weight.data), to_weight.type, c, call.sum_g_xhat[c]);
        for (Integer c = 0; c < C && need_bias; ++c)
            put(const_cast<void*>(to_bias.data), to_bias.type, c, call.sum_g[c]);
        return nb::make_tuple(need_x ? dx : nb::none(), dweight, dbias,
                              through_z || !need_residual ? dresidual : nb::borrow(dy));
    }
};

}  // namespace

NB_MODULE(_native, module) {
    using namespace nb::literals;
    nb::set_leak_warnings(false);  // plans are kept in a cache of Python's until the very end
    nb::class_<Plan>(module, "Plan")
        .def(nb::init<bool, int, Integer, Integer, Integer, int, double, double, double,
                      const std::vector<Integer>&, const std::vector<Integer>&, Integer, Integer>())
        .def("forward", &Plan::forward)
        .def("backward", &Plan::backward)
        .def("output", [](const Plan& plan) { Tensor values; return plan.output(values); })
        .def("forward_plain", &Plan::forward_plain, "threads"_a, "x"_a, "residual"_a.none(),
             "weight"_a.none(), "bias"_a.none(), "running_mean"_a.none(), "running_var"_a.none(),
             "tracked"_a.none(), "training"_a)
        .def("backward_plain", &Plan::backward_plain, "found"_a, "threads"_a, "x"_a, "dy"_a,
             "residual"_a.none(), "weight"_a.none(), "bias"_a.none(), "need_x"_a, "need_weight"_a,
             "need_bias"_a, "need_residual"_a);
    nb::class_<Statistics>(module, "Statistics")
        .def_ro("of_batch", &Statistics::of_batch)
        .def_ro("count", &Statistics::count)
        .def("tensors", &Statistics::tensors)
        .def("lead", &Statistics::lead, "running_mean"_a, "running_var"_a, "momentum"_a, "tracked"_a.none());
    module.def("follow", &follow_addresses);
    module.def("find_exchange", [](nb::handle tensor, nb::handle parameter) {
        return find_exchange(tensor.ptr(), parameter.ptr());
    });
    module.def("poison_tensors", &poison_tensors);
    module.def("pretend_cache", &pretend_cache);
    module.def("instructions", &instructions);
    module.def("use_instructions", &use_instructions);
    module.def("cache_bytes", &cache_bytes);
    module.def("limit_buffers", &limit_blocks);
    module.def("release_buffers", &release_blocks);
}

}  // namespace batchnorm
