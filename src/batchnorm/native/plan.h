// What does not change from call to call on batches of one shape.
#pragma once

#include <vector>

#include "arguments.h"

namespace batchnorm {

struct Plan {
    bool planar;
    int type;
    Integer N, C, S;
    Integer groups, group;  // see call.h
    int activation;
    double parameter, eps, correction;
    std::vector<Integer> shape, strides;
    Integer outer, inner;  // the steps of the batch itself

    // The number of values a channel in each group.
    std::vector<double> counts() const {
        std::vector<double> found(groups, static_cast<double>(group * S));
        found.back() = static_cast<double>((N - (groups - 1) * group) * S);
        return found;
    }

    void fill(Call& call, int threads) const {
        call.type = static_cast<Type>(type);
        call.planar = planar;
        call.N = N, call.C = C, call.S = S;
        call.groups = groups, call.group = group;
        call.values = N * C * S;
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
    // With running statistics mean and inverse_std are taken from those. Returns the counts of values
    // per channel, one a group, where they were counted.
    std::vector<double> forward(int threads, Address x, Integer x_outer, Integer x_inner, Address y,
                                Integer y_outer, Integer y_inner, Address residual, Integer residual_outer,
                                Integer residual_inner, Address mask, Address weight, int weight_type,
                                Address bias, int bias_type, Address mean, Address inverse_std, Address m2,
                                Address running_mean, Address running_var, int running_type) const {
        Forward call;
        fill(call, threads, mask, weight, weight_type, bias, bias_type, mean, inverse_std);
        std::vector<double> counts(groups);
        call.x = tensor(x, x_outer, x_inner);
        call.y = tensor(y, y_outer, y_inner);
        call.residual = tensor(residual, residual_outer, residual_inner);
        call.collect = m2 != 0;
        call.eps = eps, call.correction = correction;
        call.m2 = pointer<double>(m2);
        call.count = counts.data();
        call.running_mean = per_channel(running_mean, running_type);
        call.running_var = per_channel(running_var, running_type);
        run_beside_python(call);
        return counts;
    }

    // Writes dx (0: only the sums) and dresidual (0: not wanted). `reduce`: the sums are computed.
    // Where there are counts, the moments depend on x, by the sums over so many values. The sums are also
    // written as the gradients of weight and bias, where those are wanted.
    void backward(int threads, Address x, Integer x_outer, Integer x_inner, Address dy,
                  Integer dy_outer, Integer dy_inner, Address dx, Integer dx_outer,
                  Integer dx_inner, Address residual, Integer residual_outer,
                  Integer residual_inner, Address dresidual, Address mask, Address weight,
                  int weight_type, Address bias, int bias_type, Address mean, Address inverse_std,
                  bool reduce, const std::vector<double>& counts, Address sum_g, Address sum_g_xhat,
                  Address dweight, int dweight_type, Address dbias, int dbias_type) const {
        Backward call;
        fill(call, threads, mask, weight, weight_type, bias, bias_type, mean, inverse_std);
        call.x = tensor(x, x_outer, x_inner);
        call.dy = tensor(dy, dy_outer, dy_inner);
        call.dx = tensor(dx, dx_outer, dx_inner);
        call.residual = tensor(residual, residual_outer, residual_inner);
        call.dresidual = tensor(dresidual, dx_outer, dx_inner);
        call.reduce = reduce, call.through = !counts.empty();
        call.count = counts.data(), call.correction = correction;
        std::vector<double> own(sum_g ? 0 : 2 * groups * C);  // sums that nobody asked for
        call.sum_g = sum_g ? pointer<double>(sum_g) : own.data();
        call.sum_g_xhat = sum_g ? pointer<double>(sum_g_xhat) : call.sum_g + groups * C;
        run_beside_python(call);
        if (dweight)
            put_sum(pointer<void>(dweight), static_cast<Type>(dweight_type), C, groups, call.sum_g_xhat);
        if (dbias) put_sum(pointer<void>(dbias), static_cast<Type>(dbias_type), C, groups, call.sum_g);
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

    // Reads a tensor, or None, of the type and the shape of the batch that lies in memory as it does.
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
};

}  // namespace batchnorm
