// The tensors of one call, and work in parallel on ONNX Runtime's own threads.
#pragma once

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "megalodon/onnxruntime_api.h"

namespace megalodon::ort {

struct Tensor {
    std::vector<int64_t> shape;
    const void* data;
    ElementType type;

    int64_t size() const {
        int64_t product = 1;
        for (const int64_t length : shape)
            product *= length;
        return product;
    }
    const float* floats() const { return static_cast<const float*>(data); }
    const int64_t* integers() const { return static_cast<const int64_t*>(data); }
};

inline void check(const Api& api, Status* status) {
    if (!status) return;
    const std::string message = api.call<GetErrorMessage>(status);
    api.call<ReleaseStatus>(status);
    throw std::runtime_error(message);
}

inline Tensor read_tensor(const Api& api, const Value* value) {
    TensorInfo* info = nullptr;
    check(api, api.call<GetTensorInfo>(value, &info));
    const auto release = [&api](TensorInfo* given) { api.call<ReleaseTensorInfo>(given); };
    const std::unique_ptr<TensorInfo, decltype(release)> owner(info, release);
    size_t rank = 0;
    check(api, api.call<GetNumDimensions>(info, &rank));
    int32_t type = 0;
    check(api, api.call<GetElementType>(info, &type));
    Tensor tensor{std::vector<int64_t>(rank), nullptr, static_cast<ElementType>(type)};
    check(api, api.call<GetDimensions>(info, tensor.shape.data(), rank));
    void* data = nullptr;
    check(api, api.call<GetTensorData>(const_cast<Value*>(value), &data));
    tensor.data = data;
    return tensor;
}

class Call {
 public:
    Call(const Api& api, KernelContext* context) : api_(api), context_(context) {}

    size_t num_inputs() const {
        size_t count = 0;
        check(api_, api_.call<GetNumInputs>(context_, &count));
        return count;
    }

    Tensor input(size_t index) const {
        const Value* value = nullptr;
        check(api_, api_.call<GetInput>(context_, index, &value));
        return read_tensor(api_, value);
    }

    float* output(size_t index, const std::vector<int64_t>& shape) const {
        Value* value = nullptr;
        check(api_, api_.call<GetOutput>(context_, index, shape.data(), shape.size(), &value));
        void* data = nullptr;
        check(api_, api_.call<GetTensorData>(value, &data));
        return static_cast<float*>(data);
    }

    /// Runs `work(begin, end)` over [0, total), split into stretches of at least `grain` of it.
    template <typename Work>
    void parallel(int64_t total, int64_t grain, const Work& work) const {
        const int64_t num_parts = std::max<int64_t>(1, total / std::max<int64_t>(1, grain));
        if (num_parts == 1) return work(int64_t{0}, total);
        struct Share {
            const Work& work;
            int64_t total, num_parts;
        } share{work, total, num_parts};
        check(api_, api_.call<ParallelFor>(
                        context_,
                        [](void* data, size_t part) {
                            const auto& all = *static_cast<Share*>(data);
                            const auto i = static_cast<int64_t>(part);
                            all.work(all.total * i / all.num_parts, all.total * (i + 1) / all.num_parts);
                        },
                        static_cast<size_t>(num_parts), 0, &share));
    }

    /// Raises when a graph that was not written by the exporter feeds the operator something else.
    static void require(bool holds, const char* expected) {
        if (!holds) throw std::invalid_argument(std::string("megalodon operator: expected ") + expected);
    }

 private:
    Api api_;
    KernelContext* context_;
};

}  // namespace megalodon::ort
