// What Python sees of the kernels: addresses, steps and sizes go in, numbers come out, and the checks are
// in Python. The plain calls take tensors instead, and check them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "buffers.h"
#include "cache.h"
#include "plain.h"

namespace batchnorm {

NB_MODULE(_native, module) {
    using namespace nb::literals;
    nb::set_leak_warnings(false);  // plans are kept in a cache of Python's until the very end
    module.attr("activations") = activations;
    nb::class_<Plan>(module, "Plan")
        .def(nb::init<bool, int, Integer, Integer, Integer, Integer, Integer, int, double, double, double,
                      const std::vector<Integer>&, const std::vector<Integer>&, Integer, Integer>())
        .def("counts", &Plan::counts)
        .def("forward", &Plan::forward)
        .def("backward", &Plan::backward)
        .def("output", [](const Plan& plan) { Tensor values; return plan.output(values); })
        .def("forward_plain", &forward_plain, "threads"_a, "x"_a, "residual"_a.none(), "weight"_a.none(),
             "bias"_a.none(), "running_mean"_a.none(), "running_var"_a.none(), "training"_a, "track"_a)
        .def("backward_plain", &backward_plain, "found"_a, "threads"_a, "x"_a, "dy"_a,
             "residual"_a.none(), "weight"_a.none(), "bias"_a.none(), "need_x"_a, "need_weight"_a,
             "need_bias"_a, "need_residual"_a);
    nb::class_<Statistics>(module, "Statistics")
        .def_ro("of_batch", &Statistics::of_batch)
        .def_ro("counts", &Statistics::counts)
        .def("tensors", &Statistics::tensors)
        .def("moments", &Statistics::moments)
        .def("lead", &Statistics::lead, "running_mean"_a, "running_var"_a, "momentum"_a, "tracked"_a.none());
    module.def("follow", [](double count, Integer C, Address mean, Address m2, nb::handle running_mean,
                            nb::handle running_var, double momentum, nb::handle tracked) {
        return follow(count, C, pointer<double>(mean), pointer<double>(m2), running_mean, running_var,
                      momentum, tracked);
    }, "count"_a, "C"_a, "mean"_a, "m2"_a, "running_mean"_a, "running_var"_a, "momentum"_a, "tracked"_a.none());
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
