// What both devices do before a kernel runs: argument checks, dtypes, layouts, fresh outputs.
// Header only and free of device code, so that bn_leaky_relu.cpp and bn_leaky_relu_cuda.cu (and the two
// spectral_norm files) accept the same arguments, give the same errors and return the same layouts.
// An error says what was given, what is allowed and what to do. Schemas: schemas.cpp.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace dcgan {
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The parts of a message. No stream: where a toolchain links libstdc++ statically beside torch's own, formatting
// a number in a stream crashes (seen with g++ 13).
struct shape {  // (128, 64, 16, 16)
  IntHeaderOnlyArrayRef sizes;
  explicit shape(const Tensor& t) : sizes(t.sizes()) {}
};
inline std::string text(const char* words) { return words; }
template <typename N, std::enable_if_t<std::is_integral_v<N>, bool> = true>
std::string text(N n) {
  return std::to_string(n);
}
struct place {  // cuda:0
  const Tensor& t;
};
inline std::string text(const place& p) {
  return p.t.is_cuda() ? "cuda:" + std::to_string(p.t.get_device_index()) : p.t.is_cpu() ? "cpu" : "another device";
}
inline std::string text(const shape& s) {
  std::string all;
  for (size_t d = 0; d < s.sizes.size(); ++d) all += (d ? ", " : "") + std::to_string(s.sizes[d]);
  return "(" + all + ")";
}
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error((text(parts) + ...));
}
template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) fail(parts...);
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}
inline const char* dtype_name(ScalarType t) { return torch::headeronly::toString(t); }

// Statistics, parameters and every sum live in at least fp32: fp64 for double, fp32 for all others.
inline ScalarType wide(ScalarType t) { return t == ScalarType::Double ? t : ScalarType::Float; }

inline Tensor new_like(const Tensor& t, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(t, sizes, dtype);
}
// Uninitialized, in the memory order of the dense tensor t.
inline Tensor empty_like(const Tensor& t, ScalarType dtype) {
  using torch::stable::detail::from;
  const auto none = from(std::nullopt);
  std::array<StableIValue, 6> stack{from(t), from(std::optional<ScalarType>(dtype)), none, none, none, none};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}
// A contiguous copy of a small tensor in `dtype`, or the tensor itself where it already is that.
inline Tensor as(const Tensor& t, ScalarType dtype) {
  Tensor cast = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  return cast.is_contiguous() ? cast : torch::stable::contiguous(cast);
}
inline OptionalTensor as(const OptionalTensor& t, ScalarType dtype) {
  return t ? OptionalTensor(as(*t, dtype)) : std::nullopt;
}
inline void check_same_device(const char* name, const Tensor& t, const Tensor& x) {
  bool same_type = t.is_cuda() == x.is_cuda() && t.is_cpu() == x.is_cpu();
  check(same_type && t.get_device_index() == x.get_device_index(), name,
        " is on ", place{t}, ", the other tensors on ", place{x}, ": move it there");
}

// ---------------------------------------------------------------------------------------------- layouts
// True where memory runs (N, spatial..., C): channels_last, for any number of dimensions.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() < 3) return false;
  int64_t expected = 1;
  auto dense_at = [&](int64_t d) {
    bool ok = t.size(d) == 1 || t.stride(d) == expected;
    expected *= t.size(d);
    return ok;
  };
  bool ok = dense_at(1);
  for (int64_t d = t.dim() - 1; ok && d >= 2; --d) ok = dense_at(d);
  return ok && dense_at(0);
}
// The tensor itself if it is dense in one of the two layouts that the kernels read in place, else a dense
// copy: channels_last where the channels of a 4-D tensor are adjacent, else row-major. The fake kernels in
// __init__.py follow the same rule.
inline Tensor dense(const Tensor& t) {
  using torch::headeronly::MemoryFormat;
  if (t.is_contiguous() || is_channels_last(t)) return t;
  bool last = t.dim() == 4 && t.size(1) > 1 && t.stride(1) == 1;
  return torch::stable::contiguous(t, last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}
// `t` in exactly the memory order of the dense tensor `model` of the same sizes; a copy if it is not.
inline Tensor in_layout_of(const Tensor& t, const Tensor& model) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1 && t.stride(d) != model.stride(d)) {
      Tensor copy = empty_like(model, t.scalar_type());
      torch::stable::copy_(copy, t);
      return copy;
    }
  }
  return t;
}

// ------------------------------------------------------------------------------------------ bn_leaky_relu
// x seen as (outer, channels, inner): NCHW is (N, C, H*W); channels_last and (N, C) are (N*H*W, C, 1).
// Group g owns the rows [g, g + 1) * outer / groups; each channel of a group has `count` values.
struct BnSizes {
  int64_t outer, channels, inner, groups, count;
};
inline BnSizes bn_sizes(const Tensor& x, int64_t groups) {  // x as dense() gives it
  BnSizes s{x.size(0), x.size(1), 1, groups, 0};
  int64_t spatial = 1;
  for (int64_t d = 2; d < x.dim(); ++d) spatial *= x.size(d);
  // Both layouts hold for one channel, or for 1x1 pictures. With one channel row-major has the longer runs
  // (inner = H*W); with 1x1 pictures it would have runs of 1, so those count as rows of channels.
  bool row_major = x.is_contiguous() && spatial > 1;
  (row_major ? s.inner : s.outer) *= spatial;
  s.count = s.outer / groups * s.inner;
  return s;
}
inline void check_bn_vector(const char* name, const OptionalTensor& t, const Tensor& x) {
  if (!t) return;
  check(t->dim() == 1 && t->size(0) == x.size(1), "bn_leaky_relu: ", name, " must have shape (", x.size(1),
        ",), one value per channel of x ", shape(x), "; got ", shape(*t));
  auto given = t->scalar_type(), own = x.scalar_type();
  check(given == own || given == wide(own), "bn_leaky_relu: ", name, " must be ", dtype_name(own),
        " like x", own == wide(own) ? "" : " or Float", "; got ", dtype_name(given), ": cast it");
  check_same_device(name, *t, x);
}
inline void check_bn_input(const Tensor& x, int64_t groups) {
  auto t = x.scalar_type();
  bool half = t == ScalarType::BFloat16 || t == ScalarType::Half;
  check(half || t == ScalarType::Float || t == ScalarType::Double,
        "bn_leaky_relu needs float32, bfloat16, float16 or float64; got ", dtype_name(t),
        ": leave --fused out, or cast x");
  check(x.dim() >= 2, "bn_leaky_relu: x must be (N, C) or (N, C, H, W); got shape ", shape(x));
  check(groups >= 1 && x.size(0) % groups == 0, "bn_leaky_relu: groups must divide the batch of ", x.size(0),
        "; got groups = ", groups);
}
inline void check_bn_leaky_relu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                bool training, int64_t groups) {
  check_bn_input(x, groups);
  check_bn_vector("weight", weight, x);
  check_bn_vector("bias", bias, x);
  check_bn_vector("running_mean", running_mean, x);
  check_bn_vector("running_var", running_var, x);
  check(running_mean.has_value() == running_var.has_value(),
        "bn_leaky_relu: give both running_mean and running_var, or neither");
  check(training || running_mean.has_value(), "bn_leaky_relu: eval mode needs running_mean and running_var");
  check(!training || x.numel() == 0 || x.numel() / x.size(1) / groups > 1,
        "Expected more than 1 value per channel when training, got input size ", shape(x), " in ", groups,
        " group(s)");
}
inline void check_bn_leaky_relu_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                         const OptionalTensor& bias, const Tensor& mean, const Tensor& invstd,
                                         bool training, int64_t groups) {
  check_bn_input(x, groups);
  check_bn_vector("weight", weight, x);
  check_bn_vector("bias", bias, x);
  check(same_shape(dy, x) && dy.scalar_type() == x.scalar_type(), "bn_leaky_relu_backward: dy must be ",
        dtype_name(x.scalar_type()), " ", shape(x), " like x; got ", dtype_name(dy.scalar_type()),
        " ", shape(dy));
  check_same_device("dy", dy, x);
  for (const Tensor* t : {&mean, &invstd}) {
    check(t->dim() == 2 && t->size(0) == (training ? groups : 1) && t->size(1) == x.size(1) &&
              t->scalar_type() == wide(x.scalar_type()) && t->is_contiguous(),
          "bn_leaky_relu_backward: mean and invstd must be those that bn_leaky_relu returned");
    check_same_device("mean or invstd", *t, x);
  }
}

// ------------------------------------------------------------------------------------------ spectral_norm
// A weight (out, in, ...) as the matrix of its `rows` outputs and `cols` = in * taps inputs. Column j of
// row-major memory is input j / taps and tap j % taps, which is the order of v; channels_last memory has it
// the other way round: column j is tap j / in and input j % in.
struct SnSizes {
  int64_t rows, cols, taps;
  bool channels_last;
};
inline SnSizes sn_sizes(const Tensor& w) {  // w as dense() gives it
  SnSizes s{w.size(0), 1, 1, !w.is_contiguous()};
  for (int64_t d = 1; d < w.dim(); ++d) s.cols *= w.size(d);
  for (int64_t d = 2; d < w.dim(); ++d) s.taps *= w.size(d);
  return s;
}
inline void check_sn_weight(const Tensor& w, const Tensor& u, const Tensor& v, const Tensor& first) {
  auto t = w.scalar_type();
  check(t == ScalarType::Float || t == ScalarType::Double,
        "spectral_norm needs float32 or float64 weights; got ", dtype_name(t),
        ": leave --fused out, or keep the weights in float32 (autocast does)");
  check(t == first.scalar_type(), "spectral_norm: all weights must have one dtype; got ",
        dtype_name(first.scalar_type()), " and ", dtype_name(t));
  check(w.dim() >= 2 && w.numel() > 0, "spectral_norm: a weight must be (out, in, ...) and not empty; got ",
        shape(w));
  int64_t rows = w.size(0), cols = w.numel() / rows;
  check(u.dim() == 1 && u.size(0) == rows && v.dim() == 1 && v.size(0) == cols, "spectral_norm: a weight of ",
        shape(w), " needs u of shape (", rows, ",) and v of (", cols, ",); got ", shape(u), " and ",
        shape(v));
  check(u.scalar_type() == t && v.scalar_type() == t, "spectral_norm: u and v must be ", dtype_name(t),
        " like their weight; got ", dtype_name(u.scalar_type()), " and ", dtype_name(v.scalar_type()));
  check_same_device("a weight", w, first);
  check_same_device("u", u, w);
  check_same_device("v", v, w);
}
inline void check_spectral_norm(const std::vector<Tensor>& weights, const std::vector<Tensor>& us,
                                const std::vector<Tensor>& vs) {
  check(!weights.empty() && weights.size() == us.size() && weights.size() == vs.size(),
        "spectral_norm: give one u and one v for each of one or more weights; got ", weights.size(),
        " weights, ", us.size(), " us, ", vs.size(), " vs");
  for (size_t i = 0; i < weights.size(); ++i) check_sn_weight(weights[i], us[i], vs[i], weights[0]);
}
inline ScalarType sn_out_dtype(const std::vector<Tensor>& weights, std::optional<ScalarType> out_dtype) {
  auto own = weights[0].scalar_type(), t = out_dtype.value_or(own);
  check(t == own || (own == ScalarType::Float && (t == ScalarType::BFloat16 || t == ScalarType::Half)),
        "spectral_norm: out_dtype must be the weights' ", dtype_name(own),
        ", or bfloat16 or float16 for float32 weights; got ", dtype_name(t));
  return t;
}
inline void check_spectral_norm_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                                         const std::vector<Tensor>& us, const std::vector<Tensor>& vs,
                                         const Tensor& sigmas) {
  check_spectral_norm(weights, us, vs);
  check(grads.size() == weights.size(), "spectral_norm_backward: got ", grads.size(), " gradients for ",
        weights.size(), " weights");
  check(sigmas.dim() == 1 && sigmas.size(0) == (int64_t)weights.size() &&
            sigmas.scalar_type() == weights[0].scalar_type() && sigmas.is_contiguous(),
        "spectral_norm_backward: sigmas must be those that spectral_norm returned");
  check_same_device("sigmas", sigmas, weights[0]);
  for (size_t i = 0; i < weights.size(); ++i) {
    check(same_shape(grads[i], weights[i]), "spectral_norm_backward: gradient ", i, " has shape ",
          shape(grads[i]), ", its weight ", shape(weights[i]));
    check(grads[i].scalar_type() == grads[0].scalar_type(),
          "spectral_norm_backward: all gradients must have one dtype; got ",
          dtype_name(grads[0].scalar_type()), " and ", dtype_name(grads[i].scalar_type()));
    check_same_device("a gradient", grads[i], weights[0]);
    sn_out_dtype(weights, grads[i].scalar_type());
  }
}
}  // namespace dcgan
